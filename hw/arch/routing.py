"""Integer arithmetic of the router: which experts a token goes to, and with which weights.

As `numerics`, whose rules hold here, too.
"""

import numpy as np

from .numerics import GATE_BITS, exp2_weight, octaves, reciprocal, scale

__all__ = ["CORRECTION_BITS", "HIDDEN", "NEAR_BITS", "SIGMOID", "SIGMOID_BITS", "SIGMOID_SEGMENTS",
           "chosen_experts", "gate_weights", "in_best_groups", "near", "places", "route",
           "score_weights", "sigmoid_scores", "sparse_weights", "within_capacity"]

# 1 / (1 + 2**-t) at t = 0, 1/32, ... 16 octaves, with 4 bits more than a score: a chord between two
# of them lies 2**-17.6 below the curve at most. At 16 octaves a score is one step from one.
SIGMOID_BITS = 18  # of a place on the curve: octaves in steps of 2**-14
SIGMOID_SEGMENTS = 512
SIGMOID = tuple(round(2 ** 20 / (1 + 2 ** (-i / 32))) for i in range(SIGMOID_SEGMENTS + 1))
_SIGMOID = np.array(SIGMOID, np.int64)

CORRECTION_BITS = 22  # of what is added to a score for the choice
HIDDEN = -(1 << 32)  # what an expert outside of the best groups is compared by: below any logit
NEAR_BITS = 15  # fraction bits of the threshold, below 2, within which logits are near


def sigmoid_scores(logits, multiplier, shift):
    """Scores 1..65535, in units of 2**-16, by ``1 / (1 + exp(-logit))``; those of a logit and its
    negative add up to one.

    logits : int32; multiplier, shift : magnitude of a logit to octaves in steps of 2**-14, rounded
    by `scale` and clamped below 16 octaves. A score lies on the chord of its segment of `SIGMOID`,
    rounded, ties up: within 1.3 units of the curve (half of one for each rounding, and the chord),
    and never falling where the logit rises.
    """
    logits = np.asarray(logits, np.int64)
    place = np.minimum(scale(np.abs(logits), multiplier, shift), (1 << SIGMOID_BITS) - 1)
    bits = SIGMOID_BITS - (SIGMOID_SEGMENTS.bit_length() - 1)
    segment, part = place >> bits, place & ((1 << bits) - 1)
    rise = _SIGMOID[segment + 1] - _SIGMOID[segment]
    chord = (_SIGMOID[segment] << bits) + rise * part
    score = (chord + (1 << (bits + 3))) >> (bits + 4)
    return np.where(logits < 0, (1 << GATE_BITS) - score, score)


def in_best_groups(values, size: int, count: int, *, pair: bool):
    """`values` of the experts in the `count` best groups, and `HIDDEN` for the others.

    values : int64 [..., experts], what experts are compared by; groups are `size` experts that
    follow one another. A group is as good as its largest value or, for `pair`, the sum of its two
    largest; ties to the lower group (DeepSeek-V2, section 2.2.2; DeepSeek-V3, section 2.1.2).
    """
    values = np.asarray(values, np.int64)
    groups = values.reshape(*values.shape[:-1], -1, size)
    best = np.sort(groups, -1)[..., -1 - pair:].sum(-1)
    seen = np.zeros(best.shape, bool)
    np.put_along_axis(seen, chosen_experts(best, count), True, -1)
    return np.where(seen[..., None], groups, HIDDEN).reshape(values.shape)


def chosen_experts(logits, count: int):
    """Indices of the `count` largest logits, largest first, ties to the lower index.

    logits : int64 [..., experts]; returns int64 [..., count].
    """
    return np.argsort(-np.asarray(logits, np.int64), axis=-1, kind="stable")[..., :count]


def gate_weights(logits, indices, multiplier: int, shift: int, *, over_chosen: bool):
    """Gate weights 0..65535 of the chosen experts: softmax over the chosen or over all experts.

    logits : int64 [..., experts]; indices : int64 [..., chosen] from `chosen_experts`.
    ``p = exp2_weight(octaves(maximum - logit))``; weight ``= min((p * r) >> (e - 1), 65535)`` with
    (r, e) = `reciprocal` of the sum of p over the chosen or all.
    """
    logits = np.asarray(logits, np.int64)
    weights = exp2_weight(octaves(logits.max(-1, keepdims=True) - logits, multiplier, shift))
    chosen = np.take_along_axis(weights, indices, -1)
    r, e = reciprocal((chosen if over_chosen else weights).sum(-1, keepdims=True))
    return np.minimum((chosen * r) >> (e - 1), (1 << GATE_BITS) - 1)


def score_weights(scores, indices, *, over_chosen: bool):
    """Gate weights 0..65535 of the chosen experts: their scores, or these divided by their sum.

    scores : from `sigmoid_scores`, int64 [..., experts]; indices : int64 [..., chosen]. As
    `gate_weights` with the score as p; where nothing is divided, the sum is one, 2**16, and a
    weight is the score less one unit.
    """
    chosen = np.take_along_axis(np.asarray(scores, np.int64), indices, -1)
    r, e = reciprocal(chosen.sum(-1, keepdims=True) if over_chosen else np.int64(1 << GATE_BITS))
    return np.minimum((chosen * r) >> (e - 1), (1 << GATE_BITS) - 1)


def near(logits, largest, threshold: int):
    """Whether ``(largest - logit) / max(|logit|, largest)`` is at most the threshold, without division.

    logits : int32, none above `largest`; threshold : 0..65535, with `NEAR_BITS` fraction bits. What is
    divided by is positive, but where all are 0, which are near; nothing is further than 2.
    """
    logits, largest = np.asarray(logits, np.int64), np.asarray(largest, np.int64)
    return (largest - logits) << NEAR_BITS <= threshold * np.maximum(np.abs(logits), largest)


def sparse_weights(logits, indices, multiplier: int, shift: int, threshold: int):
    """Gate weights 0..65535 of experts that are chosen one after another: of each the softmax over
    those that are `near` it and not chosen before (SparseMixer-v2 without noise: Liu et al. 2024, GRIN).

    logits : int64 [..., experts]; indices : int64 [..., chosen] from `chosen_experts`. As
    `gate_weights` with the sum of p over these.
    """
    left, weights = np.ones(np.shape(logits), bool), []
    for index in np.split(indices, indices.shape[-1], -1):
        largest = np.take_along_axis(logits, index, -1)
        below = np.where(left, largest - logits, 0)
        p = exp2_weight(octaves(below, multiplier, shift))
        total = np.where(left & near(largest - below, largest, threshold), p, 0).sum(-1, keepdims=True)
        r, e = reciprocal(total)
        weights.append(np.minimum((np.take_along_axis(p, index, -1) * r) >> (e - 1),
                                  (1 << GATE_BITS) - 1))
        np.put_along_axis(left, index, False, -1)
    return np.concatenate(weights, -1)


def route(logits, corrections, *, chosen: int, over_chosen: bool, multiplier: int, shift: int,
          sigmoid: bool = False, by_score: bool = False, group: int = 0,
          chosen_groups: int = 0, pair: bool = False, sparse: bool = False, threshold: int = 0):
    """Chosen experts of each row and their gate weights, int64 [..., chosen] both; the arguments as
    LINEAR has them.

    Experts are compared by their logits or, `by_score`, by score plus correction: 1..2**22 + 65534.
    logits : int32 [..., experts]; corrections : 0..2**22 - 1, units of 2**-16, [experts].
    """
    scores = sigmoid_scores(logits, multiplier, shift) if sigmoid else None
    values = scores + corrections if by_score else np.asarray(logits, np.int64)
    if group:
        values = in_best_groups(values, group, chosen_groups, pair=pair)
    indices = chosen_experts(values, chosen)
    if sigmoid:
        return indices, score_weights(scores, indices, over_chosen=over_chosen)
    if sparse:
        return indices, sparse_weights(values, indices, multiplier, shift, threshold)
    return indices, gate_weights(logits, indices, multiplier, shift, over_chosen=over_chosen)


def places(experts):
    """How many of the choices before it are of the same expert: the place in its queue.

    experts : int64 of any shape, choices in the order in which they are queued; as large a result.
    """
    flat = np.asarray(experts, np.int64).ravel()
    order = np.argsort(flat, kind="stable")
    alike = flat[order]
    place = np.empty_like(flat)
    place[order] = np.arange(len(flat)) - np.searchsorted(alike, alike)
    return place.reshape(np.shape(experts))


def within_capacity(experts, capacity: int, *, by_rank: bool):
    """Which choices of a frame find a place in their expert's queue, bool [rows, chosen].

    A queue takes `capacity` tokens, those that come first: row after row (Switch Transformer: Fedus
    et al. 2022, section 2.2), or `by_rank` the first choices of all rows before any second one
    (GShard: Lepikhin et al. 2021, algorithm 1; V-MoE: Riquelme et al. 2021, section 2.4).
    experts : int64 [rows, chosen], the largest first.
    """
    place = places(experts.T).T if by_rank else places(experts)
    return place < capacity
