from moeware.hw.arch.registers import Register
from moeware.hw.system import StatusWatch

from .background import simulate_beside
from .streams import get_all, put_all

INTERVAL = 20


def test_status_is_read_beside_the_accesses_of_the_host():
    dut = StatusWatch(INTERVAL)
    asked = []

    async def device(ctx):
        """Answers with 1000 + index after some cycles; STATUS with how often it was asked."""
        while True:
            ctx.set(dut.device.request.ready, 1)
            *_, valid, access = await ctx.tick().sample(dut.device.request.valid,
                                                        dut.device.request.payload)
            if not valid:
                continue
            ctx.set(dut.device.request.ready, 0)
            asked.append((access.write, access.index))
            for _ in range(3):
                await ctx.tick()
            ctx.set(dut.device.response.payload,
                    len(asked) if access.index == Register.STATUS else 1000 + access.index)
            ctx.set(dut.device.response.valid, 1)
            taken = False
            while not taken:
                *_, taken = await ctx.tick().sample(dut.device.response.ready)
            ctx.set(dut.device.response.valid, 0)

    async def host(ctx):
        for index in range(40, 80):
            await put_all(ctx, dut.host.request, [{"write": index % 2, "index": index}], [index % 3])
            assert await get_all(ctx, dut.host.response, 1, iter([index % 5 == 0])) == [1000 + index]
        for _ in range(INTERVAL + 20):
            await ctx.tick()

    simulate_beside(dut, [host], [device])
    own = [access for access in asked if access[1] != Register.STATUS]
    assert own == [(index % 2, index) for index in range(40, 80)]
    polls = [access for access in asked if access[1] == Register.STATUS]
    assert len(polls) > 5 and not any(write for write, _ in polls)


def test_status_is_shown():
    dut = StatusWatch(INTERVAL)

    async def bench(ctx):
        ctx.set(dut.device.request.ready, 1)
        ctx.set(dut.device.response.valid, 1)
        ctx.set(dut.device.response.payload, 5)
        for _ in range(INTERVAL + 5):
            await ctx.tick()
        assert ctx.get(dut.status) == 5

    simulate_beside(dut, [bench], [])
