"""Numbers on which the forms of a mixture of experts differ."""

import numpy as np

from moeware.compiler.fuse.moe_weights import ExpertWeights
from moeware.compiler.fuse.routers import RouterForm, sample_mixed

__all__ = ["sample_edges", "sample_rows", "sample_scores"]

# Root of the mean square of hidden values: the two forms of GELU differ most where they are 2 to 3.
_HIDDEN = 2.0
_DRAWS = 16  # of a row's logits, of which one is taken
_LITTLE = 1e-3  # weight of a chosen expert


def sample_rows(generator: np.random.Generator, count: int, weights: ExpertWeights) -> np.ndarray:
    """Rows ``[count, D]``, float32, that give hidden values where the functions differ."""
    experts, hidden, features = weights.w1.shape
    size = np.sqrt(np.square(weights.w1.astype(np.float64)).sum() / (experts * hidden))
    rows = generator.normal(size=(count, features)) * (_HIDDEN / size if size else 1)
    return rows.astype(np.float32)


def sample_scores(generator: np.random.Generator, count: int, router: RouterForm) -> np.ndarray:
    """Logits ``[count, E]``, float32, of which each expert in turn has the largest.

    Where ``router`` may still choose others, each row is the one of several that gives the most weight
    to the expert whose turn it is.
    """
    experts, rows = len(router.correction), np.arange(count)
    if router.attributes["score"] == "sparse":  # whose weights are mostly 1 on such logits
        return sample_mixed(rows % experts, experts, router.attributes["threshold"], generator)
    scores = generator.normal(size=(_DRAWS, count, experts)) * 2
    scores[:, rows, rows % experts] = scores.max(-1) + 1
    scores = scores.astype(np.float32)
    weights = router.dense(scores.reshape(-1, experts)).reshape(scores.shape)
    return scores[weights[:, rows, rows % experts].argmax(0), rows]


def sample_edges(generator: np.random.Generator, count: int, router: RouterForm) -> np.ndarray:
    """Logits ``[count, E]``, float32, by turns nearly alike, such that they give a chosen expert `_LITTLE`
    weight, and as far apart as `router` tells from one another."""
    experts, rows = len(router.correction), np.arange(count)
    if router.attributes["score"] == "sparse":
        return sample_scores(generator, count, router)
    # Sigmoids of larger logits are 1 in float32, and probabilities of smaller ones 0.
    alone = router.attributes["score"] == "softmax" and not router.correction.any()
    scale = np.resize([0.1, 2, 64 if alone else 4], count)
    scores = generator.normal(size=(_DRAWS, count, experts)) * scale[:, None]
    scores = scores.astype(np.float32)
    weights = router.dense(scores.reshape(-1, experts)).reshape(scores.shape)
    least = np.where(weights > 0, weights, np.inf).min(-1)
    return scores[np.abs(np.log(least / _LITTLE)).argmin(0), rows]
