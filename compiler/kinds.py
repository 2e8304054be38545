"""What a value is to the accelerator, and which operators can read it.

The accelerator runs pre-norm residual networks. A value of that form has a *kind*; the table ``READS``
says which kinds each operator reads, and `rule_broken` what else its operands must be.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import ROUTED, attributes, is_canonical, projection
from moeware.hw.arch.numerics import GATE_BITS
from moeware.hw.arch.routing import CORRECTION_BITS

__all__ = ["MAY_FOLLOW", "READS", "STREAMS", "Kind", "result", "rule_broken"]


@dataclass(frozen=True)
class Kind:
    """What a value is to the accelerator, and the residual stream that it is computed from."""

    name: str
    stream: int = -1


# Operator: kinds that its first input may have, and the kind of its result.
READS: dict[str, tuple[tuple[str, ...], str]] = {
    "PatchEmbed": (("image",), "start"),
    "ClassToken": (("start",), "start"),
    "AddConstant": (("start",), "start"),
    "LayerNorm": (("start", "stream", "row"), "norm"),
    "RMSNorm": (("start", "stream", "row", "linear"), "norm"),
    "Linear": (
        ("norm", "norm row", "attention", "function", "product", "normalised linear"), "linear"
    ),
    "Pointwise": (("linear",), "function"),
    "Multiply": (("linear", "function"), "product"),
    "Join": (("linear",), "joined linear"),
    "Rotary": (("linear", "joined linear", "normalised linear"), "turned"),
    "Attention": (("linear", "normalised linear", "turned"), "attention"),
    "Route": (("norm",), "route"),
    "Experts": (("norm",), "experts"),
    "GatedExperts": (("norm",), "experts"),
    "SoftExperts": (("norm",), "experts"),
    "MeanTokens": (("norm",), "norm row"),
    "TakeToken": (("start", "stream", "norm"), "row"),
    "Add": (("start", "stream", "linear", "experts"), "stream"),
}
STREAMS = ("start", "stream")
MAY_FOLLOW = {
    "norm": (
        "Linear", "Route", *ROUTED, "SoftExperts", "MeanTokens", "TakeToken"
    ),
    "norm row": ("Linear",),
    "row": ("LayerNorm", "RMSNorm"),
    "linear": ("Pointwise", "Multiply", "RMSNorm", "Join", "Rotary", "Attention", "Add"),
    "joined linear": ("Rotary",),
    "normalised linear": ("Linear", "Rotary", "Attention"),
    "turned": ("Attention",),
    "function": ("Linear", "Multiply"),
    "product": ("Linear",),
    "attention": ("Linear",),
    "route": ROUTED,
    "experts": ("Add",),
}


def rule_broken(node: ir.Node, kinds: dict[ir.Value, Kind]) -> str | None:
    """Why canonical ``node`` cannot read operands of these kinds: "rule; remedy"."""
    variable = [value for value in node.inputs if value is not None and value in kinds]
    given = [kinds[value] for value in variable]
    given_names = [kind.name for kind in given]
    allowed, _ = READS[node.op_type]
    if node.op_type == "Add":
        return _add_broken(variable, given)
    first = given[0].name if given else "constant"
    if first not in allowed:
        turned = node.op_type == "RMSNorm" and first == "turned"
        remedy = "normalise heads before they are turned" if turned else "use pre-norm residual blocks"
        return (
            f"{node.op_type} of {'an' if first[0] in 'aeiou' else 'a'} {first} value is not a "
            f"supported form, it reads {' or '.join(allowed)}; {remedy}"
        )
    alone = _read_once(variable[0])
    if node.op_type in ("ClassToken", "AddConstant") and not alone:
        return (
            f"{node.op_type} must be the only reader of the embedding that it completes; let all "
            f"others read its result"
        )
    if node.op_type in ("RMSNorm", "Rotary") and first not in (*STREAMS, "row"):
        if not alone:
            return f"a projection before {node.op_type} must have no other reader; remove it"
    elif node.op_type == "RMSNorm" and attributes(node)["groups"] != 1:
        return "RMSNorm of the residual stream must have 1 group; normalise whole rows"
    if node.op_type == "Linear" and first == "normalised linear":
        return _latent_broken(variable[0])
    if node.op_type == "Join":
        return _join_broken(variable, given)
    if node.op_type == "Attention":
        return _attention_broken(node, given)
    if node.op_type in ROUTED and given_names[1:] != ["route", "route"]:
        return f"{node.op_type} must read a Route; use softmax and top-k over a linear gate"
    if node.op_type == "Multiply":
        return _multiply_broken(node, given_names)
    return _route_broken(node) if node.op_type == "Route" else None


def _route_broken(node: ir.Node) -> str | None:
    found, correction = attributes(node), node.inputs[3].const_value.numpy()
    if found["score"] == "sparse":
        return None
    if found["score"] == "softmax" and (correction.any() or found["group_score"] == "pair"):
        return (
            "Route by softmax probabilities that are corrected, or of which two are summed, is not a "
            "supported form; correct sigmoid scores, or compare groups by their largest"
        )
    if found["order"] == "priority":
        return (
            "Route that gives tokens with large weights a place first (batch priority) is not a "
            "supported form, as tokens come in order; drop those that come last"
        )
    if found["normalise"] == "kept":
        return (
            "Route that divides weights by the sum of those that are not dropped is not a supported "
            "form, as weights are known before places; divide by the sum of the chosen"
        )
    spread, limit = np.ptp(correction.astype(np.float64)), 1 << CORRECTION_BITS - GATE_BITS
    if not spread < limit - 1:
        return f"corrections of Route must spread over less than {limit - 1}, not {spread:g}; clip them"
    return None


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _latent_broken(value: ir.Value) -> str | None:
    """What a Linear reads of a normalised Linear: its whole rows, as other Linears do."""
    norm = value.producer()
    if norm is not None and attributes(norm)["groups"] != 1:
        return "RMSNorm between two Linears must have 1 group; normalise whole rows"
    if any(user.op_type != "Linear" for user in value.consumers()):
        return "RMSNorm between two Linears must have no reader but Linears; repeat it"
    return None


def _join_broken(variable: list[ir.Value], given: list[Kind]) -> str | None:
    if [kind.name for kind in given] != ["linear", "linear"]:
        return (
            f"Join of {given[0].name} and {given[-1].name} is not a supported form, it joins heads of "
            f"two Linears; project both parts"
        )
    if given[0].stream != given[1].stream:
        return "Join must read one stream, not cross-attend; move it to the host model"
    if not all(map(_read_once, variable)):
        return "a projection before Join must have no other reader; remove it"
    return None


def _multiply_broken(node: ir.Node, given_names: list[str]) -> str | None:
    if given_names not in (["function", "linear"], ["linear", "function"], ["linear", "linear"]):
        return (
            f"Multiply of {given_names[0]} and {given_names[-1]} is not a supported form, it joins "
            f"a Linear with a Linear or a function of one; write a gated linear unit"
        )
    operands = list(dict.fromkeys(node.inputs))
    layers = []
    for value in operands:
        producer = value.producer()
        if producer.op_type == "Pointwise":
            operands.append(producer.inputs[0])
        else:
            layers.append(producer)
    if len(layers) != 2 or any(len(v.uses()) != 1 or v.is_graph_output() for v in operands):
        return "the factors of Multiply must be two Linears without other readers; repeat the Linear"
    if layers[0].inputs[0] is not layers[1].inputs[0]:
        return "the factors of Multiply must be Linears of one value; write a gated linear unit"
    return None


def _attention_broken(node: ir.Node, given: list[Kind]) -> str | None:
    """What attention reads: projections of one stream, normalised and turned as their heads are."""
    kinds, attrs = [kind.name for kind in given], attributes(node)
    if len(kinds) != 3 or not set(kinds) <= set(READS["Attention"][0]):
        return "Attention must read three Linears; project queries, keys and values"
    if len({kind.stream for kind in given}) != 1:
        return "Attention must read one stream, not cross-attend; move it to the host model"
    if [kind == "turned" for kind in kinds] not in ([True, True, False], [False, False, False]):
        return (
            "Attention must have rotary queries and keys, or neither, and no rotary values; turn "
            "both, or none"
        )
    for value, heads in zip(node.inputs, (attrs["heads"], attrs["kv_heads"], attrs["kv_heads"])):
        _, norm, rotary = projection(value)
        if rotary is not None and attributes(rotary)["heads"] != heads:
            return f"Attention of {heads} heads must have Rotary of as many; turn whole heads"
        if norm is not None and attributes(norm)["groups"] not in (1, heads):
            return (
                f"RMSNorm before Attention must have 1 or {heads} groups, a head each; normalise "
                f"heads or whole rows"
            )
    return None


def _add_broken(variable: list[ir.Value], given: list[Kind]) -> str | None:
    streams = [kind for kind in given if kind.name in STREAMS]
    branches = [kind for kind in given if kind.name in ("linear", "experts")]
    if len(streams) != 1 or len(branches) != 1:
        return (
            f"Add of {given[0].name} and {given[-1].name} is not a supported form, it joins the "
            f"residual stream with a Linear or Experts; use pre-norm residual blocks"
        )
    if streams[0].stream != branches[0].stream:
        return "Add must join the stream that its branch reads; remove the long skip connection"
    branch = variable[given.index(branches[0])]
    if len(branch.uses()) != 1 or branch.is_graph_output():
        return "the branch of a residual Add must have no other reader; remove the other reader"
    stream = variable[given.index(streams[0])]
    joins = [node for node in stream.consumers() if is_canonical(node) and node.op_type == "Add"]
    if len(joins) > 1:
        return "the residual stream must not fork into two Adds; remove the long skip connection"
    return None


def result(node: ir.Node, kinds: dict[ir.Value, Kind], number: int) -> Kind:
    given = [kinds[value] for value in node.inputs if value in kinds]
    _, name = READS[node.op_type]
    first = given[0]
    if node.op_type == "PatchEmbed":
        return Kind(name, number)
    if node.op_type == "Add":
        first = next(kind for kind in given if kind.name in STREAMS)
    if node.op_type in ("LayerNorm", "RMSNorm") and first.name == "row":
        name = "norm row"
    if node.op_type == "RMSNorm" and first.name == "linear":
        name = "normalised linear"
    if node.op_type == "TakeToken" and first.name == "norm":
        name = "norm row"
    return Kind(name, first.stream)
