"""The forms of routers: what is chosen by which scores, proved by running the routing itself.

Seed: the TopK that chooses experts, or an ArgMax that chooses one, perhaps before others. The scores
that it compares come from a linear map, the logits; the weights are the last values as large as the
chosen indices that follow from the logits alone. Constants and shapes between them propose forms of
``Route``; running the region on random logits and comparing with each proves or rejects it. So it
does not matter how groups are masked or weights are gathered.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir
import torch

from moeware.compiler.canonical import PLAIN_ROUTE
from moeware.compiler.canonical_rules import GROUP_SCORES, NORMALISATIONS
from moeware.compiler.fuse.linear import LinearMatch, match_linear
from moeware.compiler.fuse.region import inputs_of, region, runner
from moeware.compiler.fuse.trace import (
    constant,
    forward,
    is_op,
    operand,
    other_operand,
    scalar,
    size,
    static_shape,
)
from moeware.compiler.operators import route

__all__ = ["CHOICES", "RouterForm", "RouterMatch", "match_router", "plain_forms", "propose_forms",
           "router_logits", "sample_logits", "sample_mixed"]

CHOICES = ("TopK", "ArgMax")

ROWS = 256  # of logits on which a form is proved, at least
# Relative difference that separates the rounding of float32 from another function.
_TOLERANCE = 2e-4
# Rows that may differ: the values at the edge of a choice can lie as near as rounding. Another form
# differs in many rows, as logits are drawn on the scale of every correction, too.
_NEAR_TIES = 0.02
_NO_LIMIT = 1e4  # clamps to numbers as large change nothing
_LEAST = 1e-3  # proportion of two logits that float32 tells from equal ones


@dataclass(frozen=True, eq=False)
class RouterForm:
    """Attributes of ``Route`` and its correction, float32 [E]; the weights are `factor` times those
    of ``Route``, which the experts' second layer takes."""

    attributes: dict
    correction: np.ndarray
    factor: float = 1.0

    def dense(self, logits: np.ndarray) -> np.ndarray:
        """Weight of each expert, float64 like the logits [..., tokens, E] and computed in their type; 0
        where it is not chosen."""
        correction = torch.from_numpy(self.correction.astype(logits.dtype))
        indices, weights = route(torch.from_numpy(logits), correction, self.attributes)
        return _spread(indices.numpy(), weights.numpy(), logits.shape) * self.factor


@dataclass(frozen=True, eq=False)
class RouterMatch:
    """A router: the linear map of its logits, what it gives, [..., k] both, and its form."""

    layer: LinearMatch
    logits: ir.Value
    indices: ir.Value
    weights: ir.Value
    form: RouterForm


def plain_forms(experts: int, k: int) -> list[RouterForm]:
    """Softmax of all logits alone, of the chosen or of all."""
    return [RouterForm({"k": k, "normalise": name, **PLAIN_ROUTE}, np.zeros(experts, np.float32))
            for name in NORMALISATIONS]


def match_router(model: ir.Model, choice: ir.Node) -> RouterMatch | None:
    """The router some of whose experts ``choice``, one of `CHOICES`, chooses, if it has one of the
    forms of ``Route``."""
    found = router_logits(choice)
    if found is None:
        return None
    logits, layer = found
    for indices, weights in _results(model, choice, logits):
        form = _prove(model, logits, indices, weights)
        if form is not None:
            return RouterMatch(layer, logits, indices, weights, form)
    return None


def propose_forms(nodes: list[ir.Node], experts: int, k: int) -> Iterator[RouterForm]:
    """Forms that constants and shapes in the routing ``nodes`` suggest, the simplest first.

    The caller proves one, on logits that tell them apart (`sample_logits`).
    """
    shapes = [static_shape(value) or () for node in nodes for value in node.outputs]
    sizes = {shape[-2] for shape in shapes if len(shape) > 2 and shape[-2] * shape[-1] == experts}
    counts = {size.item() for node in nodes if is_op(node, "TopK")
              if (size := constant(operand(node, 1))) is not None and size.size == 1}
    groupings = [(1, 1, "max")]
    groupings += [
        (groups, count, name)
        for groups, count, name in product(sorted(sizes - {1}), sorted(counts), GROUP_SCORES)
        if count <= groups and k <= count * (experts // groups)
        and (name == "max" or experts // groups > 1)
    ]
    for correction, grouping, score, normalise in product(
        _corrections(nodes, experts), groupings, ("softmax", "sigmoid"), NORMALISATIONS
    ):
        names = ("groups", "chosen_groups", "group_score")
        yield RouterForm(PLAIN_ROUTE | {"k": k, "score": score, "normalise": normalise}
                         | dict(zip(names, grouping)), correction)
    for threshold in _thresholds(nodes):
        sparse = {"score": "sparse", "normalise": "all", "threshold": threshold}
        yield RouterForm({"k": k, **PLAIN_ROUTE, **sparse}, np.zeros(experts, np.float32))


def sample_logits(shape: tuple[int, ...], corrections: Sequence[np.ndarray],
                  thresholds: Sequence[float] = (), limits: Sequence[float] = ()
                  ) -> Iterator[np.ndarray]:
    """Random logits float32 of ``shape``, on the scale on which scores spread, nearly alike, and on those
    on which each correction and threshold decides; beyond each limit, too."""
    generator, experts = np.random.default_rng(11), shape[-1]
    spreads = [float(np.std(each)) for each in corrections if np.ptp(each) > 0]
    # A score changes by a quarter of a small logit (sigmoid), or by one part in E (softmax).
    scales = [2.0, 0.1, *(factor * spread for spread in spreads for factor in (4.0, experts))]
    scales += [2 * limit for limit in limits]
    for _ in range(math.ceil(ROWS / math.prod(shape[:-1]))):
        for scale in scales:
            yield generator.normal(size=shape).astype(np.float32) * np.float32(scale)
        for threshold in thresholds:
            yield _around(threshold, shape, generator)


def sample_mixed(first: np.ndarray, experts: int, threshold: float,
                 generator: np.random.Generator) -> np.ndarray:
    """Random logits float32 [rows, experts] of a sparse mixer. In each row that of ``first`` is the
    largest, some are near it, one at least where there is another, and all others clearly are not."""
    unit, shape = max(threshold, _LEAST), (len(first), experts)
    near = generator.random(shape) < 0.5
    np.put_along_axis(near, (first[:, None] + 1) % experts, True, -1)
    distances = np.where(near, generator.uniform(0.05, 0.3, shape), generator.uniform(1.6, 2.2, shape))
    np.put_along_axis(distances, first[:, None], 0, -1)
    return _at_distances(unit * distances, unit, generator)


def _around(threshold: float, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Logits of which some are near the largest, and others about as far as the threshold."""
    unit = max(threshold, _LEAST)
    near = 0.1 * threshold * generator.random(shape)
    # Logits so far apart differ by this proportion, and so do distances that one or the other divides.
    edge = threshold * (1 + unit * generator.uniform(-1, 1, shape))
    return _at_distances(np.where(generator.random(shape) < 0.5, near, edge), unit, generator)


def _at_distances(distances: np.ndarray, unit: float, generator: np.random.Generator) -> np.ndarray:
    """Logits at such distances below 2, in the proportion that a sparse mixer compares, from a largest
    one of either sign. It is so large that the weights of those a ``unit`` away differ, as far as
    a sigmoid is still told from 0."""
    scale = min(2 / unit, 20)
    largest = generator.choice([-scale, scale], (*distances.shape[:-1], 1))
    divided_by_it = largest * (1 - np.minimum(distances, 2))
    divided_by_other = largest / (1 - np.minimum(distances, 0.99))
    return np.where(largest > 0, divided_by_it, divided_by_other).astype(np.float32)


def _corrections(nodes: list[ir.Node], experts: int) -> list[np.ndarray]:
    """No correction, and constants of one number for each expert that the nodes add."""
    found = [np.zeros(experts, np.float32)]
    for node in nodes:
        for value in node.inputs if is_op(node, "Add", "Sub") else ():
            array = constant(value)
            if array is not None and array.size == experts and array.dtype.kind == "f":
                sign = -1 if is_op(node, "Sub") else 1
                found.append(sign * array.reshape(-1).astype(np.float32))
    return [each for each in found if np.isfinite(each).all()]


def _thresholds(nodes: list[ir.Node]) -> list[float]:
    """Constants below 2 that the nodes compare with, or multiply by to compare."""
    found: dict[float, None] = {}
    for node in nodes:
        if is_op(node, "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
            compared = [node, *(value.producer() for value in node.inputs if value is not None)]
            for pair in [other_operand(each) for each in compared
                         if each is node or is_op(each, "Mul")]:
                number = scalar(pair[1]) if pair else None
                if number is not None and 0 <= number < 2:
                    found[number] = None
    return list(found)


def _limits(nodes: list[ir.Node]) -> list[float]:
    """Constants that the nodes clamp numbers of the size of logits to."""
    found = {abs(number) for node in nodes if is_op(node, "Clip", "Min", "Max")
             for number in map(scalar, node.inputs) if number is not None}
    return [number for number in found if 1 < number < _NO_LIMIT]


def router_logits(choice: ir.Node) -> tuple[ir.Value, LinearMatch] | None:
    """The nearest linear map behind ``choice`` with one result for each of what it compares."""
    compared = static_shape(choice.inputs[0]) if choice.inputs[0] is not None else None
    if not compared:
        return None
    seen, level = set(), [choice.inputs[0]]
    while level:
        for value in level:
            layer = match_linear(value)
            if layer is not None and len(layer.weight) == compared[-1] and static_shape(value):
                return value, layer
        seen.update(level)
        nodes = [value.producer() for value in level]
        level = list(dict.fromkeys(value for node in nodes if node is not None
                                   for value in inputs_of(node) if value not in seen))
    return None


def _results(model: ir.Model, choice: ir.Node,
             logits: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Indices with each value of their shape that follows from the logits alone, the last first."""
    for indices in _indices(choice):
        for weights in reversed(_weights(model, logits, indices)):
            yield indices, weights


def _indices(choice: ir.Node) -> list[ir.Value]:
    """What ``choice`` chooses, joined with what others choose, and by itself."""
    own = choice.outputs[-1]
    if own.dtype not in (None, ir.DataType.INT64):  # a TopK for its values
        return []
    joints = [node.outputs[0] for value, _, _ in forward(own) for node in value.consumers()
              if is_op(node, "Concat")]
    return [*joints, own]


def _weights(model: ir.Model, logits: ir.Value, indices: ir.Value) -> list[ir.Value]:
    """Values of the shape of ``indices`` that follow from the logits alone, in order."""
    shape, after, found = static_shape(indices), {logits}, []
    for node in model.graph:
        if after.isdisjoint(inputs_of(node)):
            continue
        after.update(node.outputs)
        for value in node.outputs:
            if (value is not indices and shape and static_shape(value) == shape
                    and value.dtype in (None, ir.DataType.FLOAT)
                    and not region([value], [logits])[1]):
                found.append(value)
    return found


def _prove(model: ir.Model, logits: ir.Value, indices: ir.Value,
           weights: ir.Value) -> RouterForm | None:
    nodes_of, leaves = region([indices, weights], [logits])
    shape, inside = static_shape(logits), set(nodes_of)
    nodes = [node for node in model.graph if node in inside]
    experts, k = shape[-1], size(indices) * shape[-1] // max(1, size(logits))
    if leaves or not 0 < k <= experts:
        return None
    samples, expected = [], []
    call = runner(model, {logits: np.zeros(shape, np.float32)}, [indices, weights])
    for sample in sample_logits(shape, _corrections(nodes, experts), _thresholds(nodes),
                                _limits(nodes)):
        results = call and call({logits: sample})
        if results is None or results[0].size * experts != sample.size * k:
            return None
        rows = sample.reshape(-1, experts)
        chosen, factors = (result.reshape(-1, k) for result in results)
        if chosen.min() < 0 or chosen.max() >= experts:
            return None
        samples.append(rows)
        expected.append(_spread(chosen, factors, rows.shape))
    rows, wanted = np.concatenate(samples), np.concatenate(expected)
    for form in propose_forms(nodes, experts, k):
        factor = _factor(form.dense(rows), wanted)
        if factor is not None:
            return RouterForm(form.attributes, form.correction, factor)
    return None


def _factor(found: np.ndarray, wanted: np.ndarray) -> float | None:
    """By which one combination exceeds the other, if that is all in which they differ."""
    both = (found != 0) & (wanted != 0)
    if not both.any():
        return None
    factor = float(np.median(wanted[both] / found[both]))
    wrong = np.abs(found * factor - wanted).max(-1) > _TOLERANCE * np.abs(wanted).max(-1)
    return factor if wrong.mean() <= _NEAR_TIES and factor > 0 else None


def _spread(indices: np.ndarray, weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    dense = np.zeros(shape)
    np.put_along_axis(dense, indices, weights.astype(np.float64), -1)
    return dense
