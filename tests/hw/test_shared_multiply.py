# amaranth: UnusedElaboratable=no
"""`SharedMultipliers`: exact, two to a DSP48E2 where they fit."""

import itertools
import random

import numpy as np
import pytest
from amaranth import signed, unsigned
from amaranth.back import rtlil

from moeware.hw.dsp48e2 import DSP48E2
from moeware.hw.multiply import Multipliers
from moeware.hw.shared_multiply import SharedMultipliers, packs

from .simulate import simulate


class UltraScale:
    device = "xczu9eg"


def limits(shape):
    return ((-(1 << shape.width - 1), (1 << shape.width - 1) - 1) if shape.signed
            else (0, (1 << shape.width) - 1))


@pytest.mark.parametrize("primitive", ["generic", "fabric", "dsp48e2"])
@pytest.mark.parametrize(("a", "b"), [
    (signed(8), signed(8)), (signed(8), unsigned(10)), (signed(8), signed(12)),
    (unsigned(8), signed(8)), (signed(4), signed(8))])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_products(a, b, lanes, primitive):
    draw = random.Random(lanes)
    dut = SharedMultipliers(a, b, lanes, 2, primitive=primitive)
    some = {shape: [*limits(shape), 0, 1] for shape in (a, b)}

    def operand(shape):
        return draw.choice(some[shape]) if draw.random() < 0.5 else draw.randint(*limits(shape))

    sent = [([[operand(a) for _ in range(lanes)] for _ in range(2)], [operand(b), operand(b)])
            for _ in range(300)]

    async def bench(ctx):
        received = []
        for factors, common in sent + sent[:dut.LATENCY]:
            while draw.random() < 0.2:
                ctx.set(dut.advance, 0)
                await ctx.tick()
            ctx.set(dut.advance, 1)
            ctx.set(dut.a, factors)
            ctx.set(dut.b, common)
            await ctx.tick()
            received.append([list(group) for group in ctx.get(dut.product)])
        assert received[dut.LATENCY - 1:-1] == [
            [[x * y for x in group] for group, y in zip(factors, common)]
            for factors, common in sent]

    simulate(dut, bench)


@pytest.mark.parametrize(("a", "b"), [(signed(8), signed(8)), (signed(8), unsigned(10))])
def test_pairs_are_exact_for_all_operands(a, b):
    """The arithmetic of a pair, over every (a0, a1, b); `test_products` ties it to the gateware."""
    assert packs(a, b)
    low_a, high_a = np.meshgrid(*[np.arange(limits(a)[0], limits(a)[1] + 1)] * 2)
    packed = (high_a << 18) + low_a
    assert packed.min() >= -1 << 26 and packed.max() < 1 << 26
    for factor in range(limits(b)[0], limits(b)[1] + 1):
        p = packed * factor + (1 << 17)
        low = (p & (1 << 18) - 1) - (1 << 17)
        assert np.array_equal(low, low_a * factor)
        assert np.array_equal(p >> 18, high_a * factor)


@pytest.mark.parametrize(("a", "b", "fits"), [
    (signed(8), signed(10), True), (signed(8), signed(11), False), (signed(8), unsigned(11), False),
    (signed(9), signed(8), False), (unsigned(8), signed(8), False), (signed(4), signed(14), True),
    (signed(3), signed(16), False)])
def test_which_operands_fit(a, b, fits):
    assert packs(a, b) == fits
    if a.signed:
        worst = [x * y for x, y in itertools.product(limits(a), limits(b))]
        assert fits == (a.width <= 8 and -1 << 17 <= min(worst) and max(worst) < 1 << 17)


def test_ultrascale_gets_one_block_for_two():
    def blocks(dut):
        text = rtlil.convert(dut, platform=UltraScale())
        assert "$mul" not in text
        return text.count("cell \\DSP48E2 ")

    assert blocks(SharedMultipliers(signed(8), signed(8), 4, 3)) == 6
    assert blocks(SharedMultipliers(signed(8), signed(8), 5, 3)) == 9
    assert blocks(Multipliers(signed(18), unsigned(16), 2)) == 2


def test_registers_lie_in_the_block():
    text = rtlil.convert(DSP48E2(addend=5, instance=True))
    for register in "ABDMP":
        assert f"parameter \\{register}REG 1" in text
    assert "process" not in text
