"""Lower canonical nodes to standard ONNX operators, so that ONNX Runtime can run them.

The lowering of a canonical operator is batch-agnostic. Plain nodes hold shapes of one frame, so
a graph with any of them is wrapped in a Scan over the frames, which makes it batch-agnostic too.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from moeware.compiler.canonical import DOMAIN, attributes, is_canonical, shape
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.to_onnx.emitter import Emitter
from moeware.compiler.to_onnx.operators import LOWERINGS

__all__ = ["lower", "to_onnx"]


def to_onnx(model: ir.Model) -> onnx.ModelProto:
    """The canonical ``model`` in standard operators: same inputs and outputs, any batch."""
    return lower(model, list(model.graph), model.graph.inputs, model.graph.outputs)


def lower(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> onnx.ModelProto:
    """``nodes`` (in topological order) of ``model`` as an ONNX model from ``inputs`` to ``outputs``.

    Raises ``CompileError`` where an input or output has no static shape.
    """
    emitter = Emitter(model.opset_imports.get("", 20), _value_names(model))
    for node in nodes:
        if is_canonical(node):
            LOWERINGS[node.op_type](emitter, node, attributes(node))
        else:
            emitter.nodes.append(ir.to_proto(node))
        for value in inputs_of(node):
            if value.const_value is not None:
                emitter.share(value)
    emitter.drop_unused()
    if all(is_canonical(node) for node in nodes):
        graph = helper.make_graph(
            emitter.nodes,
            "canonical",
            [_info(value, value.name) for value in inputs],
            [_info(value, value.name) for value in outputs],
            emitter.tensors(),
        )
    else:
        graph = _scan(emitter, inputs, outputs)
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in model.opset_imports.items()
        if domain != DOMAIN
    ]
    proto = helper.make_model(graph, ir_version=10, opset_imports=opsets, producer_name="moeware")
    onnx.checker.check_model(proto)
    return proto


def _value_names(model: ir.Model) -> set[str]:
    """Names of all values, those of subgraphs included."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values += [*node.inputs, *node.outputs]
    return {value.name for value in values if value is not None and value.name}


def _info(value: ir.Value, name: str | None, frame: bool = False) -> onnx.ValueInfoProto:
    """Type of ``value`` with a dynamic first axis, or of one frame without that axis."""
    sizes = shape(value)
    kind = int(value.dtype or ir.DataType.FLOAT)
    if frame:
        return helper.make_tensor_value_info(name, kind, sizes[1:] if sizes[:1] == (1,) else sizes)
    return helper.make_tensor_value_info(name, kind, ["batch", *sizes[1:]])


def _scan(
    emitter: Emitter, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> onnx.GraphProto:
    """The emitted nodes for one frame, as the body of a Scan over the first axis of all inputs."""
    axis = emitter.constant(np.array([0], np.int64))
    frame = {value: emitter.name(f"{value.name}/frame") for value in (*inputs, *outputs)}
    before = [
        helper.make_node("Unsqueeze", [frame[value], axis], [value.name]) for value in inputs
    ]
    after, outside, scanned = [], [], []
    for value in outputs:
        sizes = shape(value)
        single = sizes[:1] == (1,)
        operator = ("Squeeze", [value.name, axis]) if single else ("Identity", [value.name])
        after.append(helper.make_node(*operator, [frame[value]]))
        scanned.append(
            value.name if single or not sizes else emitter.name(f"{value.name}/frames")
        )
        if sizes and not single:
            # Rows of all frames lie behind each other, as in a graph with a larger batch.
            target = emitter.constant(np.array([-1, *sizes[1:]], np.int64))
            outside.append(helper.make_node("Reshape", [scanned[-1], target], [value.name]))
    body = helper.make_graph(
        [*before, *emitter.nodes, *after],
        "frame",
        [_info(value, frame[value], frame=True) for value in inputs],
        [_info(value, frame[value], frame=True) for value in outputs],
    )
    names = [value.name for value in inputs]
    # The body makes values of the names of the outer graph: rename those inside.
    twice = [*names, *(value.name for value in outputs)]
    _rename(body, {name: emitter.name(f"{name}/inner") for name in twice})
    scan = helper.make_node("Scan", names, scanned, body=body, num_scan_inputs=len(names))
    return helper.make_graph(
        [scan, *outside],
        "host",
        [_info(value, value.name) for value in inputs],
        [_info(value, value.name) for value in outputs],
        emitter.tensors(),
    )


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
