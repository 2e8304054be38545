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
RMSNorm       x, gamma[D]                             epsilon, groups
Linear        x, weight[N, K], bias[N]
Join          a, b, columns[N]
Rotary        x, cos[N, dim/2], sin[N, dim/2]         heads
Attention     q, k, v  ([B, N, heads*dim])            heads, kv_heads, scale, causal
Pointwise     x                                       function (see ``FUNCTIONS``)
Multiply      a, b
Add           a, b
Route         x, weight[E, D], bias[E],               k, score ("softmax", "sigmoid" or
              correction[E]                           "sparse"), normalise ("chosen" or "all"),
                                                      groups, chosen_groups,
                                                      group_score ("max" or "pair"),
                                                      threshold
Experts       x, indices[B, N, k], weights[B, N, k],  function
              w1[E, H, D], b1[E, H],
              w2[E, D, H], b2[E, D]
GatedExperts  as Experts, then w3[E, H, D], b3[E, H]  function
SoftExperts   x, slots[S, D], w1[E, H, D], b1[E, H],  function
              w2[E, D, H], b2[E, D]
TakeToken     x                                       index
MeanTokens    x
============  ======================================  ==================================

``PatchEmbed`` orders patches row-major and the features of a patch (channel, y, x).
``RMSNorm`` divides each of ``groups`` equal parts of a row by the root of its mean square (plus
epsilon), then multiplies by gamma.
``Join`` takes channels of a and b, side by side, in the order that ``columns`` (int64) names them
in, some several times: heads that are put together of two Linears (multi-head latent attention:
DeepSeek-AI 2024, DeepSeek-V2, section 2.1).
``Rotary`` turns channels c and c + dim/2 of each head, a pair, by the angle of row and pair:
``(a, b) -> (a cos - b sin, b cos + a sin)``. Rows of weights are permuted where a model pairs
channels otherwise.
``Attention`` shares key head ``h * kv_heads // heads`` with query head ``h``; heads of values, and of
the result, may have another size than those of queries and keys.
``Route`` returns ``(indices int64, weights)``: the k experts whose score, of ``Wx + b``, plus
correction is largest, ties to the lower index, and their scores without it; "chosen" divides these
by their sum (for softmax equal to softmax over the chosen logits). Where there are several
``groups`` of experts that follow one another, only those of the ``chosen_groups`` best are chosen
from; a group is as good as its largest corrected score or, for "pair", the sum of its two largest
(DeepSeek-V2, section 2.2.2; DeepSeek-V3, section 2.1.2). A constant factor of the weights belongs
into the experts' second layer. "sparse" chooses one expert after another by ``Wx + b`` alone: the
largest of those left, weighted by the softmax over those of them that are near it, ``(largest - s) /
max(|s|, largest) <= threshold``, where 0 / 0 is near (SparseMixer-v2 as Phi-3.5-MoE runs it: Liu et
al. 2024, GRIN). Its threshold is below 2, which nothing exceeds; others have 0.
``Experts`` is ``sum over the chosen of weight * (W2 f(W1 x + b1) + b2)``; ``GatedExperts`` has
``f(W1 x + b1) * (W3 x + b3)`` in place of ``f(W1 x + b1)``, as a gated feed-forward network has by
``Multiply`` (GLU: Shazeer 2020, section 2).

``SoftExperts`` (Soft MoE: Puigcerver et al. 2024, section 2.1) fills each slot with the tokens,
weighted by the softmax over tokens of ``slots x``, gives expert e the slots from ``e S / E`` on, and
makes of their results each token's, weighted by the softmax over slots.

Every node that the front end makes, canonical or layout around it, carries the metadata
``sources``: the names of the nodes that it replaces.
"""

import json

import onnx_ir as ir

from moeware.compiler.canonical_rules import FUNCTIONS, NORMALISATIONS, RULES
from moeware.compiler.errors import CompileError

__all__ = [
    "DOMAIN",
    "FUNCTIONS",
    "NORMALISATIONS",
    "OPERATORS",
    "PLAIN_ROUTE",
    "REASON",
    "ROUTED",
    "attributes",
    "is_canonical",
    "projection",
    "shape",
    "sources",
    "verify",
]

DOMAIN = "moeware"
# Attributes of a Route that compares softmax scores alone, beside k and normalise.
PLAIN_ROUTE = {"score": "softmax", "groups": 1, "chosen_groups": 1, "group_score": "max",
               "threshold": 0.0}
REASON = "moeware.reason"  # metadata of a plain node: why it has no canonical form, and a remedy
# Operator: (number of inputs, index of the first weight, attributes).
_SIGNATURES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "PatchEmbed": (3, 1, ("ph", "pw", "channels", "height", "width")),
    "ClassToken": (2, 1, ()),
    "AddConstant": (2, 1, ()),
    "LayerNorm": (3, 1, ("epsilon",)),
    "RMSNorm": (2, 1, ("epsilon", "groups")),
    "Linear": (3, 1, ()),
    "Join": (3, 2, ()),
    "Rotary": (3, 1, ("heads",)),
    "Attention": (3, 3, ("heads", "kv_heads", "scale", "causal")),
    "Pointwise": (1, 1, ("function",)),
    "Multiply": (2, 2, ()),
    "Add": (2, 2, ()),
    "Route": (4, 1, ("k", "score", "normalise", "groups", "chosen_groups", "group_score",
                     "threshold")),
    "Experts": (7, 3, ("function",)),
    "GatedExperts": (9, 3, ("function",)),
    "SoftExperts": (6, 1, ("function",)),
    "TakeToken": (1, 1, ("index",)),
    "MeanTokens": (1, 1, ()),
}
OPERATORS = tuple(_SIGNATURES)
ROUTED = ("Experts", "GatedExperts")  # that read a Route


def is_canonical(node: ir.Node) -> bool:
    """Whether ``node`` is an operator of the canonical domain."""
    return node.domain == DOMAIN


def attributes(node: ir.Node) -> dict[str, int | float | str]:
    """The attributes of ``node`` as Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def sources(node: ir.Node) -> list[str]:
    """Names of the nodes of the original model that ``node`` stands for."""
    if "sources" in node.metadata_props:
        return json.loads(node.metadata_props["sources"])
    return [str(node.name)]


def shape(value: ir.Value) -> tuple[int, ...]:
    """Static shape of ``value``; raises ``CompileError`` where it has none."""
    if value.shape is None or not value.shape.is_static():
        raise CompileError(
            f"Shape of {value.name!r} must be static, not {value.shape}; "
            f"export without data-dependent shapes"
        )
    return tuple(int(size) for size in value.shape)


def projection(value: ir.Value) -> tuple[ir.Node | None, ir.Node | None, ir.Node | None]:
    """The Linear or Join, the RMSNorm and the Rotary that make ``value`` one after the other, as
    attention reads it; None for each that is not there."""
    found: list[ir.Node | None] = []
    for kinds in (("Rotary",), ("RMSNorm",), ("Linear", "Join")):
        node = value.producer()
        found.insert(0, node if node is not None and node.op_type in kinds else None)
        if found[0] is not None and found[0].inputs[0] is not None:
            value = found[0].inputs[0]
    return found[0], found[1], found[2]


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
    RULES[node.op_type](shapes, outputs, attributes(node), require)
