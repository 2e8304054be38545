"""Lower canonical nodes to standard ONNX operators, so that ONNX Runtime can run them.

The lowering of a canonical operator is batch-agnostic. Plain nodes hold shapes of one frame, so
a graph with any of them is wrapped in a Scan over the frames, which makes it batch-agnostic too.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from moeware.compiler.canonical import DOMAIN, attributes, is_canonical, shape
from moeware.compiler.fuse.region import inputs_of


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
    emitter = _Emitter(model.opset_imports.get("", 20), _value_names(model))
    for node in nodes:
        if is_canonical(node):
            _LOWERINGS[node.op_type](emitter, node, attributes(node))
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
    emitter: "_Emitter", inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
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


class _Emitter:
    """Collects the nodes and initializers of the lowered graph, beside values named ``taken``."""

    def __init__(self, opset: int, taken: set[str]):
        self.opset, self.nodes = opset, []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._taken, self._numbers = taken, itertools.count(1)

    def name(self, wanted: str) -> str:
        """``wanted``, or a name like it where a value has that name."""
        name = wanted
        while name in self._taken:
            name = f"{wanted}/{next(self._numbers)}"
        self._taken.add(name)
        return name

    def share(self, value: ir.Value) -> None:
        """Carry an initializer over under its name."""
        if value.name not in self._tensors:
            assert value.const_value is not None and value.name is not None
            array = np.asarray(value.const_value.numpy())
            self._tensors[value.name] = numpy_helper.from_array(array, value.name)

    def constant(self, array: np.ndarray) -> str:
        """Name of a new initializer that holds ``array``."""
        name = self.name("constant")
        self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, *numbers: int) -> str:
        """Name of a new int64 vector."""
        return self.constant(np.array(numbers, np.int64))

    def tensors(self) -> list[onnx.TensorProto]:
        """All initializers."""
        return list(self._tensors.values())

    def drop_unused(self) -> None:
        """Forget weights that a lowering replaced by a rearranged copy."""
        used = {name for node in self.nodes for name in _names_read(node)}
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}

    def emit(self, operator: str, inputs: Sequence[str], output: str | None = None, **attrs) -> str:
        """Add a standard node and return the name of its output."""
        if output is None:
            output = self.name("lowered")
        self.nodes.append(helper.make_node(operator, inputs, [output], **attrs))
        return output


def _names_read(node: onnx.NodeProto) -> list[str]:
    inner = [
        name
        for attribute in node.attribute
        if attribute.HasField("g")
        for child in attribute.g.node
        for name in _names_read(child)
    ]
    return [*node.input, *inner]


def _names(node: ir.Node) -> list[str]:
    return [str(value.name) for value in node.inputs if value is not None]


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _patch_embed(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    image, _, bias = _names(node)
    patch = [attrs["ph"], attrs["pw"]]
    weight = _array(node.inputs[1]).reshape(-1, attrs["channels"], *patch)
    kernel = emitter.constant(np.ascontiguousarray(weight))
    maps = emitter.emit("Conv", [image, kernel, bias], strides=patch, kernel_shape=patch)
    rows = emitter.emit("Reshape", [maps, emitter.integers(0, len(weight), -1)])
    emitter.emit("Transpose", [rows], node.outputs[0].name, perm=[0, 2, 1])


def _class_token(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    x, _ = _names(node)
    token = emitter.constant(_array(node.inputs[1]).reshape(1, 1, -1))
    batch = emitter.emit("Shape", [x], start=0, end=1)
    target = emitter.emit("Concat", [batch, emitter.integers(1, 1)], axis=0)
    row = emitter.emit("Expand", [token, target])
    emitter.emit("Concat", [row, x], node.outputs[0].name, axis=1)


def _add(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    emitter.emit("Add", _names(node), node.outputs[0].name)


def _layer_norm(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    name = node.outputs[0].name
    emitter.emit("LayerNormalization", _names(node), name, axis=-1, epsilon=attrs["epsilon"])


def _linear(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    x, _, bias = _names(node)
    weight = emitter.constant(np.ascontiguousarray(_array(node.inputs[1]).T))
    emitter.emit("Add", [emitter.emit("MatMul", [x, weight]), bias], node.outputs[0].name)


def _attention(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    parts = []
    for name, count in zip(_names(node), (heads, kv_heads, kv_heads)):
        split = emitter.emit("Reshape", [name, emitter.integers(0, 0, count, -1)])
        # Queries and keys of one group meet on the axes [B, kv_heads, group, N, dim].
        groups = emitter.emit("Transpose", [split], perm=[0, 2, 1, 3])
        if count == heads and heads != kv_heads:
            target = emitter.integers(0, kv_heads, heads // kv_heads, -1, _dim(node, heads))
        else:
            target = emitter.integers(0, kv_heads, 1, -1, _dim(node, heads))
        if heads == kv_heads:
            parts.append(groups)
        else:
            parts.append(emitter.emit("Reshape", [groups, target]))
    q, k, v = parts
    rank = 4 if heads == kv_heads else 5
    keys = emitter.emit("Transpose", [k], perm=[*range(rank - 2), rank - 1, rank - 2])
    scale = emitter.constant(np.array(attrs["scale"], np.float32))
    scores = emitter.emit("Mul", [emitter.emit("MatMul", [q, keys]), scale])
    if attrs["causal"]:
        tokens = shape(node.outputs[0])[1]
        mask = np.where(np.tri(tokens).astype(bool), 0, -np.inf).astype(np.float32)
        scores = emitter.emit("Add", [scores, emitter.constant(mask)])
    weighted = emitter.emit("MatMul", [emitter.emit("Softmax", [scores], axis=-1), v])
    if heads != kv_heads:
        tokens = shape(node.outputs[0])[1]
        target = emitter.integers(0, heads, tokens, _dim(node, heads))
        weighted = emitter.emit("Reshape", [weighted, target])
    rows = emitter.emit("Transpose", [weighted], perm=[0, 2, 1, 3])
    target = emitter.integers(0, 0, heads * _dim(node, heads))
    emitter.emit("Reshape", [rows, target], node.outputs[0].name)


def _dim(node: ir.Node, heads: int) -> int:
    return shape(node.outputs[0])[-1] // heads


def _function(emitter: _Emitter, name: str, x: str, output: str | None = None) -> str:
    def number(value: float) -> str:
        return emitter.constant(np.array(value, np.float32))

    if name in ("relu", "sigmoid", "tanh"):
        return emitter.emit(name.capitalize(), [x], output)
    if name == "silu":
        return emitter.emit("Mul", [x, emitter.emit("Sigmoid", [x])], output)
    if name == "gelu":
        inner = emitter.emit("Erf", [emitter.emit("Mul", [x, number(0.5**0.5)])])
    else:
        cube = emitter.emit("Mul", [emitter.emit("Mul", [x, x]), x])
        cubic = emitter.emit("Add", [x, emitter.emit("Mul", [cube, number(0.044715)])])
        inner = emitter.emit("Tanh", [emitter.emit("Mul", [cubic, number((2 / np.pi) ** 0.5)])])
    factor = emitter.emit("Add", [inner, number(1.0)])
    return emitter.emit("Mul", [emitter.emit("Mul", [x, factor]), number(0.5)], output)


def _pointwise(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    _function(emitter, attrs["function"], _names(node)[0], node.outputs[0].name)


def _route(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    x, _, bias = _names(node)
    weight = emitter.constant(np.ascontiguousarray(_array(node.inputs[1]).T))
    logits = emitter.emit("Add", [emitter.emit("MatMul", [x, weight]), bias])
    indices, factors = (str(value.name) for value in node.outputs)
    source = logits
    if attrs["normalise"] == "all":
        source = emitter.emit("Softmax", [logits], axis=-1)
    top = factors if attrs["normalise"] == "all" else emitter.name(f"{factors}/logits")
    emitter.nodes.append(
        helper.make_node("TopK", [source, emitter.integers(attrs["k"])], [top, indices], axis=-1)
    )
    if attrs["normalise"] == "chosen":
        emitter.emit("Softmax", [top], factors, axis=-1)


def _experts(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    x, indices, factors, w1, b1, w2, b2 = _names(node)
    count = _array(node.inputs[3]).shape[0]
    # Every expert on every token, weighted by 0 where it is not chosen.
    last = emitter.integers(-1)
    chosen = emitter.emit("Unsqueeze", [indices, last])
    hits = emitter.emit("Equal", [chosen, emitter.constant(np.arange(count, dtype=np.int64))])
    hits = emitter.emit("Cast", [hits], to=TensorProto.FLOAT)
    weighted = emitter.emit("Mul", [hits, emitter.emit("Unsqueeze", [factors, last])])
    dense = emitter.emit("ReduceSum", [weighted, emitter.integers(-2)], keepdims=0)
    hidden = emitter.emit("Einsum", [x, w1], equation="bnd,ehd->bneh")
    hidden = _function(emitter, attrs["function"], emitter.emit("Add", [hidden, b1]))
    each = emitter.emit("Einsum", [hidden, w2], equation="bneh,edh->bned")
    each = emitter.emit("Add", [each, b2])
    emitter.emit("Einsum", [each, dense], node.outputs[0].name, equation="bned,bne->bnd")


def _take_token(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    index = emitter.constant(np.array(attrs["index"], np.int64))
    emitter.emit("Gather", [_names(node)[0], index], node.outputs[0].name, axis=1)


def _mean_tokens(emitter: _Emitter, node: ir.Node, attrs: dict) -> None:
    x, output = _names(node)[0], node.outputs[0].name
    if emitter.opset < 18:
        emitter.emit("ReduceMean", [x], output, axes=[1], keepdims=0)
    else:
        emitter.emit("ReduceMean", [x, emitter.integers(1)], output, keepdims=0)


_LOWERINGS: dict[str, Callable[[_Emitter, ir.Node, dict], None]] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _add,
    "LayerNorm": _layer_norm,
    "Linear": _linear,
    "Attention": _attention,
    "Pointwise": _pointwise,
    "Add": _add,
    "Route": _route,
    "Experts": _experts,
    "TakeToken": _take_token,
    "MeanTokens": _mean_tokens,
}
