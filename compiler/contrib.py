"""Operators of ONNX Runtime's own that its optimisers and builders write into transformers."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moeware.compiler.contrib_attributes import check_attributes
from moeware.compiler.contrib_context import HALVES, Context

__all__ = ["EXPANDED", "expand_operators"]


def expand_operators(proto: onnx.ModelProto) -> None:
    """Write operators that no opset has, of `_EXPANSIONS`, out in standard ones. What an expansion
    does not cover stays as it is.

    Raises ``CompileError`` for attributes that their operators do not have so.
    """
    # What transposes asks for ranks, which are inferred when the others are standard operators.
    for late in (False, True):
        nodes: list[onnx.NodeProto] = []
        context = Context(proto)
        for node in proto.graph.node:
            kind = (node.domain, node.op_type)
            expand = _EXPANSIONS.get(kind)
            if expand is not None or node.domain == "com.microsoft":
                check_attributes(node)
            if node.domain == "com.microsoft" and node.op_type in _WITH_PAST:
                # A past without elements is as good as none.
                node.input[:] = ["" if name in context.empty else name for name in node.input]
            ready = expand is not None and (kind in _TRANSPOSING) == late
            nodes += (ready and _expanded(context, node, expand)) or [node]
            context.add(node)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def _expanded(context: Context, node: onnx.NodeProto, expand: "_Expansion") -> list[onnx.NodeProto]:
    """The nodes in the place of ``node``; none where the expansion does not cover it. They compute in
    float32, as the kernels do, between casts where the file has half precision."""
    kind = context.kind(node)
    if kind not in HALVES:
        emit = _Emitter(context, node)
        return emit.nodes if expand(emit, emit.attributes) else []
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    for names in (wide.input, wide.output):
        names[:] = [name and f"{name}/float_of_{node.name}" for name in names]
    emit = _Emitter(context, wide)
    context.ranks |= {new: rank for old, new in zip(node.input, wide.input)
                      if (rank := context.rank(old))}
    context.producers |= {new: context.producers[old] for old, new in zip(node.input, wide.input)
                          if old in context.producers}
    if not expand(emit, emit.attributes):
        return []
    read = {name for each in emit.nodes for name in each.input}
    casts = [helper.make_node("Cast", [old], [new], f"{new}/Cast", to=onnx.TensorProto.FLOAT)
             for old, new in zip(node.input, wide.input) if new in read]
    back = [helper.make_node("Cast", [new], [old], f"{new}/Cast", to=kind)
            for old, new in zip(node.output, wide.output) if old]
    return [*casts, *emit.nodes, *back]


_WITH_PAST = ("GroupQueryAttention", "MultiHeadAttention")


class _Emitter:
    """Nodes in the place of ``node``."""

    def __init__(self, context: Context, node: onnx.NodeProto):
        self.context, self.node = context, node
        self.attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        self.nodes: list[onnx.NodeProto] = []

    def input(self, place: int) -> str:
        """Name of an input; empty where it is absent."""
        return self.node.input[place] if place < len(self.node.input) else ""

    def output(self, place: int) -> str:
        return self.node.output[place] if place < len(self.node.output) else ""

    def reads(self, *places: int, optional: tuple[int, ...] = ()) -> bool:
        """Whether the node has these inputs and no others, but for optional ones."""
        found = {place for place, name in enumerate(self.node.input) if name}
        return found - set(optional) == set(places)

    def constant(self, value: float | list[int]) -> str:
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"{self.output(0)}/constant_{len(self.context.initializers)}"
        self.context.initializers.append(numpy_helper.from_array(array, name))
        return name

    def __call__(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes):
        """Add a node; the name of its result, or a list of them."""
        prefix = f"{self.output(0)}/{operator}_{len(self.nodes)}"
        names = [output or prefix] if outputs == 1 else [f"{prefix}_{n}" for n in range(outputs)]
        name = f"{self.node.name}/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, names, name, **attributes))
        return names[0] if outputs == 1 else names


def _simplified_norm(emit: _Emitter, attributes: Mapping) -> bool:
    if not emit.reads(0, 1) or attributes.get("axis", -1) != -1:
        return False
    _root_mean_square(emit, emit.input(0), emit.input(1), attributes, emit.output(1))
    return True


def _root_mean_square(emit: _Emitter, x: str, gamma: str, attributes: Mapping, inverse: str) -> None:
    square = emit("Pow", x, emit.constant(2.0))
    if emit.context.opset < 18:
        mean = emit("ReduceMean", square, axes=[-1])
    else:
        mean = emit("ReduceMean", square, emit.constant([-1]))
    root = emit("Sqrt", emit("Add", mean, emit.constant(float(attributes.get("epsilon", 1e-5)))))
    if inverse:
        emit("Reciprocal", root, output=inverse)
    emit("Mul", emit("Div", x, root), gamma, output=emit.output(0))


def _skip_norm(emit: _Emitter, attributes: Mapping) -> bool:
    simplified = emit.node.op_type.startswith("SkipSimplified")
    bias = emit.input(3 if simplified else 4)
    if emit.output(1) or emit.output(2):
        return False
    # The bias is that of the layer, not of the stream, which the optimiser has in either place.
    skip, x = emit.input(0), emit.input(1)
    if emit.context.producers.get(x) not in _LAYERS:
        skip, x = x, skip
    x = emit("Add", x, bias) if bias else x
    total = emit("Add", skip, x, output=emit.output(3))
    if simplified:
        _root_mean_square(emit, total, emit.input(2), attributes, "")
    else:
        epsilon = float(attributes.get("epsilon", 1e-12))
        inputs = [total, emit.input(2), *filter(None, [emit.input(3)])]
        emit("LayerNormalization", *inputs, output=emit.output(0), axis=-1, epsilon=epsilon)
    return True


_LAYERS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")


def _gelu(emit: _Emitter, attributes: Mapping) -> bool:
    x = emit("Add", emit.input(0), emit.input(1)) if emit.input(1) else emit.input(0)
    if emit.node.op_type == "QuickGelu":
        inner = emit("Mul", x, emit.constant(float(attributes.get("alpha", 1.702))))
        emit("Mul", x, emit("Sigmoid", inner), output=emit.output(0))
        return True
    if emit.node.op_type == "FastGelu":
        cube = emit("Mul", emit("Mul", emit("Mul", x, x), x), emit.constant(0.044715))
        inner = emit("Mul", emit("Add", x, cube), emit.constant((2 / np.pi) ** 0.5))
        inner = emit("Tanh", inner)
    else:
        inner = emit("Erf", emit("Mul", x, emit.constant(0.5**0.5)))
    half = emit("Mul", x, emit.constant(0.5))
    emit("Mul", half, emit("Add", inner, emit.constant(1.0)), output=emit.output(0))
    return True


def _fused_product(emit: _Emitter, attributes: Mapping) -> bool:
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        return False
    factors = []
    for place, name in enumerate("AB"):
        value = emit.input(place)
        if attributes.get(f"trans{name}", 0):
            rank = emit.context.rank(value)
            if rank < 2:
                return False
            value = emit("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        factors.append(value)
    alpha = emit.constant(float(attributes.get("alpha", 1.0)))
    emit("Mul", emit("MatMul", *factors), alpha, output=emit.output(0))
    return True


def _activated(emit: _Emitter, attributes: Mapping) -> bool:
    """Gemm or Conv and the function behind it."""
    known = ("Relu", "Sigmoid", "Tanh")
    function = attributes.get("activation", b"").decode()
    if function not in known or emit.input(3):
        return False
    rest = {name: each for name, each in attributes.items() if not name.startswith("activation")}
    inputs = filter(None, emit.node.input)
    product = emit(emit.node.op_type.removeprefix("Fused"), *inputs, **rest)
    emit(function, product, output=emit.output(0))
    return True


def _attention(emit: _Emitter, attributes: Mapping) -> bool:
    """Attention with packed weights, and MultiHeadAttention of three values of rows."""
    heads, packed = attributes.get("num_heads", 0), emit.node.op_type == "Attention"
    unknown = ("do_rotary", "past_present_share_buffer")
    if any(attributes.get(name) for name in unknown) or emit.output(3) or packed and emit.output(1):
        return False
    if any(emit.context.ranks.get(emit.input(place), 3) != 3 for place in range(1 if packed else 3)):
        return False
    if packed and emit.reads(0, 1, 2, optional=(5,)):
        product = emit("Add", emit("MatMul", emit.input(0), emit.input(1)), emit.input(2))
        sizes = [emit.constant(list(each)) for each in [attributes.get("qkv_hidden_sizes")] if each]
        equal = {} if sizes else _parts(emit, 3)
        parts = emit("Split", product, *sizes, outputs=3, axis=-1, **equal)
    elif not packed and emit.reads(0, 1, 2, optional=(3, 5)):
        parts = [emit.input(place) for place in range(3)]
        if emit.input(3):
            biases = emit("Split", emit.input(3), outputs=3, axis=-1, **_parts(emit, 3))
            parts = [emit("Add", part, bias) for part, bias in zip(parts, biases)]
    else:
        return False
    shape = emit.constant([0, 0, heads, -1])
    presents = "" if packed else emit.output(1), "" if packed else emit.output(2)
    q, k, v = (
        emit("Transpose", emit("Reshape", part, shape), output=present, perm=[0, 2, 1, 3])
        for part, present in zip(parts, ("", *presents))
    )
    scores = emit("MatMul", q, emit("Transpose", k, perm=[0, 1, 3, 2]))
    if attributes.get("scale"):
        scores = emit("Mul", scores, emit.constant(float(attributes["scale"])))
    else:
        size = emit("Cast", emit("Shape", q, start=3, end=4), to=onnx.TensorProto.FLOAT)
        scores = emit("Div", scores, emit("Sqrt", size))
    if attributes.get("unidirectional", 0):
        fill = numpy_helper.from_array(np.array([-np.inf], np.float32))
        shape = emit("Shape", scores, start=2, end=4)
        hidden = emit("ConstantOfShape", shape, value=fill)
        scores = emit("Add", scores, emit("Trilu", hidden, emit.constant(1), upper=1))
    if emit.input(5):
        scores = emit("Add", scores, emit.input(5))
    rows = emit("Transpose", emit("MatMul", emit("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    emit("Reshape", rows, emit.constant([0, 0, -1]), output=emit.output(0))
    return True


def _parts(emit: _Emitter, count: int) -> dict[str, int]:
    """How an opset says that ``Split`` makes equal parts."""
    return {"num_outputs": count} if emit.context.opset >= 18 else {}


_Expansion = Callable[[_Emitter, Mapping], bool]
_OWN: dict[str, _Expansion] = {
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "QuickGelu": _gelu,
    "FusedMatMul": _fused_product,
    "FusedGemm": _activated,
    "FusedConv": _activated,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
_EXPANSIONS = {("com.microsoft", name): expand for name, expand in _OWN.items()}
# This one is entered under the standard domain.
_EXPANSIONS["", "SimplifiedLayerNormalization"] = _simplified_norm
_TRANSPOSING = {("com.microsoft", "FusedMatMul")}
EXPANDED = tuple(name for _, name in _EXPANSIONS)
