# amaranth: UnusedElaboratable=no
import itertools
import random

import numpy as np
import pytest

from moeware.hw.arch import numerics
from moeware.hw.divide import Divide, Justify, Reciprocal

from .simulate import simulate
from .streams import get_all, put_all

PAUSES = [((), ()), ((1, 0, 0), ()), ((), (1, 1, 1, 0)), ((1, 0), (0, 1, 1))]


def run(dut, inlet, outlet, sent, idle=(), refuse=()):
    """What comes out of `outlet`, and the number of cycles that it took."""
    received, cycles = [], 0

    async def producer(ctx):
        await put_all(ctx, inlet, sent, itertools.cycle(idle))

    async def consumer(ctx):
        received.extend(await get_all(ctx, outlet, len(sent), itertools.cycle(refuse)))

    async def clock(ctx):
        nonlocal cycles
        while len(received) < len(sent):
            await ctx.tick()
            cycles += 1

    simulate(dut, producer, consumer, clock)
    return received, cycles


def latency(dut, inlet, outlet, value):
    """Cycles from the acceptance of a value to its result."""
    elapsed = 0

    async def bench(ctx):
        nonlocal elapsed
        await put_all(ctx, inlet, [value])
        elapsed = 1
        while not ctx.get(outlet.valid):
            await ctx.tick()
            elapsed += 1

    simulate(dut, bench)
    return elapsed


def test_divide_exhaustively():
    dut = Divide(5, 3, 3)
    sent = [{"numerator": n, "denominator": d} for d in range(1, 8) for n in range(min(32, d << 3))]
    received, _ = run(dut, dut.operands, dut.quotients, sent)
    assert received == [s["numerator"] // s["denominator"] for s in sent]


@pytest.mark.parametrize("idle, refuse", PAUSES)
@pytest.mark.parametrize("widths", [(33, 16, 18), (48, 32, 17), (8, 8, 8), (1, 1, 1)])
def test_divide(widths, idle, refuse):
    numerator_bits, denominator_bits, quotient_bits = widths
    draw = random.Random(1)
    sent = []
    for _ in range(40):
        denominator = draw.randrange(1, 1 << draw.randint(1, denominator_bits))
        limit = min(1 << numerator_bits, denominator << quotient_bits)
        sent.append({"numerator": draw.choice([0, limit - 1, draw.randrange(limit)]),
                     "denominator": denominator})
    dut = Divide(*widths)
    received, _ = run(dut, dut.operands, dut.quotients, sent, idle, refuse)
    assert received == [s["numerator"] // s["denominator"] for s in sent]


def test_divide_by_zero_gives_all_ones():
    dut = Divide(8, 4, 6)
    received, _ = run(dut, dut.operands, dut.quotients, [{"numerator": 0, "denominator": 0}])
    assert received == [63]


def test_divide_rate():
    dut = Divide(33, 16, 18)
    sent = [{"numerator": 2**32, "denominator": 40000 + i} for i in range(10)]
    received, cycles = run(dut, dut.operands, dut.quotients, sent)
    assert received == [2**32 // s["denominator"] for s in sent]
    assert cycles <= 10 * dut.latency + 2
    dut = Divide(33, 16, 18)
    assert latency(dut, dut.operands, dut.quotients, sent[0]) == dut.latency


@pytest.mark.parametrize("widths", [(33, 8, 8), (4, 8, 5), (4, 4, 0)])
def test_divide_refuses_widths(widths):
    with pytest.raises(ValueError, match="Divide must have"):
        Divide(*widths)


@pytest.mark.parametrize("bits, granule", [(8, 1), (8, 2), (8, 4), (64, 2), (32, 1)])
def test_justify(bits, granule):
    draw = random.Random(2)
    sent = (list(range(256)) if bits == 8 else
            [0, 1, 2, 3, 4, (1 << bits) - 1, 1 << (bits - 1), 1 << (bits - 2)]
            + [draw.getrandbits(draw.randint(1, bits)) for _ in range(60)])
    dut = Justify(bits, granule)
    received, cycles = run(dut, dut.values, dut.justified, sent)
    lengths = [-(-value.bit_length() // granule) * granule for value in sent]
    assert [r.length for r in received] == lengths
    assert [r.mantissa for r in received] == [v << (bits - n) for v, n in zip(sent, lengths)]
    assert cycles <= len(sent) * dut.latency + 2


@pytest.mark.parametrize("bits, granule", [(12, 1), (8, 8), (8, 3)])
def test_justify_refuses_widths(bits, granule):
    with pytest.raises(ValueError, match="Justify must have"):
        Justify(bits, granule)


@pytest.mark.parametrize("idle, refuse", PAUSES)
def test_reciprocal(idle, refuse):
    draw = random.Random(3)
    sent = [1, 2, 3, 4, 5, 7, 8, 65535, 65536, 65537, 2**31, 2**31 + 1, 2**31 - 1, 2**32 - 1]
    sent += [draw.randrange(1, 1 << draw.randint(1, 32)) for _ in range(40)]
    dut = Reciprocal()
    received, cycles = run(dut, dut.totals, dut.reciprocals, sent, idle, refuse)
    expected = [numerics.reciprocal(np.int64(total)) for total in sent]
    assert [(r.r, r.e) for r in received] == [(int(r), int(e)) for r, e in expected]
    if not idle and not refuse:
        assert cycles <= len(sent) * dut.INTERVAL + dut.LATENCY


def test_reciprocal_latency():
    dut = Reciprocal()
    assert latency(dut, dut.totals, dut.reciprocals, 12345) == dut.LATENCY
