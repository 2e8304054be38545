"""What each canonical operator computes, in float32 on PyTorch (see ``canonical``)."""

import math
from collections.abc import Callable

import numpy as np
import torch

__all__ = ["FUNCTIONS", "OPERATORS", "Record", "route"]

Record = Callable[[str, np.ndarray], None]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x).square(),
    "silu": torch.nn.functional.silu,
    "hard_swish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

Outputs = tuple[torch.Tensor, ...]


def _patch_embed(inputs, attrs, name, record) -> Outputs:
    image, weight, bias = inputs
    kernel = weight.reshape(len(bias), attrs["channels"], attrs["ph"], attrs["pw"])
    # A cast of the image to float is part of the operator.
    patches = torch.nn.functional.conv2d(image.float(), kernel, bias, (attrs["ph"], attrs["pw"]))
    return (patches.flatten(2).transpose(1, 2).contiguous(),)


def _class_token(inputs, attrs, name, record) -> Outputs:
    x, token = inputs
    return (torch.cat([token.expand(len(x), 1, -1), x], dim=1),)


def _add(inputs, attrs, name, record) -> Outputs:
    return (inputs[0] + inputs[1],)


def _layer_norm(inputs, attrs, name, record) -> Outputs:
    x, gamma, beta = inputs
    return (torch.nn.functional.layer_norm(x, gamma.shape, gamma, beta, attrs["epsilon"]),)


def _rms_norm(inputs, attrs, name, record) -> Outputs:
    x, gamma = inputs
    parts = x.unflatten(-1, (attrs["groups"], -1))
    root = torch.sqrt(parts.square().mean(-1, keepdim=True) + attrs["epsilon"])
    return ((parts / root).flatten(-2) * gamma,)


def _linear(inputs, attrs, name, record) -> Outputs:
    return (torch.nn.functional.linear(*inputs),)


def _join(inputs, attrs, name, record) -> Outputs:
    a, b, columns = inputs
    return (torch.cat([a, b], -1)[..., columns],)


def _rotary(inputs, attrs, name, record) -> Outputs:
    x, cos, sin = inputs
    first, second = x.unflatten(-1, (attrs["heads"], 2, -1)).unbind(-2)
    cos, sin = cos[:, None], sin[:, None]  # for all heads of a row
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return (turned.flatten(-3),)


def _attention(inputs, attrs, name, record) -> Outputs:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    q, k, v = (
        x.unflatten(-1, (count, -1)).transpose(1, 2)
        for x, count in zip(inputs, (heads, kv_heads, kv_heads))
    )
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q * attrs["scale"]) @ k.transpose(-1, -2)
    record(f"{name}/scores", scores.detach().numpy())
    if attrs["causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -math.inf)
    return ((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2),)


def _pointwise(inputs, attrs, name, record) -> Outputs:
    return (FUNCTIONS[attrs["function"]](inputs[0]),)


def _multiply(inputs, attrs, name, record) -> Outputs:
    return (inputs[0] * inputs[1],)


def _route(inputs, attrs, name, record) -> Outputs:
    *layer, correction = inputs
    logits = torch.nn.functional.linear(*layer)
    record(f"{name}/logits", logits.detach().numpy())
    return route(logits, correction, attrs)


def route(logits: torch.Tensor, correction: torch.Tensor, attrs: dict) -> Outputs:
    """Indices int64 and weights, [..., k], of logits [..., E] by the attributes of ``Route``."""
    if attrs["score"] == "sparse":
        return _one_after_another(logits, attrs["k"], attrs["threshold"])
    sigmoid, pair = attrs["score"] == "sigmoid", attrs["group_score"] == "pair"
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    # Scores rise with the logits, but saturate: logits are compared where nothing is added.
    compared = scores + correction if pair or correction.any() else logits
    if attrs["groups"] > 1:
        groups = compared.unflatten(-1, (attrs["groups"], -1))
        best = groups.topk(1 + pair, -1).values.sum(-1)
        seen = torch.zeros_like(best, dtype=torch.bool)
        seen.scatter_(-1, _largest(best, attrs["chosen_groups"]), True)
        compared = groups.masked_fill(~seen.unsqueeze(-1), -math.inf).flatten(-2)
    indices = _largest(compared, attrs["k"])
    weights = scores.gather(-1, indices)
    if attrs["normalise"] == "chosen":
        total = weights.sum(-1, keepdim=True)
        weights = weights / total if sigmoid else torch.softmax(logits.gather(-1, indices), -1)
    return indices, weights


def _one_after_another(logits: torch.Tensor, k: int, threshold: float) -> Outputs:
    """``route`` of score "sparse"."""
    indices, left, weights = _largest(logits, k), logits, []
    for each in indices.split(1, -1):
        largest = left.gather(-1, each)
        far = (largest - logits) / logits.abs().maximum(largest) > threshold
        weights.append(torch.softmax(left.masked_fill(far, -math.inf), -1).gather(-1, each))
        left = left.scatter(-1, each, -math.inf)
    return indices, torch.cat(weights, -1)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest; a stable sort breaks ties to the lower one, topk promises no order."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return order[..., :count].contiguous()


def _experts(inputs, attrs, name, record) -> Outputs:
    x, indices, weights, w1, b1, w2, b2, *third = inputs
    rows, result = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    for expert in range(len(w1)):
        chosen, slots = (indices.flatten(0, 1) == expert).nonzero(as_tuple=True)
        if not len(chosen):
            continue
        hidden = torch.nn.functional.linear(rows[chosen], w1[expert], b1[expert])
        activation = FUNCTIONS[attrs["function"]](hidden)
        parts = [("rows", chosen), ("hidden", hidden), ("activation", activation)]
        if third:
            w3, b3 = third
            factor = torch.nn.functional.linear(rows[chosen], w3[expert], b3[expert])
            activation = activation * factor
            parts += [("factor", factor), ("product", activation)]
        output = torch.nn.functional.linear(activation, w2[expert], b2[expert])
        result.index_add_(0, chosen, output * weights.flatten(0, 1)[chosen, slots][:, None])
        for part, array in (*parts, ("output", output)):
            record(f"{name}/expert{expert}/{part}", array.detach().numpy())
    return (result.reshape(x.shape),)


def _soft_experts(inputs, attrs, name, record) -> Outputs:
    x, slots, w1, b1, w2, b2 = inputs
    logits = x @ slots.T
    filled = torch.softmax(logits, 1).transpose(1, 2) @ x
    rows = filled.unflatten(1, (len(w1), -1)).transpose(1, 2)  # [B, slots of an expert, E, D]
    hidden = torch.einsum("bsed,ehd->bseh", rows, w1) + b1
    activation = FUNCTIONS[attrs["function"]](hidden)
    output = torch.einsum("bseh,edh->bsed", activation, w2) + b2
    results = output.transpose(1, 2).flatten(1, 2)
    record(f"{name}/filled", filled.detach().numpy())
    record(f"{name}/hidden", hidden.transpose(1, 2).flatten(1, 2).detach().numpy())
    record(f"{name}/activation", activation.transpose(1, 2).flatten(1, 2).detach().numpy())
    record(f"{name}/results", results.detach().numpy())
    return (torch.softmax(logits, -1) @ results,)


def _take_token(inputs, attrs, name, record) -> Outputs:
    return (inputs[0][:, attrs["index"]].contiguous(),)


def _mean_tokens(inputs, attrs, name, record) -> Outputs:
    return (inputs[0].mean(1),)


OPERATORS: dict[str, Callable[..., Outputs]] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _add,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "Linear": _linear,
    "Join": _join,
    "Rotary": _rotary,
    "Attention": _attention,
    "Pointwise": _pointwise,
    "Multiply": _multiply,
    "Add": _add,
    "Route": _route,
    "Experts": _experts,
    "GatedExperts": _experts,
    "SoftExperts": _soft_experts,
    "TakeToken": _take_token,
    "MeanTokens": _mean_tokens,
}
