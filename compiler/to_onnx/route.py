"""The standard operators that ``Route`` stands for."""

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from moeware.compiler.canonical import shape
from moeware.compiler.to_onnx.emitter import Emitter, array, names

__all__ = ["lower_route"]


def lower_route(emitter: Emitter, node: ir.Node, attrs: dict) -> None:
    """Emit the scores, the choice and the weights of a ``Route`` with these attributes."""
    x, _, bias, correction = names(node)
    weight = emitter.constant(np.ascontiguousarray(array(node.inputs[1]).T))
    logits = emitter.emit("Add", [emitter.emit("MatMul", [x, weight]), bias])
    indices, factors = (str(value.name) for value in node.outputs)
    if attrs["score"] == "sparse":
        _one_after_another(emitter, logits, attrs["k"], attrs["threshold"], indices, factors)
        return
    sigmoid, pair = attrs["score"] == "sigmoid", attrs["group_score"] == "pair"
    scores = emitter.emit("Sigmoid", [logits]) if sigmoid else emitter.emit("Softmax", [logits], axis=-1)
    compared = logits
    if pair or array(node.inputs[3]).any():
        compared = emitter.emit("Add", [scores, correction])
    if attrs["groups"] > 1:
        compared = _best_groups(emitter, compared, attrs["groups"], attrs["chosen_groups"], 1 + pair)
    _top(emitter, compared, attrs["k"], indices)
    chosen, limited = attrs["normalise"] == "chosen", attrs["capacity"] > 0
    source, result = logits if chosen and not sigmoid else scores, None if limited else factors
    found = emitter.emit("GatherElements", [source, indices], None if chosen else result, axis=-1)
    if chosen and sigmoid:
        total = emitter.emit("ReduceSum", [found, emitter.integers(-1)])
        found = emitter.emit("Div", [found, total], result)
    elif chosen:
        found = emitter.emit("Softmax", [found], result, axis=-1)
    if limited:
        kept = attrs["normalise"] == "kept"
        place = _places(emitter, indices, scores, shape(node.inputs[0])[1],
                        len(array(node.inputs[2])), attrs)
        found = emitter.emit("Mul", [found, place], None if kept else factors)
        if kept:
            total = emitter.emit("ReduceSum", [found, emitter.integers(-1)])
            least = emitter.constant(np.array(np.finfo(np.float32).tiny))
            emitter.emit("Div", [found, emitter.emit("Max", [total, least])], factors)


def _places(emitter: Emitter, indices: str, scores: str, tokens: int, experts: int,
            attrs: dict) -> str:
    """1 where a choice finds a place at its expert, 0 where it does not, [B, N, k]."""
    k, order = attrs["k"], attrs["order"]
    numbers = emitter.constant(np.arange(experts, dtype=np.int64))
    chosen = emitter.emit("Unsqueeze", [indices, emitter.integers(-1)])
    hits = emitter.emit("Cast", [emitter.emit("Equal", [chosen, numbers])], to=TensorProto.FLOAT)
    if order == "token":
        each = emitter.emit("ReduceSum", [hits, emitter.integers(-2)])
        before = emitter.emit("CumSum", [each, emitter.constant(np.array(1, np.int64))])
    else:
        turned = hits
        if order == "priority":
            largest = emitter.emit("Squeeze", [_top(emitter, scores, 1)[0], emitter.integers(-1)])
            first = _top(emitter, largest, tokens)[1]
            shape_of = emitter.emit("Shape", [hits])
            turns = emitter.emit("Unsqueeze", [first, emitter.integers(-1, -2)])
            turns = emitter.emit("Expand", [turns, shape_of])
            turned = emitter.emit("GatherElements", [hits, turns], axis=1)
        ranked = emitter.emit("Transpose", [turned], perm=[0, 2, 1, 3])
        flat = emitter.emit("Reshape", [ranked, emitter.integers(0, k * tokens, experts)])
        counted = emitter.emit("CumSum", [flat, emitter.constant(np.array(1, np.int64))])
        split = emitter.emit("Reshape", [counted, emitter.integers(0, k, tokens, experts)])
        before = emitter.emit("Transpose", [split], perm=[0, 2, 1, 3])
        if order == "priority":
            before = emitter.emit("ScatterElements", [before, turns, before], axis=1)
    place = emitter.emit("ReduceSum", [emitter.emit("Mul", [before, hits]), emitter.integers(-1)],
                         keepdims=0)
    limit = emitter.constant(np.array(attrs["capacity"], np.float32))
    return emitter.emit("Cast", [emitter.emit("LessOrEqual", [place, limit])], to=TensorProto.FLOAT)


def _one_after_another(emitter: Emitter, logits: str, k: int, threshold: float, indices: str,
                       factors: str) -> None:
    """Experts of score "sparse", each weighted by the softmax over those near it that are left."""
    top, last = _top(emitter, logits, k, indices)[0], emitter.integers(-1)
    magnitudes, left, weights = emitter.emit("Abs", [logits]), logits, []
    limit, least = (emitter.constant(np.array(number, np.float32)) for number in (threshold, -np.inf))
    for number in range(k):
        span = emitter.integers(number), emitter.integers(number + 1), last
        largest, each = (emitter.emit("Slice", [whole, *span]) for whole in (top, indices))
        distance = emitter.emit("Sub", [largest, logits])
        ratio = emitter.emit("Div", [distance, emitter.emit("Max", [magnitudes, largest])])
        far = emitter.emit("Greater", [ratio, limit])
        near = emitter.emit("Softmax", [emitter.emit("Where", [far, least, left])], axis=-1)
        weights.append(emitter.emit("GatherElements", [near, each], axis=-1))
        gone = emitter.emit("Add", [largest, least])  # minus infinity, of its shape
        left = emitter.emit("ScatterElements", [left, each, gone], axis=-1)
    emitter.emit("Concat", weights, factors, axis=-1)


def _best_groups(emitter: Emitter, values: str, groups: int, count: int, largest: int) -> str:
    """Minus infinity where an expert is not in one of the best groups, by their largest values."""
    parts = emitter.emit("Reshape", [values, emitter.integers(0, 0, groups, -1)])
    top, best = _top(emitter, parts, largest)[0], f"{values}/groups"
    total = emitter.emit("ReduceSum", [top, emitter.integers(-1)], keepdims=0)
    _top(emitter, total, count, best)
    numbers = emitter.constant(np.arange(groups, dtype=np.int64))
    hits = emitter.emit("Equal", [emitter.emit("Unsqueeze", [best, emitter.integers(-1)]), numbers])
    hits = emitter.emit("Cast", [hits], to=TensorProto.FLOAT)
    seen = emitter.emit("ReduceSum", [hits, emitter.integers(-2)], keepdims=0)
    seen = emitter.emit("Cast", [emitter.emit("Unsqueeze", [seen, emitter.integers(-1)])],
                        to=TensorProto.BOOL)
    least = emitter.constant(np.array(-np.inf, np.float32))
    shown = emitter.emit("Where", [seen, parts, least])
    return emitter.emit("Reshape", [shown, emitter.integers(0, 0, -1)])


def _top(emitter: Emitter, values: str, count: int, indices: str | None = None) -> tuple[str, str]:
    """Names of the largest values of each row and of their indices."""
    both = f"{indices or values}/largest", indices or f"{values}/indices"
    emitter.nodes.append(
        helper.make_node("TopK", [values, emitter.integers(count)], list(both), axis=-1)
    )
    return both
