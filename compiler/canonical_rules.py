"""What the shapes and attributes of each canonical operator must be (see ``canonical``)."""

from collections.abc import Callable

FUNCTIONS = (
    "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu", "silu", "hard_swish", "sigmoid", "tanh",
)  # fmt: skip
SCORES = ("softmax", "sigmoid", "sparse")
NORMALISATIONS = ("chosen", "all")
GROUP_SCORES = ("max", "pair")

Shapes = list[tuple[int, ...]]
# Raises, naming the rule, where the condition does not hold.
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


def _rms_norm(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(inputs[1] == inputs[0][-1:], "gamma is [D]")
    require(outputs[0] == inputs[0], "output has the shape of x")
    require(attrs["epsilon"] > 0, "epsilon is positive")
    require(attrs["groups"] > 0 and inputs[0][-1] % attrs["groups"] == 0, "groups divides D")


def _linear(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) in (2, 3), "x has 2 or 3 axes")
    require(inputs[1] == (inputs[2][0], inputs[0][-1]), "weight is [N, K], bias [N]")
    require(outputs[0] == (*inputs[0][:-1], inputs[2][0]), "output is [B, tokens, N]")


def _join(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    a, b, columns = inputs
    require(len(a) == 3 and a[:-1] == b[:-1], "a and b have the same rows")
    require(outputs[0] == (*a[:-1], *columns), "output is [B, N, number of columns]")


def _rotary(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    (_, tokens, features), cos, sin = inputs
    require(attrs["heads"] > 0 and features % (2 * attrs["heads"]) == 0, "a head has pairs")
    require(cos == sin == (tokens, features // attrs["heads"] // 2), "cos and sin are [N, dim/2]")
    require(outputs[0] == inputs[0], "output has the shape of x")


def _attention(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    require(heads % kv_heads == 0, "kv_heads divides heads")
    require(inputs[0][-1] % heads == 0, "heads divides the features of q")
    require(inputs[1][-1] * heads == inputs[0][-1] * kv_heads, "q and k have heads of one size")
    require(inputs[1][:-1] == inputs[2][:-1], "k and v have the same rows")
    require(inputs[2][-1] % kv_heads == 0, "kv_heads divides the features of v")
    require(outputs[0] == (*inputs[0][:-1], inputs[2][-1] // kv_heads * heads),
            "output has the rows of q and heads of the size of v's")
    require(attrs["causal"] in (0, 1), "causal is 0 or 1")


def _pointwise(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(attrs["function"] in FUNCTIONS, f"function is one of {FUNCTIONS}")
    require(outputs[0] == inputs[0], "output has the shape of x")


def _elementwise(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(inputs[0] == inputs[1] == outputs[0], "both operands and the output have one shape")


def _route(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    experts = inputs[1][0]
    require(inputs[1] == (experts, inputs[0][-1]), "weight is [E, D]")
    require(inputs[2] == (experts,), "bias is [E]")
    require(inputs[3] == (experts,), "correction is [E]")
    groups, chosen_groups = attrs["groups"], attrs["chosen_groups"]
    require(groups >= 1 and experts % groups == 0, "groups divides E")
    require(1 <= chosen_groups <= groups, "chosen_groups is between 1 and groups")
    size = experts // groups
    require(1 <= attrs["k"] <= chosen_groups * size, "k is between 1 and the experts of the groups")
    require(attrs["score"] in SCORES, f"score is one of {SCORES}")
    require(attrs["normalise"] in NORMALISATIONS, f"normalise is one of {NORMALISATIONS}")
    require(attrs["group_score"] in GROUP_SCORES, f"group_score is one of {GROUP_SCORES}")
    require(attrs["group_score"] != "pair" or size > 1, "a group of which a pair counts has two")
    sparse = attrs["score"] == "sparse"
    require(not sparse or groups == 1 and attrs["group_score"] == "max", "sparse has no groups")
    require(not sparse or attrs["normalise"] == "all", "sparse normalises all")
    require(0 <= attrs["threshold"] < 2, "threshold is at least 0 and below 2")
    require(sparse or attrs["threshold"] == 0, "threshold is 0 unless score is sparse")
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


def _gated_experts(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    _experts(inputs[:7], outputs, attrs, require)
    require(inputs[7:] == inputs[3:5], "w3 and b3 have the shapes of w1 and b1")


def _soft_experts(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    x, slots, w1, b1, w2, b2 = inputs
    experts, hidden, features = w1
    require(slots[1] == features == x[-1], "slots is [S, D], w1 [E, H, D]")
    require(slots[0] % experts == 0, "E divides S")
    require(b1 == (experts, hidden) and b2 == (experts, features), "b1 is [E, H], b2 [E, D]")
    require(w2 == (experts, features, hidden), "w2 is [E, D, H]")
    require(outputs[0] == x, "output has the shape of x")
    require(attrs["function"] in FUNCTIONS, f"function is one of {FUNCTIONS}")


def _take_token(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) == 3 and 0 <= attrs["index"] < inputs[0][1], "index is a row of x")
    require(outputs[0] == (1, inputs[0][2]), "output is [B, D]")


def _mean_tokens(inputs: Shapes, outputs: Shapes, attrs: dict, require: Require) -> None:
    require(len(inputs[0]) == 3, "x is [B, N, D]")
    require(outputs[0] == (1, inputs[0][2]), "output is [B, D]")


RULES: dict[str, Callable[[Shapes, Shapes, dict, Require], None]] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _add_constant,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "Linear": _linear,
    "Join": _join,
    "Rotary": _rotary,
    "Attention": _attention,
    "Pointwise": _pointwise,
    "Multiply": _elementwise,
    "Add": _elementwise,
    "Route": _route,
    "Experts": _experts,
    "GatedExperts": _gated_experts,
    "SoftExperts": _soft_experts,
    "TakeToken": _take_token,
    "MeanTokens": _mean_tokens,
}
