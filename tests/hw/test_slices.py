import itertools

import pytest

from moeware.hw.slices import RegisterSlice

from .simulate import simulate
from .streams import get_all, put_all


@pytest.mark.parametrize("idle", [(0,), (1, 0, 0), (1, 1, 0, 1)])
@pytest.mark.parametrize("refuse", [(0,), (1, 0, 0), (1, 1, 0, 1)])
def test_keeps_every_element_in_order(idle, refuse):
    dut, received = RegisterSlice(8), []

    async def source(ctx):
        await put_all(ctx, dut.input, range(60), itertools.cycle(idle))

    async def sink(ctx):
        received.extend(await get_all(ctx, dut.output, 60, itertools.cycle(refuse)))

    simulate(dut, source, sink)
    assert received == list(range(60))


def test_an_element_a_cycle_and_two_that_wait():
    dut = RegisterSlice(8)

    async def bench(ctx):
        ctx.set(dut.input.valid, 1)
        ctx.set(dut.output.ready, 1)
        for i in range(20):
            ctx.set(dut.input.payload, i)
            assert ctx.get(dut.input.ready)
            assert ctx.get(dut.output.valid) == (i >= dut.LATENCY)
            assert i < dut.LATENCY or ctx.get(dut.output.payload) == i - dut.LATENCY
            await ctx.tick()
        ctx.set(dut.output.ready, 0)
        assert ctx.get(dut.input.ready)  # whatever the other side says in this cycle
        await ctx.tick()
        assert not ctx.get(dut.input.ready)
        ctx.set(dut.output.ready, 1)
        assert not ctx.get(dut.input.ready)

    simulate(dut, bench)
