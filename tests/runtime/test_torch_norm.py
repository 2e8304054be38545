"""Norms of the PyTorch path against a plain numpy evaluation, exactly."""

import dataclasses

import numpy as np
import pytest

from moeware.hw.arch import numerics
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.quantised import Affine
from moeware.runtime.torch_path import TorchDevice

from .reference import Graph, evaluate
from .test_torch_path import compare


@pytest.mark.parametrize("mode", list(NormMode))
@pytest.mark.parametrize("channels", [1, 2, 31, 1200, 2048, 5001])
def test_norm(mode, channels):
    for first_row, epsilon in ((0, 0), (2, 1), (1, (1 << 48) - 1)):
        graph = Graph(channels)
        source = graph.input(5, channels, Memory.RESIDUAL)
        graph.norm(source, mode, first_row=first_row, rows=3, epsilon=epsilon)
        compare(graph)


@pytest.mark.parametrize("mode", list(NormMode))
@pytest.mark.parametrize("gain", [1, 6], ids=["fitting", "saturating"])
@pytest.mark.parametrize("groups, width", [(1, 12), (2, 6), (6, 2), (1, 4), (2, 2)])
def test_norm_of_groups_and_turned_heads(mode, gain, groups, width):
    for first_row, rows in ((0, 5), (2, 1)):
        graph = Graph(width, gain=gain)
        source = graph.input(5, 12, Memory.RESIDUAL)
        graph.norm(source, mode, first_row=first_row, rows=rows, groups=groups)
        graph.norm(source, mode, first_row=first_row, rows=rows, groups=groups,
                   rotation=graph.rotation(rows, width))
        compare(graph)


def test_norm_of_special_rows():
    rows = np.array([[0] * 6, [5] * 6, [32767] * 6, [-32768] * 6, [0, 0, 0, 0, 0, 1],
                     [-32768, 32767] * 3, [-32768] * 5 + [32767]])
    for mode in NormMode:
        graph = Graph(1, gain=1)
        source = graph.input(*rows.shape, Memory.RESIDUAL)
        output = graph.norm(source, mode, epsilon=0)
        program = graph.program(output)
        found = TorchDevice().run(program, program.steps[0], {source: rows[None]})
        expected = evaluate(graph.operations, {source: rows[None]})
        np.testing.assert_array_equal(found[output], expected[output])


@pytest.mark.parametrize("mode", [NormMode.LAYER, NormMode.RMS])
@pytest.mark.parametrize("channels", [2048, 4097, 8192, 65519, 65535])
def test_norm_of_wide_rows_in_all_16_bits(channels, mode):
    """Rows whose variance takes more bits than a float64 has, is next to a power of two, or is 0. Biases
    take what `numerics` expects away, so that nothing of a difference is lost in 8 bits."""
    rows = np.full((6, channels), -32768)
    rows[0, :channels // 2] = 32767
    rows[1] = 32767
    rows[2] = 0
    rows[3, (1 << 24) // channels:] = 0  # channels * Q is 2**54, if not quite, but for the least rows
    rows[4] = np.random.default_rng(channels).integers(-32768, 32768, channels)
    below = (1 << 54) - 1 - channels * int((rows[3]**2).sum())
    for row in rows:
        for epsilon in (0, (1 << 48) - 1, min(max(below, 0), (1 << 48) - 1)):
            graph = Graph(3)
            source = graph.input(1, channels, Memory.RESIDUAL)
            output = graph.norm(source, mode, epsilon=epsilon)
            wanted = numerics.normalise(row, channels, epsilon, centred=mode == NormMode.LAYER)
            offset = graph.random.integers(-100, 101, channels)
            affine = Affine(bias=(offset - wanted).astype(np.int32),
                            multiplier=np.full(channels, 1 << 15, np.uint16),
                            shift=np.full(channels, 15, np.uint8))
            graph.operations[0] = dataclasses.replace(graph.operations[0], affine=affine)
            program = graph.program(output)
            found = TorchDevice().run(program, program.steps[0], {source: row[None, None]})
            np.testing.assert_array_equal(found[output][0, 0], offset)


@pytest.mark.parametrize("mode", [NormMode.LAYER, NormMode.RMS])
def test_norm_of_wide_groups(mode):
    graph = Graph(4)
    source = graph.input(4, 3 * 4100, Memory.RESIDUAL)
    graph.norm(source, mode, first_row=1, rows=2, groups=3)
    graph.norm(source, mode, first_row=1, rows=2, groups=3, rotation=graph.rotation(2, 4100))
    compare(graph)


def test_one_loud_channel_saturates_int16():
    rows = np.zeros((1, 1, 2000), np.int64)
    rows[0, 0, 7] = 30000
    graph = Graph(2)
    source = graph.input(1, 2000, Memory.RESIDUAL)
    output = graph.norm(source, NormMode.RMS, epsilon=0)
    affine = Affine(bias=np.zeros(2000, np.int32), multiplier=np.full(2000, 131, np.uint16),
                    shift=np.full(2000, 16, np.uint8))  # 32767 becomes 65
    graph.operations[0] = dataclasses.replace(graph.operations[0], affine=affine)
    program = graph.program(output)
    found = TorchDevice().run(program, program.steps[0], {source: rows})
    assert found[output][0, 0, 7] == 65
    np.testing.assert_array_equal(found[output], evaluate(graph.operations, {source: rows})[output])
