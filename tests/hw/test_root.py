# amaranth: UnusedElaboratable=no
import itertools
import math
import random

import pytest

from moeware.hw.root import Root

from .simulate import simulate
from .streams import get_all, put_all


def run(bits, sent, idle=(), refuse=()):
    dut, received, cycles = Root(bits), [], 0

    async def producer(ctx):
        await put_all(ctx, dut.values, sent, itertools.cycle(idle))

    async def consumer(ctx):
        received.extend(await get_all(ctx, dut.roots, len(sent), itertools.cycle(refuse)))

    async def clock(ctx):
        nonlocal cycles
        while len(received) < len(sent):
            await ctx.tick()
            cycles += 1

    simulate(dut, producer, consumer, clock)
    return received, cycles


@pytest.mark.parametrize("bits", [2, 4, 8, 10])
def test_exhaustive(bits):
    received, _ = run(bits, range(1 << bits))
    assert received == [math.isqrt(value) for value in range(1 << bits)]


@pytest.mark.parametrize("idle, refuse", [((), ()), ((1, 0, 0), ()), ((), (1, 1, 0)),
                                          ((1, 0), (0, 1))])
def test_edges(idle, refuse):
    draw = random.Random(4)
    roots = [0, 1, 2, 2**15, 2**15 + 1, 2**16 - 2, 2**16 - 1]
    roots += [draw.randrange(2**16) for _ in range(40)]
    sent = [value for root in roots for value in (root * root, root * root + 2 * root)]
    sent += [root * root - 1 for root in roots if root] + [2**32 - 1]
    received, cycles = run(32, sent, idle, refuse)
    assert received == [math.isqrt(value) for value in sent]
    if not idle and not refuse:
        assert cycles <= len(sent) * Root(32).latency + 1


@pytest.mark.parametrize("bits", [0, 7])
def test_refuses_width(bits):
    with pytest.raises(ValueError, match="Root.bits must be even"):
        Root(bits)
