# amaranth: UnusedElaboratable=no
"""`Multipliers`: exact products, latency, and what ECP5 gets."""

import itertools
import random
import re

import pytest
from amaranth import signed, unsigned
from amaranth.back import rtlil

from moeware.hw.multiply import Multipliers, primitive_for

from .simulate import simulate


class Ecp5:
    device = "LFE5U-85F"


def limits(shape):
    return ((-(1 << shape.width - 1), (1 << shape.width - 1) - 1) if shape.signed
            else (0, (1 << shape.width) - 1))


@pytest.mark.parametrize("primitive", ["generic", "ecp5", "dsp48e2", "fabric"])
@pytest.mark.parametrize("idle", [(0,), (1, 0, 0, 1)], ids=("steady", "stalling"))
@pytest.mark.parametrize(("a", "b"), [
    (signed(8), signed(8)), (signed(18), unsigned(16)), (unsigned(13), unsigned(13)),
    (signed(18), signed(18)), (unsigned(17), signed(2))])
def test_products(a, b, idle, primitive):
    draw = random.Random(1)
    dut = Multipliers(a, b, 3, primitive=primitive)
    pairs = list(itertools.product(limits(a), limits(b)))
    pairs += [(draw.randint(*limits(a)), draw.randint(*limits(b))) for _ in range(60)]
    sent = [draw.sample(pairs, dut.count) for _ in range(60)]

    async def bench(ctx):
        pauses, received = itertools.cycle(idle), []
        for case in sent + sent[:dut.LATENCY]:
            while next(pauses):
                ctx.set(dut.advance, 0)
                ctx.set(dut.a[0], 1)
                await ctx.tick()
            ctx.set(dut.advance, 1)
            ctx.set(dut.a, [pair[0] for pair in case])
            ctx.set(dut.b, [pair[1] for pair in case])
            await ctx.tick()
            received.append(list(ctx.get(dut.product)))
        assert received[dut.LATENCY - 1:-1] == [[x * y for x, y in case] for case in sent]

    simulate(dut, bench)


def test_ecp5_registers_lie_in_the_multiplier():
    text = rtlil.convert(Multipliers(signed(8), unsigned(16), 5), platform=Ecp5())
    cells = re.findall(r"cell \\MULT18X18D .*?\n  end\n", text, re.DOTALL)
    assert len(cells) == 5
    for register in ("INPUTA", "INPUTB", "PIPELINE", "OUTPUT"):
        for cell in cells:
            assert f'parameter \\REG_{register}_CLK "CLK0"' in cell
            assert f'parameter \\REG_{register}_CE "CE0"' in cell
    assert "$dff" not in text, "registers must not lie outside the multiplier"


def test_platform_selects_the_primitive():
    class UltraScale:
        device = "xczu9eg"

    class Other:
        device = "iCE40UP5K"

    assert [primitive_for(p) for p in (None, Ecp5(), UltraScale(), Other())] == [
        "generic", "ecp5", "dsp48e2", "generic"]
    assert "MULT18X18D" in rtlil.convert(Multipliers(signed(8), signed(8)), platform=Ecp5())
    assert "MULT18X18D" not in rtlil.convert(Multipliers(signed(8), signed(8)))


@pytest.mark.parametrize(("arguments", "message"), [
    ((signed(19), signed(8)), "Multipliers.a must be at most 18 bits"),
    ((signed(8), unsigned(18)), "Multipliers.b must be at most 18 bits")])
def test_refuses_wide_operands(arguments, message):
    with pytest.raises(ValueError, match=message):
        Multipliers(*arguments)
