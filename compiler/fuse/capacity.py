"""How many tokens an expert takes of a frame, and which: measured and proved by running the region.

All tokens alike, and so of one choice, show the capacity: only the tokens that find a place have a
result. Tokens that crowd on a few experts, in another order of preference each, tell the orders apart in
which places are given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moeware.compiler.canonical_rules import ORDERS
from moeware.compiler.fuse.routers import RouterForm

__all__ = ["crowded_scores", "limited_forms", "measured_capacity"]

_CROWDED_ROWS = 64  # at least
_CROWDED_FRAMES = 4  # at least
_LIKED = 0.5  # logits by which a crowd prefers its experts to all others, at least

# From rows [n, D] and logits [n, E] of whole frames to results [n, D]; None if they cannot run.
Call = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


def measured_capacity(call: Call, rows: np.ndarray, scores: np.ndarray, tokens: int) -> int:
    """How many of a frame's tokens an expert takes where all choose alike; 0 if that is all of them.

    rows, scores : float32 [n, D] and [n, E], of which one is taken that has a result.
    """
    for row, score in zip(rows, scores):
        found = call(np.tile(row, (tokens, 1)), np.tile(score, (tokens, 1)))
        if found is None:
            return 0
        if found.any():
            places = int(found.any(-1).sum())
            return places if places < tokens else 0
    return 0


def crowded_scores(
    generator: np.random.Generator, tokens: int, experts: int, chosen: int
) -> np.ndarray:
    """Logits float32 [frames, tokens, experts]: in every other frame all tokens choose the same experts,
    in another order each; in the others they have the first choice in common."""
    frames = max(_CROWDED_FRAMES, math.ceil(_CROWDED_ROWS / tokens))
    scores = generator.normal(size=(frames, tokens, experts))
    for number, frame in enumerate(scores):
        liked = np.zeros(experts, bool)
        liked[(number + np.arange(1 if number % 2 else chosen)) % experts] = True
        best = frame[:, ~liked].max(-1, keepdims=True, initial=-np.inf)
        lift = np.maximum(best - frame[:, liked].min(-1, keepdims=True) + _LIKED, 0)
        frame[:, liked] += lift
    return scores.astype(np.float32)


def limited_forms(forms: Sequence[RouterForm], capacity: int) -> list[RouterForm]:
    """The ``forms`` with a capacity, in every order, and with weights divided before or after."""
    normalised = [replace(forms[0], attributes=forms[0].attributes | {"normalise": "kept"})]
    return [replace(form, attributes=form.attributes | {"capacity": capacity, "order": order})
            for order in ORDERS for form in (*forms, *normalised)]
