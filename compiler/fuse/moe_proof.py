"""Prove what a mixture of experts computes: run it on chosen numbers and compare with Route and Experts.

The inputs tell the forms apart: each expert comes first for some row, and the hidden values lie
where the known functions differ most. Of these the two forms of GELU are the nearest, by less than
5e-4; so of all forms that are near enough, the nearest is taken.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from moeware.compiler.canonical import NORMALISATIONS
from moeware.compiler.fuse.moe_weights import ExpertWeights, propose_weights
from moeware.compiler.fuse.region import region, run
from moeware.compiler.fuse.trace import static_shape
from moeware.compiler.operators import FUNCTIONS

__all__ = ["TOLERANCE", "Form", "Proof", "nearest_form", "prove", "sample_rows", "sample_scores"]

# Relative difference between the rounding of float32, which is at most a tenth of it, and two forms
# of GELU, which on these inputs are five times it.
TOLERANCE = 2e-5
_ROUNDING = float(np.finfo(np.float32).eps)
# Root of the mean square of hidden values: the two forms of GELU differ most where they are 2 to 3.
_HIDDEN = 2.0


@dataclass(frozen=True)
class Proof:
    """What a proposal that computes the region's values consists of."""

    weights: ExpertWeights
    function: str
    normalise: str
    nodes: list[ir.Node]


@dataclass(frozen=True)
class Form:
    """A canonical form, and its largest difference in proportion to what the rows decide."""

    error: float
    weights: ExpertWeights
    function: str
    normalise: str


def prove(
    model: ir.Model, x: ir.Value, logits: ir.Value, y: ir.Value, experts: int, features: int, k: int
) -> Proof | None:
    """The canonical form that makes ``y`` of ``x`` and ``logits`` as the graph does, or None."""
    inside = set(region([y], [x, logits])[0])
    nodes = [node for node in model.graph if node in inside]
    proposals = list(propose_weights(nodes, x, experts, features))
    x_shape, logits_shape = static_shape(x), static_shape(logits)
    if not proposals or x_shape is None or logits_shape is None:
        return None
    generator = np.random.default_rng(7)
    tokens = int(np.prod(x_shape)) // features
    frames = -(-experts // tokens)  # so many that each expert has a row
    rows = sample_rows(generator, frames * tokens, proposals[0])
    scores = sample_scores(generator, frames * tokens, experts)
    results = []
    for part in np.split(np.arange(len(rows)), frames):
        feeds = {x: rows[part].reshape(x_shape), logits: scores[part].reshape(logits_shape)}
        values = run(model, feeds, [y])
        if values is None or values[0].size != part.size * features:
            return None
        results.append(values[0].reshape(-1, features))
    found = nearest_form(rows, scores, np.concatenate(results), proposals, k)
    if found.error >= TOLERANCE:
        return None
    return Proof(found.weights, found.function, found.normalise, nodes)


def sample_rows(generator: np.random.Generator, count: int, weights: ExpertWeights) -> np.ndarray:
    """Rows ``[count, D]``, float32, that give hidden values where the functions differ."""
    experts, hidden, features = weights.w1.shape
    size = np.sqrt(np.square(weights.w1.astype(np.float64)).sum() / (experts * hidden))
    rows = generator.normal(size=(count, features)) * (_HIDDEN / size if size else 1)
    return rows.astype(np.float32)


def sample_scores(generator: np.random.Generator, count: int, experts: int) -> np.ndarray:
    """Logits ``[count, E]``, float32, of which each expert in turn has the largest."""
    scores = generator.normal(size=(count, experts)) * 2
    rows = np.arange(count)
    scores[rows, rows % experts] = scores.max(-1) + 1
    return scores.astype(np.float32)


def nearest_form(
    rows: np.ndarray,
    scores: np.ndarray,
    found: np.ndarray,
    proposals: Iterable[ExpertWeights],
    k: int,
    functions: Sequence[str] = tuple(FUNCTIONS),
    normalisations: Sequence[str] = tuple(NORMALISATIONS),
) -> Form:
    """The canonical form whose results are nearest to ``found``; of equals, the first."""
    if k == scores.shape[-1]:
        normalisations = normalisations[:1]  # where all are chosen, there is no difference
    factors = {name: _combine(scores, k, name) for name in normalisations}
    return min(_forms(rows, factors, found, proposals, functions), key=lambda form: form.error)


def _forms(
    rows: np.ndarray,
    factors: dict[str, np.ndarray],
    found: np.ndarray,
    proposals: Iterable[ExpertWeights],
    functions: Sequence[str],
) -> Iterator[Form]:
    found = found.astype(np.float64)
    for weights in proposals:
        w1, b1, w2, b2 = (
            torch.from_numpy(np.array(array))
            for array in (weights.w1, weights.b1, weights.w2, weights.b2)
        )
        # Every expert on every row.
        hidden = torch.einsum("td,ehd->eth", torch.from_numpy(rows), w1) + b1[:, None]
        for function in functions:
            each = torch.einsum("eth,edh->etd", FUNCTIONS[function](hidden), w2) + b2[:, None]
            for normalise, combined in factors.items():
                value = np.einsum("te,etd->td", combined, each.numpy().astype(np.float64))
                # What the last bias adds says nothing of the form, but rounds the rest.
                decided = np.abs(found - combined @ weights.b2).max()
                scale = decided + _ROUNDING / TOLERANCE * np.abs(found).max() + 1e-30
                error = float(np.abs(value - found).max() / scale)
                error = error if np.isfinite(error) else np.inf
                yield Form(error, weights, function, normalise)


def _combine(scores: np.ndarray, k: int, normalise: str) -> np.ndarray:
    """Weight of each expert for each token, ``[tokens, experts]``; 0 where it is not chosen."""
    scores = scores.astype(np.float64)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    weights = exponents / exponents.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1, kind="stable")
    np.put_along_axis(weights, order[:, k:], 0.0, axis=-1)
    return weights / weights.sum(-1, keepdims=True) if normalise == "chosen" else weights
