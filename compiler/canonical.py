"""The canonical operators: what the front end produces and the later stages read.

Domain ``moeware``. ``x`` is ``[batch, tokens, features]`` (or ``[batch, features]`` after a token
was taken) in float32; weights are initializers in ``[out, in]`` order; shapes in the graph are
those of one frame (batch 1), and every operator treats the batch as independent frames.

============  ======================================  ==================================
operator      inputs                                  attributes
============  ======================================  ==================================
PatchEmbed    image, weight[D, C*ph*pw], bias[D]      ph, pw, channels, height, width
ClassToken    x, token[D]                             (prepends one row)
AddConstant   x, constant[N, D]
LayerNorm     x, gamma[D], beta[D]                    epsilon
Linear        x, weight[N, K], bias[N]
Attention     q, k, v  ([B, N, heads*dim])            heads, kv_heads, scale, causal
Pointwise     x                                       function (see ``FUNCTIONS``)
Add           a, b
Route         x, weight[E, D], bias[E]                k, normalise ("chosen" or "all")
Experts       x, indices[B, N, k], weights[B, N, k],  function
              w1[E, H, D], b1[E, H],
              w2[E, D, H], b2[E, D]
TakeToken     x                                       index
MeanTokens    x
============  ======================================  ==================================

``PatchEmbed`` orders patches row-major and the features of a patch (channel, y, x).
``Attention`` shares key head ``h * kv_heads // heads`` with query head ``h``.
``Route`` returns ``(indices int64, weights)``: the k largest of ``softmax(Wx + b)``, ties to the
lower index; "chosen" divides the weights by their sum (equal to softmax over the chosen logits).
``Experts`` is ``sum over the chosen of weight * (W2 f(W1 x + b1) + b2)``.

Every canonical node carries the metadata ``sources``: the names of the nodes that it replaces.
"""

import json
import math
from collections.abc import Callable

import onnx_ir as ir

from moeware.compiler.errors import CompileError

DOMAIN = "moeware"
FUNCTIONS = ("gelu", "gelu_tanh", "relu", "silu", "sigmoid", "tanh")
NORMALISATIONS = ("chosen", "all")

# Operator: (number of inputs, index of the first weight, attributes).
_SIGNATURES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "PatchEmbed": (3, 1, ("ph", "pw", "channels", "height", "width")),
    "ClassToken": (2, 1, ()),
    "AddConstant": (2, 1, ()),
    "LayerNorm": (3, 1, ("epsilon",)),
    "Linear": (3, 1, ()),
    "Attention": (3, 3, ("heads", "kv_heads", "scale", "causal")),
    "Pointwise": (1, 1, ("function",)),
    "Add": (2, 2, ()),
    "Route": (3, 1, ("k", "normalise")),
    "Experts": (7, 3, ("function",)),
    "TakeToken": (1, 1, ("index",)),
    "MeanTokens": (1, 1, ()),
}
OPERATORS = tuple(_SIGNATURES)

Shapes = list[tuple[int, ...]]


def is_canonical(node: ir.Node) -> bool:
    """Whether ``node`` is an operator of the canonical domain."""
    return node.domain == DOMAIN


def attributes(node: ir.Node) -> dict[str, int | float | str]:
    """The attributes of ``node`` as Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def sources(node: ir.Node) -> list[str]:
    """Names of the nodes of the original model that ``node`` stands for."""
    return json.loads(node.metadata_props["sources"]) if is_canonical(node) else [str(node.name)]


def shape(value: ir.Value) -> tuple[int, ...]:
    """Static shape of ``value``; raises ``CompileError`` where it has none."""
    if value.shape is None or not value.shape.is_static():
        raise CompileError(
            f"Shape of {value.name!r} must be static, not {value.shape}; "
            f"export without data-dependent shapes"
        )
    return tuple(int(size) for size in value.shape)


def verify(model: ir.Model) -> None:
    """Check every canonical node; raises ``CompileError`` naming the node and the rule."""
    seen: set[str] = set()
    for node in model.graph:
        name = str(node.name)
        if name in seen:
            raise CompileError(f"Node name must be unique, not {name!r} twice; run fuse again")
        seen.add(name)
        if is_canonical(node):
            _verify_node(node)


def _verify_node(node: ir.Node) -> None:
    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must satisfy: {rule}, not inputs "
                f"{[value and value.shape for value in node.inputs]} and attributes "
                f"{attributes(node)}; this is a fault of the stage before"
            )

    require(node.op_type in _SIGNATURES, f"operator is one of {', '.join(OPERATORS)}")
    arity, first_weight, names = _SIGNATURES[node.op_type]
    require(len(node.inputs) == arity and None not in node.inputs, f"{arity} inputs")
    require(set(node.attributes) == set(names), f"attributes are {names}")
    require("sources" in node.metadata_props, "metadata has sources")
    for value in node.inputs[first_weight:]:
        require(value is not None and value.const_value is not None, "weights are initializers")
    shapes = [shape(value) for value in node.inputs if value is not None]
    outputs = [shape(value) for value in node.outputs]
    _RULES[node.op_type](shapes, outputs, attributes(node), require)


Require = Callable[[bool, str], None]


def _patch_embed(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    height, width, ph, pw = (attrs[name] for name in ("height", "width", "ph", "pw"))
    require(inputs[0] == (1, attrs["channels"], height, width), "image is [1, C, H, W]")
    require(height % ph == 0 and width % pw == 0, "patches divide the image")
    features = attrs["channels"] * ph * pw
    require(inputs[1] == (inputs[2][0], features), "weight is [D, C*ph*pw], bias [D]")
    tokens = (height // ph) * (width // pw)
    require(outputs[0] == (1, tokens, inputs[2][0]), "output is [1, N, D]")


def _class_token(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    _, tokens, features = inputs[0]
    require(inputs[1] == (features,), "token is [D]")
    require(outputs[0] == (1, tokens + 1, features), "output has one row more")


def _add_constant(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) == 3 and inputs[1] == inputs[0][1:], "constant is [N, D]")
    require(outputs[0] == inputs[0], "output has the shape of x")


def _layer_norm(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(inputs[1] == inputs[2] == inputs[0][-1:], "gamma and beta are [D]")
    require(outputs[0] == inputs[0], "output has the shape of x")
    require(attrs["epsilon"] > 0, "epsilon is positive")


def _linear(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) in (2, 3), "x has 2 or 3 axes")
    require(inputs[1] == (inputs[2][0], inputs[0][-1]), "weight is [N, K], bias [N]")
    require(outputs[0] == (*inputs[0][:-1], inputs[2][0]), "output is [B, tokens, N]")


def _attention(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    require(heads % kv_heads == 0, "kv_heads divides heads")
    require(inputs[0][-1] % heads == 0, "heads divides the features of q")
    require(inputs[1][-1] * heads == inputs[0][-1] * kv_heads, "q and k have heads of one size")
    require(inputs[1] == inputs[2], "k and v have one shape")
    require(outputs[0] == inputs[0], "output has the shape of q")
    require(attrs["causal"] in (0, 1), "causal is 0 or 1")


def _pointwise(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(attrs["function"] in FUNCTIONS, f"function is one of {FUNCTIONS}")
    require(outputs[0] == inputs[0], "output has the shape of x")


def _add(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(inputs[0] == inputs[1] == outputs[0], "both operands and the output have one shape")


def _route(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    experts = inputs[1][0]
    require(inputs[1] == (experts, inputs[0][-1]), "weight is [E, D]")
    require(inputs[2] == (experts,), "bias is [E]")
    require(1 <= attrs["k"] <= experts, "k is between 1 and E")
    require(attrs["normalise"] in NORMALISATIONS, f"normalise is one of {NORMALISATIONS}")
    require(outputs == [(*inputs[0][:2], attrs["k"])] * 2, "indices and weights are [B, N, k]")


def _experts(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    x, indices, weights, w1, b1, w2, b2 = inputs
    experts, hidden, features = w1
    require(features == x[-1], "w1 is [E, H, D]")
    require(b1 == (experts, hidden) and b2 == (experts, features), "b1 is [E, H], b2 [E, D]")
    require(w2 == (experts, features, hidden), "w2 is [E, D, H]")
    require(indices == weights and indices[:-1] == x[:-1], "indices and weights are [B, N, k]")
    require(outputs[0] == x, "output has the shape of x")
    require(attrs["function"] in FUNCTIONS, f"function is one of {FUNCTIONS}")


def _take_token(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) == 3 and 0 <= attrs["index"] < inputs[0][1], "index is a row of x")
    require(outputs[0] == (1, inputs[0][2]), "output is [B, D]")


def _mean_tokens(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) == 3, "x is [B, N, D]")
    require(outputs[0] == (1, inputs[0][2]), "output is [B, D]")


_RULES: dict[str, Callable[[Shapes, Shapes, dict, Require], None]] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _add_constant,
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


def macs(node: ir.Node) -> int:
    """Multiply-accumulates of ``node`` for one frame; 0 for operators without products."""
    shapes = [shape(value) if _is_static(value) else () for value in node.inputs]
    outputs = [shape(value) if _is_static(value) else () for value in node.outputs]
    if is_canonical(node):
        if node.op_type in ("PatchEmbed", "Linear"):
            return math.prod(outputs[0]) * shapes[1][1]
        if node.op_type == "Route":
            return math.prod(shapes[0]) * shapes[1][0]
        if node.op_type == "Experts":
            return math.prod(shapes[1]) * 2 * math.prod(shapes[3][1:])
        if node.op_type == "Attention":
            return 2 * math.prod(shapes[0]) * shapes[1][-2]
        return 0
    if node.op_type == "MatMul" and shapes[0]:
        return math.prod(outputs[0]) * shapes[0][-1]
    if node.op_type == "Gemm" and shapes[1]:
        return math.prod(shapes[1]) * outputs[0][0] if outputs[0] else 0
    if node.op_type == "Conv" and shapes[1]:
        return math.prod(outputs[0]) * math.prod(shapes[1][1:])
    if node.op_type == "Einsum" and "..." not in node.attributes["equation"].value:
        return _einsum_macs(node, shapes)
    if node.op_type in ("MoE", "QMoE") and shapes[0] and shapes[2]:
        return _contrib_macs(node, shapes)
    return 0


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.is_static()


def _einsum_macs(node: ir.Node, shapes: Shapes) -> int:
    terms = node.attributes["equation"].value.replace(" ", "").split("->")[0].split(",")
    sizes = {label: size for term, dims in zip(terms, shapes) for label, size in zip(term, dims)}
    return math.prod(sizes.values())


def _contrib_macs(node: ir.Node, shapes: Shapes) -> int:
    """Of a mixture of experts in ONNX Runtime's domain; packed weights tell only their rows."""
    hidden = shapes[2][1]
    columns = hidden // 2 if "swiglu_fusion" in node.attributes else hidden
    k = node.attributes["k"].value if "k" in node.attributes else 1
    return math.prod(shapes[0]) * k * (hidden + columns)
