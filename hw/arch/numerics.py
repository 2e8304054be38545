"""Integer arithmetic of the accelerator. Gateware, golden device, PyTorch path and compiler agree
with it to the last bit.

Every function takes and returns integers (Python's or numpy int64 arrays, element by element), and
no intermediate value needs more than 64 bits within the stated ranges.
"""

import numpy as np

__all__ = ["EXP2", "FACTOR_BITS", "GATE_BITS", "NORM_FRACTION_BITS", "OCTAVE_BITS", "PAIR_BITS",
           "PROBABILITY_BITS", "PRODUCT_BITS", "accumulate_residual", "bit_length", "exp2_weight",
           "gated", "norm_fraction_bits", "normalise", "octaves", "probability", "product", "reciprocal", "requantise",
           "rotate", "row_scale", "saturate", "scale"]

OCTAVE_BITS = 8  # fraction bits of the exponent in 2**-t
PROBABILITY_BITS = 10  # an unnormalised attention probability: 0..1023, the row maximum is 1023
GATE_BITS = 16  # a gate weight: 65535 stands for one
PRODUCT_BITS = 10  # fraction bits of the 16-bit factor of a product: +-32
NORM_FRACTION_BITS = 10  # a normalised value of up to 2,047 channels: |x| < 32 in int16
FACTOR_BITS = 14  # fraction bits of a cosine or sine that turns a pair
PAIR_BITS = 6  # fraction bits, of a step of the int8 result, that a value has before it is turned

# 2**(-i / 256), scaled to 65472 = 1023 * 64, so that rounding to the 10 bits of a probability
# cannot overflow.
EXP2 = tuple(round(65472 * 2 ** (-i / 256)) for i in range(256))
_EXP2 = np.array(EXP2, np.int64)


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
    """Bits of a non-negative number below 2**63: 0 for 0, 1 for 1, 2 for 2 and 3."""
    value = np.asarray(value, np.int64)
    # The bit below the top one is cleared, so that no float64 is rounded up to a power of two.
    return np.frexp((value & ~(value >> 1)).astype(np.float64))[1].astype(np.int64)


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


def norm_fraction_bits(channels: int) -> int:
    """Fraction bits of a normalised value of a row of 1..65535 channels. No value is beyond
    ``sqrt(channels)``; in wide rows that always fits, as in language models the loudest channels of
    some tokens come near to it."""
    if channels <= 2047:
        return NORM_FRACTION_BITS
    return 15 - (channels.bit_length() + 1) // 2


def normalise(row, channels: int, epsilon: int, *, centred: bool = True):
    """Normalised values of rows of int16, with ``f = norm_fraction_bits(channels)`` fraction bits,
    int16.

    row : int64 [..., channels]; epsilon : ``eps * channels**2`` in squared units of the stream,
    0..2**48 - 1. With S the sum of the row (0 unless `centred`) and Q the sum of squares,
    ``V = channels * Q - S**2 + epsilon`` is ``channels**2`` times the variance; the result is
    ``(channels * x - S) / sqrt(V)``, by a root of 16 bits and its reciprocal of 17:

    1. h is the least number with V < 2**(2 h); v = V << (32 - 2 h), or V >> (2 h - 32) past 32 bits;
    2. q = floor(sqrt(v)), 2**15 <= q < 2**16 unless V is 0;
    3. r = floor(2**32 / q), of 17 bits and one carry (2**16 < r <= 2**17);
    4. y = ((channels * x - S) * r + 2**(h + 15 - f)) >> (h + 16 - f), saturated to int16.

    V = 0 gives zeros. channels : 1..65535, so that V is below ``channels**2 * 2**30 + 2**48 < 2**63``.
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
    shift = half + 16 - norm_fraction_bits(channels)
    scaled = ((channels * row - total) * inverse + (np.int64(1) << (shift - 1))) >> shift
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
