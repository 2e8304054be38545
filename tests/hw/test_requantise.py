# amaranth: UnusedElaboratable=no
"""`Requantise` against `numerics`, exactly."""

import itertools
import random

import pytest
from amaranth import signed, unsigned

from moeware.hw.arch import numerics
from moeware.hw.requantise import Requantise

from .simulate import simulate

SHAPES = [(signed(32), signed(8)), (signed(32), signed(16)), (signed(32), None),
          (signed(16), signed(8)), (unsigned(32), unsigned(12)), (unsigned(33), None),
          (signed(33), signed(16)), (unsigned(16), signed(16)), (signed(8), signed(32))]


def operands(shape, seed):
    draw = random.Random(seed)
    least, most = ((-(1 << shape.width - 1), (1 << shape.width - 1) - 1) if shape.signed
                   else (0, (1 << shape.width) - 1))
    yield from itertools.product((least, least + 1, 0, 1, most), (0, 1, 65535), (1, 2, 9, 46, 47))
    for _ in range(60):  # of every magnitude
        yield (draw.randint(least, most) >> draw.randrange(shape.width), draw.randrange(1 << 16),
               draw.randint(1, 47))
    for _ in range(80):  # ties at and around the borders of saturation
        shift = draw.randint(1, min(16, shape.width - 2))
        half = draw.choice((-129, -128, -127, 0, 1, 126, 127, 128, 32767, 32768, -32768, -32769,
                            4095, 4096)) * (1 << shift) + (1 << shift - 1)
        yield max(least, min(most, half + draw.choice((-1, 0, 1)))), 1, shift


def expected(value, multiplier, shift, result):
    scaled = int(numerics.scale(value, multiplier, shift))
    if result is None:
        return scaled
    if result.signed:
        return int(numerics.saturate(scaled, result.width))
    return min(scaled, (1 << result.width) - 1)


@pytest.mark.parametrize("idle", [(0,), (1, 0, 0, 1)], ids=("steady", "stalling"))
@pytest.mark.parametrize(("value", "result"), SHAPES)
def test_matches_numerics(value, result, idle):
    dut = Requantise(value, result)
    sent = list(operands(value, seed=1))

    async def bench(ctx):
        pauses, received = itertools.cycle(idle), []
        for case in sent + [(0, 0, 1)] * dut.LATENCY:
            while next(pauses):
                ctx.set(dut.advance, 0)
                ctx.set(dut.value, 1)
                await ctx.tick()
            ctx.set(dut.advance, 1)
            for port, operand in zip((dut.value, dut.multiplier, dut.shift), case):
                ctx.set(port, operand)
            await ctx.tick()
            received.append(ctx.get(dut.result))
        answers = received[dut.LATENCY - 1:-1]
        assert answers == [expected(*case, result) for case in sent]

    simulate(dut, bench)


@pytest.mark.parametrize(("value", "result", "message"), [
    (signed(34), signed(8), "must be at most 33 bits"),
    (signed(32), unsigned(8), "signed where the value is"),
    (signed(32), signed(33), "must be at most 32 bits")])
def test_refuses_other_shapes(value, result, message):
    with pytest.raises(ValueError, match=message):
        Requantise(value, result)
