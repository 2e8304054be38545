"""``com.microsoft.GroupQueryAttention`` over whole sequences, written out in standard operators.

It reads the lengths of the sequences from values that a file computes of its mask, so what it stands for
is known once constants are folded: this is a rule of `fuse`, and no expansion of the file (`contrib`).
Measured with ONNX Runtime 1.32 on a CPU: keys of the chunk itself are numbered from 0, a query sees
those up to its own; rotary embedding turns queries and keys, as ``RotaryEmbedding`` does, from the
position of the first token on; ``present`` holds keys after it.

What is refused stays a plain node, with the reason in its metadata for `partition`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import REASON
from moeware.compiler.fuse.contrib_weights import Refused
from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.trace import attribute, constant, operand, size, static_shape
from moeware.compiler.interface import LEAVE_OUT

__all__ = ["is_group_query", "rewrite_group_query"]

# Inputs by their places, and those that may be there.
_NAMES = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
          "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
          "q_norm_weight", "k_norm_weight", "query_seqlens")  # fmt: skip
_READ, _NORMS = _NAMES[:10], ("q_norm_weight", "k_norm_weight")
# Attribute: its value where it changes nothing; others are read.
_NEUTRAL = {"softcap": 0.0, "smooth_softmax": 0, "qk_output": 0, "sliding_window_cache": 0,
            "k_quant_type": "NONE", "v_quant_type": "NONE"}  # fmt: skip


def is_group_query(node: ir.Node | None) -> bool:
    """Whether ``node`` is GroupQueryAttention of ONNX Runtime's domain."""
    return (
        node is not None
        and node.domain == "com.microsoft"
        and node.op_type == "GroupQueryAttention"
    )


@dataclass(frozen=True)
class _Form:
    """What a node computes: sizes, and the positions that its rotary embedding starts from."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int
    scale: float
    causal: bool
    start: int | None


def rewrite_group_query(model: ir.Model) -> None:
    """Write each GroupQueryAttention of whole sequences out: packed rows taken apart, ``RotaryEmbedding``,
    and products around ``Softmax``.

    Forms
    -----
    Attention
        - ``com.microsoft.GroupQueryAttention`` without a past, or with one without elements, rows packed
          or apart, rotary embedding inside or before it
    """
    masks: dict[int, ir.Value] = {}  # one for all layers
    for node in list(model.graph):
        if not is_group_query(node):
            continue
        try:
            form = _form(node)
        except Refused as reason:
            node.metadata_props[REASON] = str(reason)
        else:
            _write_out(model, node, form, masks)


def _form(node: ir.Node) -> _Form:
    _check_attributes(node)
    _check_inputs(node)
    _check_outputs(node)
    rows = [static_shape(value) for value in node.inputs[:3] if value is not None]
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    counts = [heads, kv_heads, kv_heads] if len(rows) == 3 else [heads + 2 * kv_heads]
    shapes = [shape and shape[:2] for shape in rows]
    known = min(heads, kv_heads) > 0 and len(rows) == len(counts) and shapes == shapes[:1] * len(rows)
    dims = {shape[2] / count for shape, count in zip(rows, counts)
            if known and shape and len(shape) == 3}
    if not known or len(dims) != 1 or heads % kv_heads or not (dim := dims.pop()).is_integer():
        raise Refused(
            f"query, key and value must be rows of {heads}, {kv_heads} and {kv_heads} heads of one size "
            f"for the same tokens, not of the shapes {[list(shape or ()) for shape in rows]}; "
            f"export self-attention of sequences of fixed length"
        )
    tokens = shapes[0][1]
    _check_lengths(node, tokens)
    window = attribute(node, "local_window_size", -1)
    if window != -1 and window < tokens:
        raise Refused(
            f"local_window_size={window} hides keys from {tokens} tokens, and attention on the "
            f"accelerator is causal or of all tokens; compile for sequences of at most {window} tokens"
        )
    start = _start(node, int(dim), tokens) if attribute(node, "do_rotary", 0) else None
    scale = attribute(node, "scale", 0.0) or dim**-0.5
    causal = bool(attribute(node, "causal", 1))
    return _Form(heads, kv_heads, int(dim), tokens, scale, causal, start)


def _check_attributes(node: ir.Node) -> None:
    for name, neutral in _NEUTRAL.items():
        value = attribute(node, name, neutral)
        if value != neutral and not (name == "smooth_softmax" and value < 0):
            raise Refused(
                f"{name}={value!r} has no form on the accelerator, whose attention is softmax of scaled "
                f"products; export with {name}={neutral!r}, or accept that the host runs it"
            )


def _check_inputs(node: ir.Node) -> None:
    for place, value in enumerate(node.inputs):
        name = _NAMES[place] if place < len(_NAMES) else f"input {place}"
        if value is not None and name in _NORMS:
            raise Refused(
                f"{name} (input {place}) normalises heads inside of the operator, which ONNX Runtime does on "
                f"some providers only; export the norms of queries and keys in front of it"
            )
        if value is not None and name not in _READ:
            raise Refused(
                f"{name} (input {place}) has no form on the accelerator, whose attention is softmax of "
                f"scaled products; leave it out, or accept that the host runs it"
            )
        if value is not None and name.startswith("past_") and size(value) != 0:
            raise Refused(
                f"{name} holds tokens of an earlier run, and the accelerator keeps none from run to "
                f"run; compile for whole sequences, with a past of no elements (--axis "
                f"past_sequence_length=0)"
            )


def _check_outputs(node: ir.Node) -> None:
    for value in node.outputs[1:]:
        if value.is_graph_output() or value.uses():
            raise Refused(
                f"{value.name!r} keeps keys or values for a later run, and the accelerator keeps none from "
                f"run to run; {LEAVE_OUT}"
            )


def _check_lengths(node: ir.Node, tokens: int) -> None:
    for place, wanted in ((5, tokens - 1), (6, tokens)):
        array = constant(operand(node, place))
        if array is None:
            raise Refused(
                f"{_NAMES[place]} depends on an input, such as a mask of padding, and the accelerator "
                f"attends to whole sequences; fix the mask to ones (--fix attention_mask=1)"
            )
        if (array != wanted).any():
            raise Refused(
                f"{_NAMES[place]} must be {wanted} for {tokens} tokens, not {array.reshape(-1).tolist()}, "
                f"as the accelerator attends to whole sequences; fix the mask to ones of this length"
            )


def _start(node: ir.Node, dim: int, tokens: int) -> int:
    """Position of the first token."""
    caches = [constant(operand(node, place)) for place in (7, 8)]
    places = operand(node, 9)
    array = np.arange(tokens) if places is None else constant(places)
    if any(cache is None or cache.ndim != 2 for cache in caches) or array is None:
        raise Refused(
            "cos_cache, sin_cache and position_ids must be constants, as the accelerator turns channels "
            "by angles that it knows before; export caches as weights and fix the positions"
        )
    start, width = int(array.reshape(-1)[0]), caches[0].shape[1]
    # Only the first is read on a CPU, each by other providers: they agree on consecutive ones.
    follow = array.size == tokens and (array.reshape(-1) == start + np.arange(tokens)).all()
    if not follow or start < 0 or start + tokens > len(caches[0]) or 2 * width > dim or (
        caches[0].shape != caches[1].shape
    ):
        raise Refused(
            f"position_ids must follow one another and have a row in cos_cache and sin_cache, of at most "
            f"{dim // 2} angles, not be {array.reshape(-1).tolist()} for caches of the shapes "
            f"{[cache.shape for cache in caches]}; export the model for this length"
        )
    return start


def _write_out(model: ir.Model, node: ir.Node, form: _Form, masks: dict[int, ir.Value]) -> None:
    build = Builder(model, node, [node])
    counts = (form.heads, form.kv_heads, form.kv_heads)
    rows = list(node.inputs[:3])
    if operand(node, 1) is None:
        ends = np.cumsum((0, *counts)) * form.dim
        rows = [build.take(node.inputs[0], np.arange(*pair)) for pair in pairwise(ends)]
    if form.start is not None:
        rows[:2] = (_turned(build, node, *pair, form) for pair in zip(rows[:2], counts))
    q, k, v = (
        build.transpose(build.reshape(row, (1, form.tokens, heads, form.dim)), (0, 2, 1, 3))
        for row, heads in zip(rows, counts)
    )
    k, v = (_repeated(build, each, form) for each in (k, v))
    scores = build.scale(build.product(q, build.transpose(k, (0, 1, 3, 2))), form.scale)
    if form.causal:
        if form.tokens not in masks:
            hidden = np.triu(np.full((form.tokens, form.tokens), -np.inf), 1)
            masks[form.tokens] = build.weight(hidden, "mask")
        scores = build.plain("Add", [scores, masks[form.tokens]], [scores], {})[0]
    (weights,) = build.plain("Softmax", [scores], [scores], {"axis": -1})
    result = build.transpose(build.product(weights, v), (0, 2, 1, 3))
    build.replace(node.outputs[0], result)


def _turned(build: Builder, node: ir.Node, row: ir.Value, heads: int, form: _Form) -> ir.Value:
    """Rows of ``heads`` after the rotary embedding of ``node``."""
    assert form.start is not None
    positions = build.weight(form.start + np.arange(form.tokens)[None], "positions")
    cos, sin = node.inputs[7:9]
    length = 2 * int(cos.shape[1])
    attributes = {"interleaved": attribute(node, "rotary_interleaved", 0), "num_heads": heads,
                  "rotary_embedding_dim": length if length < form.dim else 0}
    inputs = [row, positions, cos, sin]
    return build.plain("RotaryEmbedding", inputs, [row], attributes, node.domain)[0]


def _repeated(build: Builder, value: ir.Value, form: _Form) -> ir.Value:
    """Heads of keys or values, each as often as queries share it."""
    if form.heads == form.kv_heads:
        return value
    shape = (1, form.kv_heads, 1, form.tokens, form.dim)
    spread = (*shape[:2], form.heads // form.kv_heads, *shape[3:])
    return build.reshape(build.expand(build.reshape(value, shape), spread), (1, form.heads, *shape[3:]))
