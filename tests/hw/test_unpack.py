import itertools
import random

import pytest

from moeware.hw.arch.config import Config
from moeware.hw.dma.unpack import Unpacker

from .simulate import simulate
from .streams import get_all, put_all

CONFIG = Config(tokens=1, outputs=4, depth=4, queries=1, lanes=2, bus_bytes=4, activation_banks=1,
                activation_words=64, residual_words=64, weight_words=64, param_words=64, tables=1,
                row_words=16, max_rows=16, max_experts=4, max_chosen=2, queue=4)
PAUSES = [(0,), (1, 0, 0), (1, 1, 0, 1)]


def signed_fields(word: int, bits: int) -> list[int]:
    """The bus words that `word` becomes, field by field of its bytes."""
    found = []
    for low in range(0, 8, bits):
        fields = [byte >> low & (1 << bits) - 1 for byte in word.to_bytes(4, "little")]
        signed = [field - (field >> bits - 1 << bits) for field in fields]
        found.append(int.from_bytes(bytes(value & 255 for value in signed), "little"))
    return found


def transfers(seed: int, lengths):
    """Transfers of these lengths, packed in all ways, their words and what becomes of them."""
    draw = random.Random(seed)
    arrivals, words, expected = [], [], []
    for packed, length in lengths:
        count = 1 << packed
        packed_words = [draw.getrandbits(32) for _ in range(-(-length // count))]
        unpacked = [word for each in packed_words for word in signed_fields(each, 8 // count)]
        arrivals.append({"packed": packed, "beats": length})
        words += packed_words
        expected += unpacked[:length]
    return arrivals, words, expected


@pytest.mark.parametrize("idle", PAUSES)
@pytest.mark.parametrize("refuse", PAUSES)
@pytest.mark.parametrize("late", PAUSES)
def test_words_are_unpacked_and_what_is_left_over_is_dropped(idle, refuse, late):
    draw = random.Random(1)
    arrivals, words, expected = transfers(2, [
        (packed, draw.choice((1, 2, 3, 4, 5, 7, 8))) for _ in range(8) for packed in (0, 1, 2, 1)])
    dut, received = Unpacker(CONFIG), []

    async def announce(ctx):
        await put_all(ctx, dut.arrivals, arrivals, itertools.cycle(late))

    async def source(ctx):
        await put_all(ctx, dut.input, words, itertools.cycle(idle))

    async def sink(ctx):
        received.extend(await get_all(ctx, dut.output, len(expected), itertools.cycle(refuse)))
        assert not ctx.get(dut.output.valid)

    simulate(dut, announce, source, sink)
    assert received == expected


def test_a_word_a_cycle_from_transfer_to_transfer():
    arrivals, words, expected = transfers(3, [(0, 3), (1, 5), (2, 9), (0, 1), (0, 2), (2, 1), (1, 4)])
    dut, started, came = Unpacker(CONFIG), [], []

    async def announce(ctx):
        await put_all(ctx, dut.arrivals, arrivals)

    async def source(ctx):
        await ctx.tick().repeat(3)
        await put_all(ctx, dut.input, words)

    async def watch(ctx):
        ctx.set(dut.output.ready, 1)
        for cycle in itertools.count():
            if len(came) == len(expected):
                return
            *_, valid, taken = await ctx.tick().sample(dut.output.valid, dut.input.valid)
            started.extend([cycle] if taken and not started else [])
            came.extend([cycle] if valid else [])

    simulate(dut, announce, source, watch)
    assert came == [started[0] + dut.LATENCY + i for i in range(len(expected))]


@pytest.mark.parametrize("packed", [0, 1, 2])
def test_no_path_crosses(packed):
    """While words wait, `ready` of the input does not follow that of the output within a cycle."""
    dut = Unpacker(CONFIG)

    async def bench(ctx):
        ctx.set(dut.arrivals.payload, {"packed": packed, "beats": 100})
        ctx.set(dut.arrivals.valid, 1)
        ctx.set(dut.input.valid, 1)
        for cycle in range(40):
            seen = []
            for ready in (0, 1, cycle % 3 == 0):
                ctx.set(dut.output.ready, ready)
                seen.append((ctx.get(dut.input.ready), ctx.get(dut.output.valid),
                             ctx.get(dut.output.payload)))
            assert len(set(seen)) == 1
            await ctx.tick()

    simulate(dut, bench)
