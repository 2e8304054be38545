# amaranth: UnusedElaboratable=no
import random

import numpy as np
import pytest

from moeware.hw.arch import numerics
from moeware.hw.exp2 import Exp2, Octaves

from .simulate import simulate


def run_pipeline(dut, operands, outputs, stalls=0.0):
    """Feed one operand (a dict of port values) per advancing cycle; what the outputs were
    `LATENCY` advancing cycles later."""
    draw = random.Random(5)
    results = []

    async def bench(ctx):
        for cycle in range(len(operands) + dut.LATENCY):
            ctx.set(dut.advance, 0)
            while draw.random() < stalls:
                for name in operands[0]:  # what a stalled cycle shows must not get in
                    ctx.set(getattr(dut, name), 1)
                await ctx.tick()
            ctx.set(dut.advance, 1)
            for name, value in operands[min(cycle, len(operands) - 1)].items():
                ctx.set(getattr(dut, name), int(value))
            if cycle >= dut.LATENCY:
                results.append([ctx.get(getattr(dut, name)) for name in outputs])
            await ctx.tick()

    simulate(dut, bench)
    return np.array(results).T


@pytest.mark.parametrize("stalls", [0.0, 0.3])
def test_exp2_all_steps(stalls):
    steps = np.arange(4096) if not stalls else np.arange(0, 4096, 7)
    weight, probability = run_pipeline(Exp2(), [{"steps": s} for s in steps],
                                       ("weight", "probability"), stalls)
    assert np.array_equal(weight, numerics.exp2_weight(steps))
    assert np.array_equal(probability, numerics.probability(steps))


@pytest.mark.parametrize("bits, stalls", [(32, 0.0), (32, 0.4), (17, 0.0), (5, 0.2)])
def test_octaves(bits, stalls):
    draw = np.random.default_rng(3)
    count = 600
    difference = draw.integers(0, 1 << draw.integers(1, 33, count))
    multiplier = draw.integers(0, 1 << 16, count)
    shift = draw.integers(1, 48, count)
    edges = [(2**32 - 1, 65535, 1), (2**32 - 1, 65535, 47), (2**32 - 1, 65535, 36), (0, 65535, 1),
             (1, 1, 1), (8189, 1, 1), (8190, 1, 1), (8191, 1, 1), (4095, 2, 1), (4096, 2, 1),
             (16383, 1, 2), (2**31, 1, 32), (2**31 - 1, 1, 32), (2**32 - 1, 0, 1)]
    for array, column in zip((difference, multiplier, shift), zip(*edges), strict=True):
        array[:len(edges)] = column
    difference &= (1 << bits) - 1
    operands = [{"difference": d, "multiplier": f, "shift": s}
                for d, f, s in zip(difference, multiplier, shift, strict=True)]
    steps, = run_pipeline(Octaves(bits), operands, ("steps",), stalls)
    expected = numerics.octaves(difference, multiplier, shift)
    assert np.array_equal(steps, expected)
    assert 0 < np.mean(expected == 4095) < 1


@pytest.mark.parametrize("bits", [0, 33])
def test_octaves_refuses_width(bits):
    with pytest.raises(ValueError, match="Octaves.difference_bits must be"):
        Octaves(bits)
