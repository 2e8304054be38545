# amaranth: UnusedElaboratable=no
"""The parts of NORM alone: edges that whole rows hardly reach, and their latencies."""

import math
import random

import pytest

from moeware.hw.arch import numerics
from moeware.hw.arch.isa import NormMode
from moeware.hw.norm.inverse_root import InverseRoot
from moeware.hw.norm.normalise import Normalise
from moeware.hw.norm.rotate import Rotate
from moeware.hw.norm.statistics import Statistics
from moeware.hw.norm.variance import Variance

from .simulate import simulate
from .streams import put_all


def stamped(inlet, outlet, sent, count=None):
    """A list that fills with what comes out, each with its cycle, and the benches that fill it;
    the first operand is offered in cycle 0."""
    received, now = [], 0

    async def producer(ctx):
        await put_all(ctx, inlet, sent)

    async def consumer(ctx):
        nonlocal now
        ctx.set(outlet.ready, 1)
        while len(received) < (len(sent) if count is None else count):
            if ctx.get(outlet.valid):
                received.append((now, ctx.get(outlet.payload)))
            await ctx.tick()
            now += 1

    return received, (producer, consumer)


def test_rotate():
    """Extremes in all combinations, turned and not in turns, a word every cycle."""
    draw, lanes, dut = random.Random(2), 4, Rotate(4)
    edges = [-32768, -32767, -8193, -8192, -129, -128, -1, 0, 1, 31, 32, 127, 128, 8191, 32767]
    words = [([draw.choice(edges) for _ in range(lanes)],
              [draw.choice([*edges, -16384, 16384]) for _ in range(lanes)], draw.randrange(2))
             for _ in range(600)]
    words += [([draw.randrange(-32768, 32768) for _ in range(lanes)],
               [draw.randrange(-16384, 16385) for _ in range(lanes)], 1) for _ in range(200)]
    expected = [numerics.rotate(values, factors).tolist() if turned
                else numerics.saturate(values, 8).tolist() for values, factors, turned in words]
    received = []

    async def bench(ctx):
        for cycle in range(len(words) + dut.LATENCY):
            values, factors, turned = words[min(cycle, len(words) - 1)]
            ctx.set(dut.values, values)
            ctx.set(dut.factors, factors)
            ctx.set(dut.turned, turned)
            if cycle >= dut.LATENCY:
                received.append([ctx.get(dut.results[lane]) for lane in range(lanes)])
            await ctx.tick()

    simulate(dut, bench)
    assert received == expected


def test_rotate_takes_pairs():
    with pytest.raises(ValueError, match="Rotate.lanes must be even, not 3"):
        Rotate(3)


# Of a row, at most: so many words of small and large configurations, and either side of powers of two.
CHANNELS = [4, 1024, 2047, 2048, 8191, 8192, 65535]


@pytest.mark.parametrize("stalls", [0.0, 0.4])
@pytest.mark.parametrize("channels", CHANNELS)
def test_normalise(channels, stalls):
    draw = random.Random(1)
    lanes, dut = 2, Normalise(2, channels)
    least, most = -channels << 15, channels * 32767
    edges = [([21845, 1], 3, 0, 1 << 16, 17),  # 32767.5, which rounds out of range
             ([21845, -21846], 3, 1, 1 << 16, 17), ([-21845, -21846], 3, 2, 1 << 16, 17),
             ([-21845, -21846], 3, 3, 1 << 16, 17), ([-32768, 32767], channels, least, 131071, 41),
             ([32767, -32768], channels, most, 131071, 5), ([0, 1], 1, 0, 1 << 16, 17)]
    edges += [([-32768, 32767], channels, total, 131071, shift)
              for total in (least, most) for shift in (28, 30, 33, 38, 40, 41)]
    operands = edges + [
        ([draw.randrange(-1 << 15, 1 << 15) for _ in range(lanes)], draw.randint(1, channels),
         draw.randint(least, most), draw.randrange(1 << 16, 1 << 17), draw.randint(5, 41))
        for _ in range(300)]
    expected = [[max(-1 << 15, min((1 << 15) - 1,
                                   ((factor * x - total) * inverse + (1 << shift - 1)) >> shift))
                 for x in values] for values, factor, total, inverse, shift in operands]
    received = []

    async def bench(ctx):
        for cycle in range(len(operands) + dut.LATENCY):
            ctx.set(dut.advance, 0)
            while draw.random() < stalls:
                await ctx.tick()
            ctx.set(dut.advance, 1)
            values, factor, total, inverse, shift = operands[min(cycle, len(operands) - 1)]
            ctx.set(dut.values, values)
            ctx.set(dut.scale, {"factor": factor, "total": total, "inverse": inverse,
                                "shift": shift})
            if cycle >= dut.LATENCY:
                received.append([ctx.get(dut.normalised[lane]) for lane in range(lanes)])
            await ctx.tick()

    simulate(dut, bench)
    assert received == expected


@pytest.mark.parametrize("channels", CHANNELS)
def test_variance(channels):
    draw = random.Random(2)
    sums = [(0, 0), (channels * -32768, channels << 30), (channels * 32767, channels * 32767**2), (-1, 1)]
    for _ in range(6):
        total = draw.randint(-channels << 15, channels * 32767)
        sums.append((total, draw.randint(-(-total**2 // channels), channels << 30)))
    setups = [(NormMode.LAYER, channels, 0), (NormMode.RMS, channels, (1 << 48) - 1),
              (NormMode.SCALE, 0, 5), (NormMode.LAYER, channels, 12345)]
    dut = Variance(channels)
    sent = [{"total": t, "squares": q} for t, q in sums]
    expected = []
    for mode, factor, epsilon in setups:
        for total, squares in sums:
            total *= mode == NormMode.LAYER
            expected.append((1 << 20, 0, 1) if mode == NormMode.SCALE else
                            (factor * squares - total**2 + epsilon, total, factor))
    received, benches = stamped(dut.sums, dut.moments, sent * 3, len(expected))

    async def setup(ctx):
        await put_all(ctx, dut.setup, [
            {"mode": mode, "rows": len(sums), "channels": factor, "epsilon": epsilon}
            for mode, factor, epsilon in setups])

    simulate(dut, setup, *benches)
    assert [(m.variance, m.total, m.factor) for _, m in received] == expected
    cycles = [cycle for cycle, _ in received]
    assert cycles[0] == 1 + (dut.INTERVAL - 1)  # the setup is taken first
    assert cycles[1] - cycles[0] == dut.INTERVAL


@pytest.mark.parametrize("channels", CHANNELS)
def test_inverse_root(channels):
    draw = random.Random(3)
    most = (channels**2 << 30) + (1 << 48) - 1
    bits = most.bit_length()
    variances = [1, 2, 3, 4, 5, most, 1 << bits - 1, (1 << bits - 1) - 1, 1 << bits - 2,
                 (1 << bits - 2) - 1, 1 << 20, (1 << 32) - 1, 1 << 32]
    variances += [draw.getrandbits(draw.randint(1, bits - 1)) | 1 for _ in range(30)]
    dut = InverseRoot(channels)
    factors = [min(factor, channels) for factor in (1, 2047, 2048, 4095, 4096, 16383, 16384, 65535)]
    beside = [(draw.randint(-channels << 15, channels * 32767),
               factors[i % 9] if i % 9 < 8 else draw.randint(1, channels))
              for i in range(len(variances))]
    received, benches = stamped(
        dut.moments, dut.scales,
        [{"variance": v, "total": total, "factor": factor}
         for v, (total, factor) in zip(variances, beside)])
    simulate(dut, *benches)
    for variance, given, (_, scale) in zip(variances, beside, received, strict=True):
        half = (variance.bit_length() + 1) // 2
        inverse = (1 << 32) // math.isqrt((variance << 32) >> 2 * half)
        assert 1 << 16 <= scale.inverse < 1 << 17
        # The same quotient of two numbers, also where both were halved.
        shift = half + 16 - numerics.norm_fraction_bits(given[1])
        assert scale.inverse << shift == inverse << scale.shift
        assert (scale.total, scale.factor) == given
    cycles = [cycle for cycle, _ in received]
    assert cycles[0] == dut.LATENCY
    assert cycles[-1] <= dut.LATENCY + dut.INTERVAL * (len(variances) - 1)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_statistics_latency(lanes):
    dut = Statistics(lanes, 4 * lanes)
    word = {"data": [-5] * lanes, "count": lanes, "last": 1}
    received, benches = stamped(dut.words, dut.sums, [word] * 4)
    simulate(dut, *benches)
    assert [(cycle, s.total, s.squares) for cycle, s in received] == [
        (dut.latency + i, -5 * lanes, 25 * lanes) for i in range(4)]


@pytest.mark.parametrize("lanes, channels", [(2, 3), (8, 24), (3, 1024), (8, 2047), (8, 8195)])
def test_statistics_of_the_largest_rows(lanes, channels):
    dut = Statistics(lanes, channels)
    words, expected = [], []
    for value in (-32768, 32767):
        words += [{"data": [value] * lanes, "count": min(left, lanes), "last": left <= lanes}
                  for left in range(channels, 0, -lanes)]
        expected.append((channels * value, channels * value**2))
    received, benches = stamped(dut.words, dut.sums, words, 2)
    simulate(dut, *benches)
    assert [(s.total, s.squares) for _, s in received] == expected
