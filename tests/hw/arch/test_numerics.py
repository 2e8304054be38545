"""The arithmetic against exact rationals and against real mathematics."""

import math
from fractions import Fraction

import numpy as np
import pytest

from moeware.hw.arch import numerics

RNG = np.random.default_rng(1)
INT32 = [-2**31, -2**31 + 1, -1, 0, 1, 2**31 - 1]


def floor_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@pytest.mark.parametrize("shift", [1, 2, 15, 16, 31, 47])
def test_scale_rounds_ties_up(shift):
    values = INT32 + RNG.integers(-2**31, 2**31, 50).tolist()
    for value in values:
        for multiplier in (0, 1, 3, 32768, 65535):
            exact = floor_half_up(Fraction(value * multiplier, 2**shift))
            assert numerics.scale(value, multiplier, shift) == exact
            assert numerics.requantise(value, multiplier, shift) == min(127, max(-128, exact))


def test_gated_rounds_ties_up_and_keeps_16_bits():
    for update in (-32768, -1, 0, 1, 32767):
        for weight in (0, 1, 32768, 65535):
            exact = floor_half_up(Fraction(update * weight, 65536))
            assert numerics.gated(update, weight) == exact
            assert -32768 <= exact <= 32767


@pytest.mark.parametrize("value", [-128, -127, -1, 0, 1, 127])
def test_product_rounds_ties_up_and_saturates_to_8_bits(value):
    factors = [-32768, -1025, -1024, -512, -1, 0, 1, 511, 512, 513, 1023, 1024, 1025, 32767]
    for factor in factors + RNG.integers(-2048, 2048, 200).tolist():
        exact = floor_half_up(Fraction(value * factor, 1024))
        assert numerics.product(value, factor) == min(127, max(-128, exact))
    assert numerics.product(value, 1024) == value


def test_product_at_its_borders():
    pairs = [(1, 512, 1), (1, -512, 0), (-1, 512, 0), (1, 511, 0), (1, -513, -1), (-128, -1024, 127),
             (-128, 1024, -128), (127, 1028, 127), (127, 1029, 127), (-128, 1032, -129 + 1),
             (-127, 1024, -127), (-128, -32768, 127), (-128, 32767, -128)]
    values, factors, products = np.array(pairs).T
    assert numerics.product(values, factors).tolist() == products.tolist()


def test_bit_length_is_exact_next_to_powers_of_two():
    values = [v for e in range(63) for v in ((1 << e) - 1, 1 << e, (1 << e) + 1)]
    values.append((1 << 63) - 1)
    assert numerics.bit_length(values).tolist() == [v.bit_length() for v in values]


def test_exp2_is_a_power_of_two_to_its_last_place():
    steps = np.arange(16 << numerics.OCTAVE_BITS)
    real = 65472 * 2.0 ** (-steps / 256)
    assert (np.abs(numerics.exp2_weight(steps) - real) <= 1.5).all()
    assert numerics.exp2_weight(0) == 65472
    assert numerics.probability(0) == 1023
    assert numerics.probability(steps).max() == 1023


def test_octaves_clamp_before_16():
    assert numerics.octaves(2**32 - 1, 65535, 1) == (16 << 8) - 1
    assert numerics.octaves(0, 65535, 1) == 0


@pytest.mark.parametrize("total", [1, 2, 3, 1023, 1024, 2**22, 2**31 + 7, 2**32 - 1])
def test_reciprocal_is_the_largest_below(total):
    r, e = (int(v) for v in numerics.reciprocal(total))
    assert e == total.bit_length()
    assert r == min(2 ** (e + 15) // total, 65535)


def test_row_scale_divides_by_the_total():
    for total in (1023, 5000, 1023 * 4096):
        m, s = numerics.row_scale(total, 40000, 16)
        weighted = total * 100  # every value is 100
        assert numerics.requantise(weighted, m, s) == round(100 * 40000 / 65536)


@pytest.mark.parametrize("channels", [1, 2, 3, 64, 192, 2047, 2048, 8192, 65535])
@pytest.mark.parametrize("centred", [True, False])
def test_normalise_is_a_normalisation(channels, centred):
    rows = RNG.integers(-32768, 32768, (20, channels))
    rows[0] = 7  # no variance
    rows[1] = 32767
    rows[2] = -32768
    epsilon = 3 * channels**2
    got = numerics.normalise(rows, channels, epsilon, centred=centred)
    centre = rows - rows.mean(-1, keepdims=True) * centred
    real = centre / np.sqrt((centre**2).mean(-1, keepdims=True) + 3)
    # A root of 16 bits and a product rounded once: one step, and 2**-14 of the value.
    one = 1 << numerics.norm_fraction_bits(channels)
    assert (np.abs(got / one - real) <= 1 / one + np.abs(real) * 2.0**-14).all()


def normalised(row, channels: int, epsilon: int, centred: bool = True) -> list[int]:
    """A row of ints, in exact rational arithmetic."""
    total = sum(row) if centred else 0
    variance = channels * sum(x * x for x in row) - total * total + epsilon
    if not variance:
        return [0] * len(row)
    half = (variance.bit_length() + 1) // 2
    aligned = (variance << (32 - 2 * half)) if half <= 16 else variance >> (2 * half - 32)
    inverse = (1 << 32) // math.isqrt(aligned)
    fraction = 10 if channels < 2048 else max(f for f in range(10) if 4**(15 - f) > channels)
    of = {x: floor_half_up(Fraction((channels * x - total) * inverse, 1 << (half + 16 - fraction)))
          for x in set(row)}
    return [min(32767, max(-32768, of[x])) for x in row]


def test_normalise_by_rational_arithmetic():
    for _ in range(200):
        channels = int(RNG.integers(1, 40))
        row = RNG.integers(-32768, 32768, channels) // int(RNG.integers(1, 5000))
        epsilon = int(RNG.integers(0, 1000))
        expected = normalised(row.tolist(), channels, epsilon)
        assert numerics.normalise(row, channels, epsilon).tolist() == expected


@pytest.mark.parametrize("channels", [2047, 2048, 4095, 8191, 8192, 20000, 65535])
def test_normalise_wide_rows_by_rational_arithmetic(channels):
    """Where the variance takes more bits than a float64 has: the largest ones, those whose rows are
    constant but for a channel, and none at all; and where it is next to a power of two."""
    rows = np.full((6, channels), -32768)
    rows[0, :channels // 2] = 32767
    rows[1, -1] = 32767
    rows[2] = 32767
    rows[3] = 0
    rows[3, 0] = -1
    rows[4] = RNG.choice([-32768, -20000, -1, 0, 3, 32767], channels)
    for centred in (True, False):
        for epsilon in (0, 1, (1 << 48) - 1):
            found = numerics.normalise(rows, channels, epsilon, centred=centred)
            for row, values in zip(rows.tolist(), found.tolist()):
                assert values == normalised(row, channels, epsilon, centred)


@pytest.mark.parametrize("bits, channels", [(54, 65519), (54, 33007), (56, 65503), (56, 33247)])
def test_normalise_next_to_powers_of_two(bits, channels):
    """As many channels of the largest magnitude as make ``channels * Q`` a little less than 2**bits,
    and epsilon up to there, where a float64 would round up; with these numbers a result tells."""
    row = np.zeros(channels, np.int64)
    row[:(1 << bits) // (channels << 30)] = -32768
    left = (1 << bits) - channels * int((row * row).sum())
    assert 0 < left < 1 << 48
    for epsilon in (left - 1, left):
        expected = normalised(row.tolist(), channels, epsilon, False)
        assert numerics.normalise(row, channels, epsilon, centred=False).tolist() == expected


@pytest.mark.parametrize("channels", [2048, 4095, 4096, 8191, 16383, 16384, 32767, 65535])
def test_the_loudest_channel_of_a_wide_row_does_not_saturate(channels):
    row = np.zeros(channels, np.int64)
    row[7] = -20000
    found = numerics.normalise(row, channels, 0, centred=False)
    one = 1 << numerics.norm_fraction_bits(channels)
    # One step, and 2**-14 of the value.
    assert abs(found[7] / one + math.sqrt(channels)) <= 1 / one + math.sqrt(channels) * 2.0**-14


def test_zero_variance_gives_zeros():
    assert not numerics.normalise(np.full((2, 5), 9), 5, 0).any()


def turned(a: int, b: int, cos: int, sin: int) -> list[int]:
    """One pair, in exact rational arithmetic."""
    return [min(127, max(-128, floor_half_up(Fraction(x, 1 << 20))))
            for x in (a * cos - b * sin, b * cos + a * sin)]


def test_rotate_by_rational_arithmetic():
    edges = [-32768, -32767, -16384, -1, 0, 1, 31, 32, 33, 16384, 32767]
    pairs = RNG.choice(edges, (500, 3, 2))
    factors = RNG.choice(edges, (500, 3, 2))
    got = numerics.rotate(pairs.reshape(500, 6), factors.reshape(500, 6))
    for row, pair, factor in zip(got.tolist(), pairs.tolist(), factors.tolist()):
        assert row == [y for p, f in zip(pair, factor) for y in turned(*p, *f)]


def test_rotate_turns_against_the_clock_and_rounds_ties_up():
    one = 1 << numerics.FACTOR_BITS
    values = [3 << numerics.PAIR_BITS, -5 << numerics.PAIR_BITS]
    for factors, expected in ([one, 0], [3, -5]), ([0, one], [5, 3]), ([-one, 0], [-3, 5]), (
            [0, -one], [-5, -3]):
        assert numerics.rotate(values, factors).tolist() == expected
    assert numerics.rotate([32, -32], [one, 0]).tolist() == [1, 0]  # of a half and minus a half
    assert numerics.rotate([31, -33], [one, 0]).tolist() == [0, -1]
    assert numerics.rotate([32767, -32768], [one, one]).tolist() == [127, 0]
    assert numerics.rotate([-32768, -32768], [-32768, 32767]).tolist() == [127, 0]


def test_rotate_by_one_row_of_factors_for_all_heads():
    values = RNG.integers(-8000, 8000, (4, 3, 6))
    factors = RNG.integers(-16384, 16385, (4, 1, 6))
    everywhere = np.broadcast_to(factors, values.shape)
    assert (numerics.rotate(values, factors) == numerics.rotate(values, everywhere)).all()
