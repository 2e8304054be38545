"""Sigmoid scores against `numerics`."""

import numpy as np
import pytest

from moeware.hw.arch import routing
from moeware.hw.sigmoid import Sigmoid

from .simulate import simulate


def scores(logits, multiplier, shift):
    """Those that come `LATENCY` cycles after each of the logits."""
    dut, found = Sigmoid(), []

    async def bench(ctx):
        ctx.set(dut.multiplier, multiplier)
        ctx.set(dut.shift, shift)
        for number in range(len(logits) + Sigmoid.LATENCY):
            ctx.set(dut.logit, int(logits[min(number, len(logits) - 1)]))
            if number >= Sigmoid.LATENCY:
                found.append(ctx.get(dut.score))
            await ctx.tick()

    simulate(dut, bench)
    return found


@pytest.mark.parametrize("multiplier, shift", [(47274, 12), (65535, 1), (65535, 20), (1, 30), (0, 1)])
def test_equals_numerics(multiplier, shift):
    draw = np.random.default_rng(1)
    logits = np.concatenate([
        draw.integers(-1 << 31, 1 << 31, 300) >> draw.integers(0, 31, 300),
        [0, 1, -1, -(1 << 31), (1 << 31) - 1], np.arange(-40, 40) * 400])
    assert scores(logits, multiplier, shift) == (
        routing.sigmoid_scores(logits, multiplier, shift).tolist())
