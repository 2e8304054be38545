import numpy as np
import pytest

from moeware.compiler.errors import CompileError
from moeware.compiler.operators import FUNCTIONS
from moeware.compiler.scales import (
    FUNCTION,
    coarsened,
    encode_scale,
    encode_scales,
    function_table,
    grid,
    shifted_grid,
)
from moeware.hw.arch import numerics


@pytest.mark.parametrize("real", [2.0**-20, 1e-4, 0.3, 0.5, 0.99999999, 1.0, 3.7, 65535 / 65536, 700.1])
def test_encoded_scales_keep_15_bits(real):
    multiplier, shift = encode_scale(real)
    assert 1 <= shift <= 47 and 0 <= multiplier <= 65535
    assert abs(multiplier / 2**shift / real - 1) <= 2.0**-15
    value = 1 << 20
    assert abs(int(numerics.scale(value, multiplier, shift)) - value * real) <= value * real / 2**15 + 1


def test_extreme_scales():
    assert encode_scale(0.0) == (0, 1)
    assert encode_scale(2.0**-60) == (0, 47)
    assert encode_scale(32767.0) == (65534, 1)
    for real in (-1.0, 32768.0, float("nan"), float("inf")):
        with pytest.raises(CompileError, match="A scale between two tensors"):
            encode_scale(real)


def test_arrays_keep_their_shape():
    multiplier, shift = encode_scales(np.array([[0.5, 1.0], [2.0, 0.0]]))
    assert multiplier.shape == shift.shape == (2, 2)
    assert multiplier.dtype == np.uint16 and shift.dtype == np.uint8


@pytest.mark.parametrize("largest, unit", [(128, 2.0**-17), (128.5, 2.0**-16), (33000, 2.0**-8)])
def test_coarsened_scales_are_a_little_larger_and_on_the_grid(largest, unit):
    real = np.array([8.1, 9.0, 100.25, 30000.5]) * unit
    found = coarsened(real, np.full(4, largest))
    np.testing.assert_array_equal(found / unit, [9, 9, 101, 30001])
    multiplier, shift = encode_scales(found)
    np.testing.assert_array_equal(multiplier / 2.0**shift, found)
    for left in (6.9 * unit, 65536.5 * unit, 0.0):
        assert coarsened(np.array(left), np.array(largest)) == left


def test_a_grid_clips_an_outlier_when_that_pays():
    samples = np.random.default_rng(0).normal(size=100_000)
    fine = grid(samples)
    assert fine < np.abs(samples).max() / 127  # a normal tail is worth clipping
    uniform = np.linspace(-1, 1, 10_001)
    assert grid(uniform) == pytest.approx(1 / 127, rel=0.03)  # a uniform one is not: a float grid
    assert grid(np.zeros(5)) == 1.0


def test_a_grid_of_few_rows_leaves_room_for_what_they_do_not_show():
    row = np.linspace(-1, 1, 1001)
    assert grid(row[None]) == pytest.approx(2 / 127, rel=0.03)
    assert grid(np.tile(row, (4, 1))) == pytest.approx(1.5 / 127, rel=0.03)


def test_a_grid_before_a_gelu_gives_up_its_flat_side():
    samples = np.concatenate([np.linspace(-10, -6, 1000), np.linspace(-1, 1, 1000)])
    assert grid(samples, of=FUNCTION["gelu"]) < 0.6 * grid(samples)


@pytest.mark.parametrize("function", FUNCTION)
def test_tables_hold_the_rounded_function(function):
    import torch
    exact = FUNCTIONS[function]
    for offsets in ((0.0, 0.0), (0.4, 1.1)):
        table = function_table(function, (0.03, offsets[0]), (0.02, offsets[1]))
        for byte in (0, 1, 127, 128, 200, 255):
            argument = (byte - 256 if byte > 127 else byte) * 0.03 + offsets[0]
            value = exact(torch.tensor(argument, dtype=torch.float64)).item() - offsets[1]
            assert table[byte] == np.clip(np.rint(value / 0.02), -128, 127)


def test_a_shifted_grid_spends_all_integers_on_one_side():
    samples = np.random.default_rng(3).uniform(0, 2, (4096, 8))
    step, offset = shifted_grid(samples)
    assert step == pytest.approx(2 / 255, rel=0.03) and step < 0.6 * grid(samples)
    integers = np.clip(np.rint((samples - offset) / step), -128, 127)
    assert np.abs(integers * step + offset - samples).max() <= 1.6 * step
    assert shifted_grid(np.zeros((3, 2))) == (1.0, 0.0)
    # What a GELU flattens may clip.
    spread = np.random.default_rng(4).normal(0, 3, (4096, 8))
    step, offset = shifted_grid(spread, of=FUNCTION["gelu"])
    assert offset - 128 * step > spread.min() / 2
