"""The standard operators that each canonical operator stands for."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from moeware.compiler.canonical import shape
from moeware.compiler.to_onnx.emitter import Emitter, array, names
from moeware.compiler.to_onnx.route import lower_route

__all__ = ["LOWERINGS"]

# Emits a canonical node, given its attributes.
Lowering = Callable[[Emitter, ir.Node, dict], None]


def _patch_embed(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    image, _, bias = names(node)
    patch = [attrs["ph"], attrs["pw"]]
    weight = array(node.inputs[1]).reshape(-1, attrs["channels"], *patch)
    kernel = emitter.constant(np.ascontiguousarray(weight))
    maps = emitter.emit("Conv", [image, kernel, bias], strides=patch, kernel_shape=patch)
    rows = emitter.emit("Reshape", [maps, emitter.integers(0, len(weight), -1)])
    emitter.emit("Transpose", [rows], node.outputs[0].name, perm=[0, 2, 1])


def _class_token(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x, _ = names(node)
    token = emitter.constant(array(node.inputs[1]).reshape(1, 1, -1))
    batch = emitter.emit("Shape", [x], start=0, end=1)
    target = emitter.emit("Concat", [batch, emitter.integers(1, 1)], axis=0)
    row = emitter.emit("Expand", [token, target])
    emitter.emit("Concat", [row, x], node.outputs[0].name, axis=1)


def _elementwise(operator: str) -> Lowering:
    def lowering(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
        emitter.emit(operator, names(node), node.outputs[0].name)

    return lowering


def _layer_norm(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    name = node.outputs[0].name
    emitter.emit("LayerNormalization", names(node), name, axis=-1, epsilon=attrs["epsilon"])


def _rms_norm(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x, gamma = names(node)
    parts = emitter.emit("Reshape", [x, emitter.integers(0, 0, attrs["groups"], -1)])
    squares = emitter.emit("Mul", [parts, parts])
    mean = _mean(emitter, squares, -1, keepdims=1)
    epsilon = emitter.constant(np.array(attrs["epsilon"], np.float32))
    root = emitter.emit("Sqrt", [emitter.emit("Add", [mean, epsilon])])
    normal = emitter.emit("Div", [parts, root])
    rows = emitter.emit("Reshape", [normal, emitter.integers(0, 0, -1)])
    emitter.emit("Mul", [rows, gamma], node.outputs[0].name)


def _join(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    a, b, columns = names(node)
    emitter.emit("Gather", [emitter.emit("Concat", [a, b], axis=-1), columns],
                 node.outputs[0].name, axis=-1)


def _rotary(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x = names(node)[0]
    cos, sin = (emitter.constant(array(value)[:, None]) for value in node.inputs[1:])
    pairs = emitter.emit("Reshape", [x, emitter.integers(0, 0, attrs["heads"], 2, -1)])
    first, second = (
        emitter.emit("Gather", [pairs, emitter.constant(np.array(half, np.int64))], axis=3)
        for half in (0, 1)
    )
    one = emitter.emit("Mul", [first, cos]), emitter.emit("Mul", [second, sin])
    two = emitter.emit("Mul", [second, cos]), emitter.emit("Mul", [first, sin])
    turned = [emitter.emit("Sub", one), emitter.emit("Add", two)]
    joined = emitter.emit("Concat", turned, axis=-1)
    emitter.emit("Reshape", [joined, emitter.integers(0, 0, -1)], node.outputs[0].name)


def _linear(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x, _, bias = names(node)
    weight = emitter.constant(np.ascontiguousarray(array(node.inputs[1]).T))
    emitter.emit("Add", [emitter.emit("MatMul", [x, weight]), bias], node.outputs[0].name)


def _attention(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    parts = []
    for value, count in zip(node.inputs, (heads, kv_heads, kv_heads)):
        name, dim = str(value.name), shape(value)[-1] // count
        split = emitter.emit("Reshape", [name, emitter.integers(0, 0, count, -1)])
        # Queries and keys of one group meet on the axes [B, kv_heads, group, N, dim].
        groups = emitter.emit("Transpose", [split], perm=[0, 2, 1, 3])
        if count == heads and heads != kv_heads:
            target = emitter.integers(0, kv_heads, heads // kv_heads, -1, dim)
        else:
            target = emitter.integers(0, kv_heads, 1, -1, dim)
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
    _, tokens, features = shape(node.outputs[0])
    if heads != kv_heads:
        target = emitter.integers(0, heads, tokens, features // heads)
        weighted = emitter.emit("Reshape", [weighted, target])
    rows = emitter.emit("Transpose", [weighted], perm=[0, 2, 1, 3])
    emitter.emit("Reshape", [rows, emitter.integers(0, 0, features)], node.outputs[0].name)


def _function(emitter: Emitter, name: str, x: str, output: str | None = None) -> str:
    def number(value: float) -> str:
        return emitter.constant(np.array(value, np.float32))

    if name in ("relu", "sigmoid", "tanh"):
        return emitter.emit(name.capitalize(), [x], output)
    if name == "hard_swish":
        return emitter.emit("HardSwish", [x], output)
    if name == "squared_relu":
        half = emitter.emit("Relu", [x])
        return emitter.emit("Mul", [half, half], output)
    if name in ("silu", "quick_gelu"):
        argument = x if name == "silu" else emitter.emit("Mul", [x, number(1.702)])
        return emitter.emit("Mul", [x, emitter.emit("Sigmoid", [argument])], output)
    if name == "gelu":
        inner = emitter.emit("Erf", [emitter.emit("Mul", [x, number(0.5**0.5)])])
    else:
        cube = emitter.emit("Mul", [emitter.emit("Mul", [x, x]), x])
        cubic = emitter.emit("Add", [x, emitter.emit("Mul", [cube, number(0.044715)])])
        inner = emitter.emit("Tanh", [emitter.emit("Mul", [cubic, number((2 / np.pi) ** 0.5)])])
    factor = emitter.emit("Add", [inner, number(1.0)])
    return emitter.emit("Mul", [emitter.emit("Mul", [x, factor]), number(0.5)], output)


def _pointwise(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    _function(emitter, attrs["function"], names(node)[0], node.outputs[0].name)


def _experts(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x, indices, factors, w1, b1, w2, b2, *third = names(node)
    count = array(node.inputs[3]).shape[0]
    # Every expert on every token, weighted by 0 where it is not chosen.
    last = emitter.integers(-1)
    chosen = emitter.emit("Unsqueeze", [indices, last])
    hits = emitter.emit("Equal", [chosen, emitter.constant(np.arange(count, dtype=np.int64))])
    hits = emitter.emit("Cast", [hits], to=TensorProto.FLOAT)
    weighted = emitter.emit("Mul", [hits, emitter.emit("Unsqueeze", [factors, last])])
    dense = emitter.emit("ReduceSum", [weighted, emitter.integers(-2)], keepdims=0)
    hidden = _function(emitter, attrs["function"], _hidden(emitter, x, w1, b1))
    if third:
        hidden = emitter.emit("Mul", [hidden, _hidden(emitter, x, *third)])
    each = emitter.emit("Einsum", [hidden, w2], equation="bneh,edh->bned")
    each = emitter.emit("Add", [each, b2])
    emitter.emit("Einsum", [each, dense], node.outputs[0].name, equation="bned,bne->bnd")


def _hidden(emitter: Emitter, x: str, weight: str, bias: str) -> str:
    product = emitter.emit("Einsum", [x, weight], equation="bnd,ehd->bneh")
    return emitter.emit("Add", [product, bias])


def _soft_experts(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    x, _, w1, _, w2, _ = names(node)
    slots, biases = array(node.inputs[1]), [array(node.inputs[index]) for index in (3, 5)]
    experts = len(biases[0])
    logits = emitter.emit("MatMul", [x, emitter.constant(np.ascontiguousarray(slots.T))])
    dispatch = emitter.emit("Softmax", [logits], axis=1)
    filled = emitter.emit("Einsum", [dispatch, x], equation="bns,bnd->bsd")
    rows = emitter.emit("Reshape", [filled, emitter.integers(0, experts, -1, slots.shape[1])])
    one, two = (emitter.constant(bias[:, None]) for bias in biases)
    hidden = emitter.emit("Einsum", [rows, w1], equation="besd,ehd->besh")
    hidden = _function(emitter, attrs["function"], emitter.emit("Add", [hidden, one]))
    output = emitter.emit("Einsum", [hidden, w2], equation="besh,edh->besd")
    output = emitter.emit("Add", [output, two])
    results = emitter.emit("Reshape", [output, emitter.integers(0, len(slots), -1)])
    combine = emitter.emit("Softmax", [logits], axis=-1)
    emitter.emit("MatMul", [combine, results], node.outputs[0].name)


def _take_token(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    index = emitter.constant(np.array(attrs["index"], np.int64))
    emitter.emit("Gather", [names(node)[0], index], node.outputs[0].name, axis=1)


def _mean_tokens(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    _mean(emitter, names(node)[0], 1, node.outputs[0].name, keepdims=0)


def _mean(emitter: Emitter, x: str, axis: int, output: str | None = None, *, keepdims: int) -> str:
    if emitter.opset < 18:
        return emitter.emit("ReduceMean", [x], output, axes=[axis], keepdims=keepdims)
    return emitter.emit("ReduceMean", [x, emitter.integers(axis)], output, keepdims=keepdims)


LOWERINGS: dict[str, Lowering] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _elementwise("Add"),
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "Linear": _linear,
    "Join": _join,
    "Rotary": _rotary,
    "Attention": _attention,
    "Pointwise": _pointwise,
    "Multiply": _elementwise("Mul"),
    "Add": _elementwise("Add"),
    "Route": lower_route,
    "Experts": _experts,
    "GatedExperts": _experts,
    "SoftExperts": _soft_experts,
    "TakeToken": _take_token,
    "MeanTokens": _mean_tokens,
}
