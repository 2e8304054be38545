import itertools
import random

import pytest

from moeware.hw.arbiter import MemoryArbiter

from .background import simulate_beside
from .dram import Dram
from .simulate import simulate
from .streams import get_all, put_all


def words(content):
    return [int.from_bytes(content[i:i + 8], "little") for i in range(0, len(content), 8)]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("idle", [(), (1, 0, 0)])
@pytest.mark.parametrize("latency, stall", [(0, 0), (5, 0.3)])
def test_every_client_sees_its_own_data_in_order(count, idle, latency, stall):
    arbiter = MemoryArbiter(8, count)
    dram = Dram(8, 1 << 16, latency, stall)
    draw = random.Random(count)
    dram.image[:] = draw.randbytes(len(dram.image))
    expected = bytearray(dram.image)
    pulses = [0] * count

    def bursts_in(page):
        starts = [4096 * page + 8 * draw.randrange(490) for _ in range(8)]
        return [(start, draw.randint(1, 20)) for start in starts]

    def client_benches(client):
        port = arbiter.clients[client]
        reads, writes = bursts_in(2 * client), bursts_in(2 * client + 1)
        contents = [draw.randbytes(8 * beats) for _, beats in writes]
        wanted = words(b"".join(expected[address:address + 8 * beats] for address, beats in reads))
        for (address, _), content in zip(writes, contents, strict=True):
            expected[address:address + len(content)] = content

        async def ask(ctx):
            await put_all(ctx, port.read_command, [{"address": a, "beats": b} for a, b in reads])

        async def read(ctx):
            assert await get_all(ctx, port.read_data, len(wanted), itertools.cycle(idle)) == wanted

        async def write(ctx):
            for (address, beats), content in zip(writes, contents, strict=True):
                await put_all(ctx, port.write_command, [{"address": address, "beats": beats}])
                await put_all(ctx, port.write_data, words(content), itertools.cycle(idle))

        async def count_written(ctx):
            while dram.image != expected or sum(pulses) < count * len(writes):
                _, _, written = await ctx.tick().sample(port.written)
                pulses[client] += written

        return ask, read, write, count_written

    benches = [bench for client in range(count) for bench in client_benches(client)]
    simulate_beside(arbiter, benches, dram.serve(arbiter.memory))
    assert pulses == [8] * count  # also after all of them: none was sent to two clients
    assert dram.image == expected


def test_clients_take_turns():
    arbiter = MemoryArbiter(8, 3)
    order = []

    async def ask(ctx):
        for client in arbiter.clients:
            ctx.set(client.read_command.valid, 1)
            ctx.set(client.read_command.p.beats, 1)
        ctx.set(arbiter.memory.read_command.ready, 1)
        for _ in range(6):
            for index, client in enumerate(arbiter.clients):
                if ctx.get(client.read_command.ready):
                    order.append(index)
            await ctx.tick()

    simulate(arbiter, ask)
    assert order == [1, 2, 0, 1, 2, 0]


def test_an_offered_burst_is_not_exchanged():
    arbiter = MemoryArbiter(8, 2)

    async def ask(ctx):
        first, second = arbiter.clients
        ctx.set(first.read_command.payload, {"address": 8, "beats": 1})
        ctx.set(second.read_command.payload, {"address": 16, "beats": 1})
        ctx.set(first.read_command.valid, 1)
        for _ in range(4):
            await ctx.tick()
            assert ctx.get(arbiter.memory.read_command.p.address) == 8
            ctx.set(second.read_command.valid, 1)

    simulate(arbiter, ask)


def test_one_client_is_refused():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        MemoryArbiter(8, 1)
