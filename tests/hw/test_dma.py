import random

import numpy as np
import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.layout import beats, pack, word_bytes
from moeware.hw.dma import LoadEngine, ReadShare, StoreEngine
from moeware.hw.dma.bursts import ceil_divide
from moeware.hw.interfaces import READ_LATENCY

from .background import simulate_beside
from .dram import Dram
from .simulate import word_at
from .streams import get_all, put_all

BASE = {"activation_banks": 1, "activation_words": 64, "residual_words": 64, "weight_words": 64,
        "param_words": 64, "tables": 4, "row_words": 16, "max_rows": 16, "max_experts": 4,
        "max_chosen": 2, "queue": 4}


def config(tokens=1, outputs=4, depth=4, queries=1, lanes=2, bus_bytes=8):
    return Config(tokens=tokens, outputs=outputs, depth=depth, queries=queries, lanes=lanes,
                  bus_bytes=bus_bytes, **BASE)


# Words narrower than, as wide as and wider than the bus, dividing it and not.
SHAPES = [
    config(),
    config(outputs=2, depth=2, lanes=1, bus_bytes=2),
    config(outputs=3, depth=3, lanes=3, bus_bytes=16),
    config(outputs=5, depth=5, lanes=5, bus_bytes=4),
    config(outputs=4, depth=8, lanes=4, bus_bytes=8),
    config(outputs=6, depth=12, lanes=6, bus_bytes=8),
    config(outputs=1, depth=1, lanes=1, bus_bytes=32),
    config(outputs=7, depth=7, lanes=7, bus_bytes=64),
]


def name(config):
    return f"O{config.outputs}-K{config.depth}-W{config.lanes}-B{config.bus_bytes}"


def run_load(config, jobs, *, latency, stall, seed, refuse=0.0):
    """Runs LOADs (memory, local, address, rows of words, packed); returns what was written, by
    memory."""
    dut = LoadEngine(config)
    dram = Dram(config.bus_bytes, latency=latency, stall=stall, seed=seed)
    draw = random.Random(seed)
    ports = {Memory.ACTIVATION: dut.activation_write.write,
             Memory.RESIDUAL: dut.residual_write.write,
             Memory.WEIGHT: dut.weight_write.write, Memory.PARAM: dut.param_write.write,
             Memory.TABLE: dut.table_write}
    cells = {Memory.ACTIVATION: config.depth, Memory.RESIDUAL: config.lanes, Memory.WEIGHT: 1,
             Memory.PARAM: 1}
    written = {memory: {} for memory in Memory}
    for memory, _, address, words, packed in jobs:
        image = pack(config, memory, words, packed)
        dram.image[address:address + len(image)] = image

    async def issue(ctx):
        await put_all(ctx, dut.engine.instruction, [
            {"memory": memory, "local": local, "words": len(words), "address": address,
             "packed": packed} for memory, local, address, words, packed in jobs])

    async def await_done(ctx):
        for memory, local, _, words, _ in jobs:
            await ctx.tick().until(dut.engine.done)
            assert all(local + i in written[memory] for i in range(len(words))), "done too early"
        await ctx.tick()
        assert not ctx.get(dut.engine.busy)

    async def accept_writes(ctx):
        while True:
            for port in ports.values():
                ctx.set(port.ready, draw.random() >= refuse)
            flat = [signal for port in ports.values()
                    for signal in (port.valid, port.ready, port.payload)]
            values = iter((await ctx.tick().sample(*flat))[-len(flat):])
            for memory in ports:
                valid, ready, payload = next(values), next(values), next(values)
                if valid and ready:
                    assert memory == Memory.TABLE or payload.mask == 2 ** cells[memory] - 1
                    written[memory][word_at(payload.address, config)] = payload.data

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.read_command, dut.read_data)

    simulate_beside(dut, [issue, await_done], [accept_writes, reads])
    return written, dram


def words_of(config, memory, count, seed, packed=0):
    """Random words, of bytes that can be packed."""
    shape = count, word_bytes(config, memory)
    reach = 128 >> (8 - (8 >> packed))
    return np.random.default_rng(seed).integers(-reach, reach, shape, np.int8).view(np.uint8)


def as_dict(local, words):
    return {local + i: int.from_bytes(word.tobytes(), "little") for i, word in enumerate(words)}


@pytest.mark.parametrize("config", SHAPES, ids=name)
@pytest.mark.parametrize("latency, stall, refuse", [(0, 0, 0), (9, 0.3, 0.4)])
def test_load_follows_the_layout(config, latency, stall, refuse):
    jobs, address = [], 0x40
    for i, memory in enumerate([*Memory, *Memory]):
        words = words_of(config, memory, [5, 7, 3, 4, 13, 1, 6, 2, 1, 33][i], seed=i)
        jobs.append((memory, 17 * i, address, words, 0))
        address += -(-len(pack(config, memory, words)) // 64) * 64
    check_load(config, jobs, latency=latency, stall=stall, refuse=refuse, seed=3)


def check_load(config, jobs, **conditions):
    written, dram = run_load(config, jobs, **conditions)
    for memory in Memory:
        expected = {}
        for _, local, _, words, _ in (job for job in jobs if job[0] == memory):
            expected |= as_dict(local, words)
        assert written[memory] == expected, memory
    assert sum(count for _, count in dram.reads) == sum(
        beats(config, memory, len(words), packed) for memory, _, _, words, packed in jobs)


@pytest.mark.parametrize("config", SHAPES, ids=name)
@pytest.mark.parametrize("latency, stall, refuse", [(0, 0, 0), (9, 0.3, 0), (0, 0, 0.4), (9, 0.3, 0.4)])
def test_load_unpacks_weights(config, latency, stall, refuse):
    """Packed in all ways in turn, between words of other memories, and no words at all; last bus words
    that are used in full and in part."""
    jobs, address = [], 0x80
    kinds = [(Memory.WEIGHT, 1), (Memory.WEIGHT, 2), (Memory.WEIGHT, 0), (Memory.PARAM, 0),
             (Memory.WEIGHT, 2), (Memory.ACTIVATION, 0), (Memory.WEIGHT, 1), (Memory.WEIGHT, 1)]
    for i, count in enumerate([1, 1, 1, 3, 2, 5, 7, 0, 3, 5, 2, 0, 0, 4, 33, 64, 1, 6]):
        memory, packed = kinds[i % len(kinds)]
        words = words_of(config, memory, count, i, packed)
        jobs.append((memory, 70 * i, address, words, packed))
        address += -(-len(pack(config, memory, words, packed)) // 64) * 64
    check_load(config, jobs, latency=latency, stall=stall, refuse=refuse, seed=5)


@pytest.mark.parametrize("packed", [0, 1, 2])
def test_load_keeps_the_bus_busy(packed):
    """Two LOADs of wide words: a bus word in every cycle, but for one cycle between them, or a packed
    one in as many cycles as it has words."""
    subject = config(outputs=4, depth=4, lanes=4, bus_bytes=4)
    dut = LoadEngine(subject)
    dram = Dram(4, latency=20)
    taken = []

    async def issue(ctx):
        ctx.set(dut.weight_write.write.ready, 1)
        await put_all(ctx, dut.engine.instruction, [
            {"memory": Memory.WEIGHT, "local": 0, "words": 40, "address": 1024 * i, "packed": packed}
            for i in range(2)])

    async def watch(ctx):
        cycle = 0
        while len(taken) < 320 >> packed:
            *_, valid, ready = await ctx.tick().sample(dut.read_data.valid, dut.read_data.ready)
            if valid and ready:
                taken.append(cycle)
            cycle += 1

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.read_command, dut.read_data)

    simulate_beside(dut, [issue, watch], [reads])
    assert taken[-1] - taken[0] <= 320 + 1
    assert sum(count for _, count in dram.reads) == 320 >> packed
    assert max(count for _, count in dram.reads) == min(64, 160 >> packed)


def run_store(config, jobs, *, latency, stall, seed, refuse=0.0):
    """Runs STOREs (memory, local, address, words) of `contents`, by memory."""
    dut = StoreEngine(config)
    dram = Dram(config.bus_bytes, latency=latency, stall=stall, seed=seed)
    dram.image[:] = b"\xA5" * len(dram.image)
    draw = random.Random(seed)
    contents = {memory: words_of(config, memory, 128, seed=memory)
                for memory in (Memory.ACTIVATION, Memory.RESIDUAL)}
    finished = []

    def memory_bench(memory, port):
        async def bench(ctx):
            pipeline = [None] * READ_LATENCY
            while True:
                ctx.set(port.address.ready, draw.random() >= refuse)
                word = pipeline.pop()
                ctx.set(port.data.valid, word is not None)
                if word is not None:
                    ctx.set(port.data.payload, word)
                *_, valid, ready, address = await ctx.tick().sample(
                    port.address.valid, port.address.ready, port.address.payload)
                word = contents[memory][word_at(address, config)] if valid and ready else None
                pipeline.insert(0, None if word is None else int.from_bytes(word.tobytes(), "little"))
        return bench

    async def issue(ctx):
        await put_all(ctx, dut.engine.instruction, [
            {"memory": memory, "local": local, "words": count, "address": address}
            for memory, local, address, count in jobs])

    async def await_done(ctx):
        for memory, local, address, count in jobs:
            await ctx.tick().until(dut.engine.done)
            image = pack(config, memory, contents[memory][local:local + count])
            assert dram.image[address:address + len(image)] == image
            assert dram.reported == len(dram.writes)
            finished.append((address, len(image)))

    async def writes(ctx):
        await dram.serve_writes(ctx, dut.write_command, dut.write_data, dut.written)

    simulate_beside(dut, [issue, await_done], [
        writes, memory_bench(Memory.ACTIVATION, dut.activation_read),
        memory_bench(Memory.RESIDUAL, dut.residual_read)])
    covered = {i for start, length in finished for i in range(start, start + length)}
    assert all(byte == 0xA5 for i, byte in enumerate(dram.image) if i not in covered)
    return dram


@pytest.mark.parametrize("config", SHAPES, ids=name)
@pytest.mark.parametrize("latency, stall, refuse", [(0, 0, 0), (9, 0.3, 0.4)])
def test_store_follows_the_layout(config, latency, stall, refuse):
    a, r = Memory.ACTIVATION, Memory.RESIDUAL
    jobs = [(a, 3, 0x40, 5), (r, 1, 0x1FC0, 13), (a, 0, 0x4000, 100), (r, 9, 0x8000, 1),
            (r, 20, 0x8040, 65)]
    run_store(config, jobs, latency=latency, stall=stall, refuse=refuse, seed=4)


@pytest.mark.parametrize("dut", [LoadEngine, StoreEngine])
def test_zero_words_do_nothing(dut):
    if dut is LoadEngine:
        nothing = np.zeros((0, 16), np.uint8)
        jobs = [*((Memory.WEIGHT, 0, 64, nothing, packed) for packed in (0, 1, 2)),
                (Memory.PARAM, 2, 128, words_of(config(), Memory.PARAM, 3, 1), 0),
                (Memory.TABLE, 0, 64, nothing[:, :1], 0)]
        written, dram = run_load(config(), jobs, latency=2, stall=0, seed=0)
        assert written[Memory.WEIGHT] == {} and len(written[Memory.PARAM]) == 3
        assert len(dram.reads) == 1
    else:
        dram = run_store(config(), [(Memory.ACTIVATION, 0, 64, 0), (Memory.RESIDUAL, 0, 64, 2),
                                    (Memory.RESIDUAL, 0, 64, 0)], latency=2, stall=0, seed=0)
        assert len(dram.writes) == 1


def test_store_fills_the_bus():
    dram = run_store(config(depth=16, bus_bytes=4), [(Memory.ACTIVATION, 0, 64, 60)], latency=0,
                     stall=0, seed=0)
    assert sum(count for _, count in dram.writes) == 240
    assert max(count for _, count in dram.writes) == 64


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 6, 7, 9, 10, 12, 16, 21, 31, 33, 63, 64])
def test_ceil_divide_is_exact(divisor):
    """For every value of 20 bits; the expression works on arrays as on signals."""
    values = np.arange(1 << 20, dtype=np.int64)
    assert np.array_equal(ceil_divide(values, divisor), -(-values // divisor))


@pytest.mark.parametrize("stall", [0, 0.4])
def test_share_returns_to_each_client_its_own(stall):
    """Two clients with random bursts: each gets its words, in order; urgent ones overtake."""
    dut = ReadShare(4)
    dram = Dram(4, latency=6, stall=stall, seed=8)
    draw = random.Random(8)
    for address in range(0, len(dram.image), 4):
        dram.image[address:address + 4] = address.to_bytes(4, "little")
    clients = {}
    for number, kind in enumerate(("urgent", "other")):
        bursts = [(0x8000 * number + 0x100 * i, draw.randint(1, 20)) for i in range(25)]
        clients[kind] = bursts

    def ask(kind):
        async def bench(ctx):
            bursts = [{"address": address, "beats": count} for address, count in clients[kind]]
            await put_all(ctx, getattr(dut, f"{kind}_command"), bursts,
                          (draw.random() < 0.8 for _ in iter(int, 1)) if kind == "urgent" else ())
        return bench

    def take(kind):
        async def bench(ctx):
            expected = [address + 4 * i for address, count in clients[kind] for i in range(count)]
            received = await get_all(ctx, getattr(dut, f"{kind}_data"), len(expected),
                                     (draw.random() < stall for _ in iter(int, 1)))
            assert received == expected
        return bench

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.command, dut.data)

    simulate_beside(dut, [bench(kind) for bench in (ask, take) for kind in clients], [reads])
    order = [address >> 15 for address, _ in dram.reads]
    assert sorted(order) == [0] * 25 + [1] * 25
    assert order[-1] == 1, "the urgent client must not be the last"
