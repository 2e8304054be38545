"""Integer arithmetic of the accelerator. Gateware, golden device, PyTorch path and compiler agree
with it to the last bit.

Every function takes and returns integers (Python's or numpy int64 arrays, element by element), and
no intermediate value needs more than 64 bits within the stated ranges.
"""

import numpy as np

__all__ = ["CORRECTION_BITS", "EXP2", "FACTOR_BITS", "GATE_BITS", "HIDDEN", "NEAR_BITS",
           "NORM_FRACTION_BITS", "OCTAVE_BITS", "PAIR_BITS", "PROBABILITY_BITS", "PRODUCT_BITS", "SIGMOID", "SIGMOID_BITS",
           "SIGMOID_SEGMENTS", "accumulate_residual", "bit_length", "chosen_experts", "exp2_weight",
           "gate_weights", "gated", "in_best_groups", "near", "normalise", "octaves", "probability", "product",
           "reciprocal", "requantise", "rotate", "route", "row_scale", "saturate", "scale",
           "score_weights", "sigmoid_scores", "sparse_weights"]

OCTAVE_BITS = 8  # fraction bits of the exponent in 2**-t
PROBABILITY_BITS = 10  # an unnormalised attention probability: 0..1023, the row maximum is 1023
GATE_BITS = 16  # a gate weight: 65535 stands for one
PRODUCT_BITS = 10  # fraction bits of the 16-bit factor of a product: +-32
NORM_FRACTION_BITS = 10  # a normalised value: |x| < 32 in int16
FACTOR_BITS = 14  # fraction bits of a cosine or sine that turns a pair
PAIR_BITS = 6  # fraction bits, of a step of the int8 result, that a value has before it is turned

# 2**(-i / 256), scaled to 65472 = 1023 * 64, so that rounding to the 10 bits of a probability
# cannot overflow.
EXP2 = tuple(round(65472 * 2 ** (-i / 256)) for i in range(256))
_EXP2 = np.array(EXP2, np.int64)

# 1 / (1 + 2**-t) at t = 0, 1/32, ... 16 octaves, with 4 bits more than a score: a chord between two
# of them lies 2**-17.6 below the curve at most. At 16 octaves a score is one step from one.
SIGMOID_BITS = 18  # of a place on the curve: octaves in steps of 2**-14
SIGMOID_SEGMENTS = 512
SIGMOID = tuple(round(2 ** 20 / (1 + 2 ** (-i / 32))) for i in range(SIGMOID_SEGMENTS + 1))
_SIGMOID = np.array(SIGMOID, np.int64)

CORRECTION_BITS = 22  # of what is added to a score for the choice
HIDDEN = -(1 << 32)  # what an expert outside of the best groups is compared by: below any logit
NEAR_BITS = 15  # fraction bits of the threshold, below 2, within which logits are near


def saturate(value, bits: int):
    """The nearest number that `bits` bits in two's complement hold."""
    return np.clip(value, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def scale(value, multiplier, shift):
    """``floor(value * multiplier / 2**shift + 1/2)``: ties up.

    value : int32; multiplier : 0..65535; shift : 1..47.
    """
    product = np.asarray(value, np.int64) * multiplier
    return (product + (np.int64(1) << (np.asarray(shift, np.int64) - 1))) >> shift


def requantise(value, multiplier, shift, bits: int = 8):
    """`scale`, saturated to `bits` bits."""
    return saturate(scale(value, multiplier, shift), bits)


def accumulate_residual(residual, update):
    """The int16 residual stream after an int16 update, saturated."""
    return saturate(np.asarray(residual, np.int64) + update, 16)


def gated(update, weight):
    """An int16 update under a gate weight (0..65535): ``floor(update * weight / 65536 + 1/2)``."""
    return (np.asarray(update, np.int64) * weight + (1 << (GATE_BITS - 1))) >> GATE_BITS


def product(value, factor):
    """An int8 times an int16 factor, int8: ``floor(value * factor / 2**PRODUCT_BITS + 1/2)``,
    saturated."""
    exact = np.asarray(value, np.int64) * factor
    return saturate((exact + (1 << (PRODUCT_BITS - 1))) >> PRODUCT_BITS, 8)


def bit_length(value):
    """Bits of a non-negative number below 2**53: 0 for 0, 1 for 1, 2 for 2 and 3."""
    return np.frexp(np.asarray(value, np.float64))[1].astype(np.int64)


def octaves(difference, multiplier, shift):
    """How far below the maximum a score lies, in 1/256 octaves, clamped to 16 octaves less one step.

    difference : maximum minus score, 0..2**32 - 1; multiplier : 0..65535; shift : 1..47.
    """
    return np.minimum(scale(difference, multiplier, shift), (16 << OCTAVE_BITS) - 1)


def exp2_weight(steps):
    """``65472 * 2**(-steps / 256)``, truncated: 0..65472 for `steps` from `octaves`."""
    return _EXP2[np.asarray(steps) & 255] >> (np.asarray(steps) >> OCTAVE_BITS)


def probability(steps):
    """`exp2_weight` rounded to `PROBABILITY_BITS` bits, ties up."""
    drop = 16 - PROBABILITY_BITS
    return (exp2_weight(steps) + (1 << (drop - 1))) >> drop


def reciprocal(total):
    """``(r, e)`` with ``1 / total ~ r / 2**(e + 15)`` and r of 16 bits: e is the bit length of
    `total` (1..2**32 - 1) and r is ``min(floor(2**(e + 15) / total), 65535)``."""
    e = bit_length(total)
    return np.minimum((np.int64(1) << (e + 15)) // total, 65535), e


def row_scale(total, multiplier, shift):
    """The scale that turns a row's sum of probability times value into int8.

    total : sum of the row's probabilities, 1..2**22; multiplier : 0..65535; shift : 1..47. Returns
    ``(m, s)`` for `requantise`: ``m = (r * multiplier + 2**15) >> 16``, and ``s = shift + e - 1``,
    which must not exceed 47, with (r, e) from `reciprocal`. So the result is
    ``sum * multiplier / 2**shift / total``.
    """
    r, e = reciprocal(total)
    return (r * multiplier + (1 << 15)) >> 16, shift + e - 1


def normalise(row, channels: int, epsilon: int, *, centred: bool = True):
    """Normalised values of rows of int16, with `NORM_FRACTION_BITS` fraction bits, int16.

    row : int64 [..., channels]; epsilon : ``eps * channels**2`` in squared units of the stream,
    0..2**48 - 1. With S the sum of the row (0 unless `centred`) and Q the sum of squares,
    ``V = channels * Q - S**2 + epsilon`` is ``channels**2`` times the variance; the result is
    ``(channels * x - S) / sqrt(V)``, by a root of 16 bits and its reciprocal of 17:

    1. h is the least number with V < 2**(2 h); v = V << (32 - 2 h), or V >> (2 h - 32) past 32 bits;
    2. q = floor(sqrt(v)), 2**15 <= q < 2**16 unless V is 0;
    3. r = floor(2**32 / q), of 17 bits and one carry (2**16 < r <= 2**17);
    4. y = ((channels * x - S) * r + 2**(h + 5)) >> (h + 6), saturated to int16.

    V = 0 gives zeros. channels : 1..2047.
    """
    row = np.asarray(row, np.int64)
    total = row.sum(-1, keepdims=True) if centred else np.zeros_like(row[..., :1])
    variance = channels * (row * row).sum(-1, keepdims=True) - total * total + epsilon
    half = (bit_length(variance) + 1) >> 1
    aligned = np.where(half <= 16, variance << np.maximum(32 - 2 * half, 0),
                       variance >> np.maximum(2 * half - 32, 0))
    root = np.sqrt(aligned.astype(np.float64)).astype(np.int64)
    root -= root * root > aligned  # a 32-bit root in float64 is exact but for rounding up
    inverse = (1 << 32) // np.maximum(root, 1)
    scaled = ((channels * row - total) * inverse + (np.int64(1) << (half + 5))) >> (half + 6)
    return np.where(variance == 0, 0, saturate(scaled, 16))


def rotate(values, factors):
    """Pairs of adjacent values turned by an angle each, int8 (RoFormer: Su et al. 2021, section 3.4).

    values : int16 [..., channels]; factors : int16 of the same shape, or one that broadcasts to it,
    cosine and sine of each pair with `FACTOR_BITS` fraction bits. With s = FACTOR_BITS + PAIR_BITS,
    ``(a, b) -> (a cos - b sin, b cos + a sin)``, each ``(x + 2**(s - 1)) >> s``, saturated.
    """
    values, factors = np.asarray(values, np.int64), np.asarray(factors, np.int64)
    (a, b), (cos, sin) = ((array[..., 0::2], array[..., 1::2]) for array in (values, factors))
    turned = np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(values.shape)
    drop = FACTOR_BITS + PAIR_BITS
    return saturate((turned + (1 << (drop - 1))) >> drop, 8)


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
