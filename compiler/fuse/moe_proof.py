"""Prove what a mixture of experts computes: run it on chosen numbers and compare with Route and Experts.

The inputs tell the forms apart: each expert comes first for some row, and the hidden values lie
where the known functions differ most. Of these the two forms of GELU are the nearest, by less than
5e-4; so of all forms that are near enough, the nearest is taken. What stands out there only (a bound of
values, a weight too small to count, a token that is left out) is sought with that form alone.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch.nn.functional import linear

from moeware.compiler.fuse.capacity import crowded_scores, limited_forms, measured_capacity
from moeware.compiler.fuse.moe_samples import sample_edges, sample_rows, sample_scores
from moeware.compiler.fuse.moe_weights import ExpertWeights, propose_weights
from moeware.compiler.fuse.region import region, runner
from moeware.compiler.fuse.routers import RouterForm, plain_forms
from moeware.compiler.fuse.trace import (
    constant,
    is_op,
    operand,
    other_operand,
    scalar,
    static_shape,
)
from moeware.compiler.operators import FUNCTIONS

__all__ = ["TOLERANCE", "Form", "Proof", "nearest_form", "prove"]

# Relative difference between the rounding of float32, which is at most a tenth of it, and two forms
# of GELU, which on these inputs are five times it.
TOLERANCE = 2e-5
_ROUNDING = float(np.finfo(np.float32).eps)
_FEW = 8  # rows, where there are fewer experts
# Beyond what is usual: hidden values in proportion to usual ones, beyond the limits that models set to them;
# by how much the first choice exceeds the others, and what is added to all logits of a row, which softmax
# does not mind.
_FAR, _LEAD, _SHIFTS = 512.0, 9.0, (-50.0, 0.0, 50.0)


@dataclass(frozen=True)
class Proof:
    """What a proposal that computes the region's values consists of."""

    weights: ExpertWeights
    function: str
    router: RouterForm
    nodes: list[ir.Node]


@dataclass(frozen=True)
class Form:
    """A canonical form, and its largest difference in proportion to what the rows decide."""

    error: float
    weights: ExpertWeights
    function: str
    router: RouterForm


def prove(
    model: ir.Model,
    x: ir.Value,
    logits: ir.Value,
    y: ir.Value,
    features: int,
    routers: Sequence[RouterForm],
) -> Proof | None:
    """The canonical form that makes ``y`` of ``x`` and ``logits`` as the graph does, or None.

    routers: forms that the router may have, without a capacity; where there are several, all choose
    the same.
    """
    inside = set(region([y], [x, logits])[0])
    nodes = [node for node in model.graph if node in inside]
    for forms in (routers, *_one_after_another(routers, nodes)):
        proof = _prove(model, x, logits, y, features, forms, nodes)
        if proof is not None:
            return proof
    return None


def _one_after_another(
    routers: Sequence[RouterForm], nodes: list[ir.Node]
) -> Iterator[list[RouterForm]]:
    """The forms with all the experts that ``nodes`` choose, where that is not one TopK (GShard): their
    weights may be divided by a sum that those of the first have no part in."""
    attributes, experts, total = routers[0].attributes, len(routers[0].correction), 0
    for node in nodes:
        shape = static_shape(node.inputs[0]) if is_op(node, "TopK", "ArgMax") else None
        if shape and shape[-1] == experts:
            count = constant(operand(node, 1))
            total += 1 if count is None else int(count.reshape(-1)[0])
    plain = attributes["score"] == "softmax" and attributes["groups"] == 1
    if plain and not routers[0].correction.any() and attributes["k"] < total <= experts:
        yield plain_forms(experts, total)


def _prove(
    model: ir.Model,
    x: ir.Value,
    logits: ir.Value,
    y: ir.Value,
    features: int,
    routers: Sequence[RouterForm],
    nodes: list[ir.Node],
) -> Proof | None:
    experts = len(routers[0].correction)
    proposals = propose_weights(nodes, x, experts, features)
    first = next(proposals, None)
    x_shape, logits_shape = static_shape(x), static_shape(logits)
    if first is None or x_shape is None or logits_shape is None:
        return None
    like = {x: np.zeros(x_shape, np.float32), logits: np.zeros(logits_shape, np.float32)}
    session, tokens = runner(model, like, [y]), int(np.prod(x_shape)) // features
    if session is None:
        return None

    def call(rows: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
        results = []
        for start in range(0, len(rows), tokens):
            frame = slice(start, start + tokens)
            values = session({x: rows[frame].reshape(x_shape),
                              logits: scores[frame].reshape(logits_shape)})
            if values is None or values[0].size != tokens * features:
                return None
            results.append(values[0].reshape(-1, features))
        return np.concatenate(results)

    generator = np.random.default_rng(7)
    frames = -(-experts // tokens)  # so many that each expert has a row
    rows = sample_rows(generator, frames * tokens, first)
    scores = sample_scores(generator, frames * tokens, routers[0])
    results = call(rows, scores)
    if results is None:
        return None
    capacity = measured_capacity(call, rows, scores, tokens)
    if capacity:
        crowd = crowded_scores(generator, tokens, experts, routers[0].attributes["k"])
        scores = np.concatenate([scores.reshape(frames, tokens, experts), crowd])
        rows = sample_rows(generator, scores.size // experts, first)
        results, routers = call(rows, scores.reshape(-1, experts)), limited_forms(routers, capacity)
        if results is None:
            return None
    else:
        # More rows would say the same of the form, and cost a run of all proposals each.
        few = slice(max(experts, _FEW))
        rows, scores, results = rows[few], scores[few], results[few]
    scales = _scales(nodes)
    for weights in itertools.chain([first], proposals):  # one at a time: they are large
        found = nearest_form(rows, scores, results, [weights], routers, scales=scales)
        if found.error < TOLERANCE:
            break
    else:
        return None
    if not _holds_far_away(call, found, tokens, generator):
        return None
    return Proof(found.weights, found.function, found.router, nodes)


def _holds_far_away(
    call: Callable[[np.ndarray, np.ndarray], np.ndarray | None],
    form: Form,
    tokens: int,
    generator: np.random.Generator,
) -> bool:
    """Whether ``form`` gives the results of all tokens of a frame: far from usual hidden values, where
    functions end that are limited (ReLU6, clamped SwiGLU), and for choices that are close or clear, where
    routers end that drop small weights or clamp logits."""
    router = replace(form.router, factor=1.0)  # the weights of the form have it
    experts, capacity = len(router.correction), router.attributes["capacity"]
    count = -(-experts // tokens) * tokens
    scores = sample_scores(generator, count, router)
    edges = scores.copy() if capacity else sample_edges(generator, count, router)
    if router.attributes["score"] == "softmax":
        if not capacity:  # in places by priority rounding would decide
            np.put_along_axis(scores, scores.argmax(-1)[:, None], scores.max(-1, keepdims=True)
                              + np.linspace(0, _LEAD, count, dtype=np.float32)[:, None], -1)
        scores += np.resize(np.float32(_SHIFTS), (count, 1))
    for far, drawn in ((1.0, scores), (_FAR, edges)):
        rows = sample_rows(generator, count, form.weights) * np.float32(far)
        results = call(rows, drawn)
        given = drawn.reshape(-1, tokens, experts) if capacity else drawn
        if results is None or not nearest_form(
            rows, given, results, [form.weights], [router], [form.function]
        ).error < TOLERANCE:
            return False
    return True


def _scales(nodes: list[ir.Node]) -> list[float]:
    """Factors that the results may have beside the router's: 1, and what a constant in the region
    multiplies by."""
    found = {1.0: None}
    for node in nodes:
        pair = other_operand(node) if is_op(node, "Mul", "Div") else None
        number = scalar(pair[1]) if pair else None
        if number is not None and number > 0 and np.isfinite(number):
            found[number if is_op(node, "Mul") else 1 / number] = None
    return list(found)


def nearest_form(
    rows: np.ndarray,
    scores: np.ndarray,
    found: np.ndarray,
    proposals: Iterable[ExpertWeights],
    routers: Sequence[RouterForm],
    functions: Sequence[str] = tuple(FUNCTIONS),
    scales: Sequence[float] = (1.0,),
) -> Form:
    """The canonical form whose results are nearest to ``found``; of those that only rounding tells apart,
    the first.

    rows, scores: [rows, D] and [rows, E]; of forms with a capacity scores are [frames, tokens, E].
    """
    experts = scores.shape[-1]
    if routers[0].attributes["k"] == experts and not routers[0].attributes["capacity"]:
        routers = routers[:1]  # where all are chosen, there is no difference
    factors = {router: router.dense(scores.astype(np.float64)).reshape(-1, experts)
               for router in routers}
    forms = _forms(rows, factors, found.astype(np.float64), proposals, functions, scales)
    return min(forms, key=lambda form: max(form.error, TOLERANCE / 10))


def _forms(
    rows: np.ndarray,
    factors: dict[RouterForm, np.ndarray],
    found: np.ndarray,
    proposals: Iterable[ExpertWeights],
    functions: Sequence[str],
    scales: Sequence[float],
) -> Iterator[Form]:
    chosen = [np.flatnonzero(column) for column in np.any([*factors.values()], 0).T]
    inputs = torch.from_numpy(rows)
    for weights in proposals:
        third, hidden = None, _first_layer(inputs, weights.w1, weights.b1, chosen)
        if weights.w3 is not None and weights.b3 is not None:
            third = _first_layer(inputs, weights.w3, weights.b3, chosen)
        down = _tensor(weights.w2), _tensor(weights.b2)
        for function in functions:
            outputs = []
            for expert, each in enumerate(hidden):
                activation = FUNCTIONS[function](each)
                activation = activation if third is None else activation * third[expert]
                outputs.append(linear(activation, down[0][expert], down[1][expert]))
            for router, combined in factors.items():
                value = np.zeros(found.shape)
                for expert, (places, output) in enumerate(zip(chosen, outputs)):
                    value[places] += combined[places, expert, None] * output.numpy()
                scale = _nearest_scale(value, found, scales)
                # What the last bias adds says nothing of the form, but rounds the rest.
                decided = np.abs(found - scale * (combined @ weights.b2)).max()
                size = decided + _ROUNDING / TOLERANCE * np.abs(found).max() + 1e-30
                error = float(np.abs(scale * value - found).max() / size)
                error = error if np.isfinite(error) else np.inf
                yield Form(error, weights.scaled(scale * router.factor), function, router)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, np.float32, ("C", "W")))


def _first_layer(
    rows: torch.Tensor, weight: np.ndarray, bias: np.ndarray, chosen: list[np.ndarray]
) -> list[torch.Tensor]:
    """``weight x + bias`` of each expert, on the rows that choose it."""
    layers = zip(chosen, _tensor(weight), _tensor(bias))
    return [linear(rows[places], *layer) for places, *layer in layers]


def _nearest_scale(value: np.ndarray, found: np.ndarray, scales: Sequence[float]) -> float:
    square = float((value * value).sum())
    fit = float((value * found).sum()) / square if square > 0 else 1.0
    return min(scales, key=lambda scale: abs(scale - fit))
