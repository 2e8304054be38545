"""Operators of ONNX Runtime's own that its optimiser writes into transformers."""

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import helper

from moeware.compiler.fuse.contrib_moe import is_contrib_moe
from moeware.compiler.fuse.terms import is_rotary
from moeware.compiler.fuse.trace import operand, static_shape

__all__ = ["expand_norms", "infer_shapes"]


def expand_norms(proto: onnx.ModelProto) -> None:
    """Write ``SimplifiedLayerNormalization`` over the last axis, which no opset has, out in
    standard operators."""
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(versions, default=0)  # which is refused later
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        simplified = node.op_type == "SimplifiedLayerNormalization" and len(node.input) == 2
        if simplified and attributes.get("axis", -1) == -1:
            nodes += _norm(proto, node, attributes.get("epsilon", 1e-5), opset)
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _norm(
    proto: onnx.ModelProto, node: onnx.NodeProto, epsilon: float, opset: int
) -> list[onnx.NodeProto]:
    (x, gamma), (y, *inverse) = node.input, node.output

    def constant(name: str, value: list[float] | list[int]) -> str:
        kind = onnx.TensorProto.FLOAT if isinstance(value[0], float) else onnx.TensorProto.INT64
        tensor = helper.make_tensor(f"{y}/{name}", kind, [len(value)], value)
        proto.graph.initializer.append(tensor)
        return tensor.name

    def emit(operator: str, *inputs: str, output: str = "", **attributes) -> str:
        output = output or f"{y}/{operator}"
        made = helper.make_node(operator, inputs, [output], f"{node.name}/{operator}", **attributes)
        nodes.append(made)
        return output

    nodes: list[onnx.NodeProto] = []
    square = emit("Pow", x, constant("two", [2.0]))
    if opset < 18:
        mean = emit("ReduceMean", square, axes=[-1])
    else:
        mean = emit("ReduceMean", square, constant("axis", [-1]))
    root = emit("Sqrt", emit("Add", mean, constant("epsilon", [float(epsilon)])))
    if inverse and inverse[0]:
        emit("Reciprocal", root, output=inverse[0])
    emit("Mul", emit("Div", x, root), gamma, output=y)
    return nodes


def infer_shapes(model: ir.Model) -> None:
    """Infer shapes in place, those behind operators of ONNX Runtime's domain included, where ONNX
    stops: ``MoE``, ``QMoE`` and ``RotaryEmbedding`` keep the shape of their first input."""
    unknown = [node for node in model.graph if is_contrib_moe(node) or _is_contrib_rotary(node)]
    while unknown:
        # Not strict, as a value without a type is an error there.
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        known = [node for node in unknown if static_shape(operand(node, 0)) is not None]
        if not known:
            return  # folding may find more
        for node in known:
            node.outputs[0].shape, node.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        unknown = [node for node in unknown if node not in known]


def _is_contrib_rotary(node: ir.Node) -> bool:
    return bool(node.domain) and is_rotary(node)
