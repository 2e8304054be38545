import itertools
import random

import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import FIELDS, HEADER, Engine, Instruction, Opcode, decode, encode
from moeware.hw.fetch import BURST_BYTES, Fetch

from .background import simulate_beside
from .dram import Dram

ENGINES = [Opcode(engine) for engine in Engine]


def config(bus_bytes):
    return Config(tokens=1, outputs=2, depth=2, queries=1, lanes=1, bus_bytes=bus_bytes,
                  activation_banks=1, activation_words=16, residual_words=16, weight_words=16,
                  param_words=16, tables=1, row_words=4, max_rows=4, max_experts=6, max_chosen=2,
                  queue=3)


def random_instruction(draw, opcode):
    return Instruction(opcode, {name: draw.getrandbits(width)
                                for name, width in HEADER[1:] + FIELDS[opcode]})


def flatten(opcode, payload):
    """The fields of a dispatched instruction, as in `Instruction`."""
    header = {name: payload[name] for name in ("wait", "signal", "conditional")}
    return header | {name: payload.fields[name] for name, _ in (*FIELDS[opcode], ("expert", 8))}


def run(bus_bytes, programs, *, refuse=0.0, latency=0, stall=0.0, seed=0):
    """Runs programs (address, bytes) one after the other. Returns for each the dispatched
    instructions (opcode, fields), whether it was illegal, and the reads it made."""
    dut = Fetch(config(bus_bytes))
    dram = Dram(bus_bytes, latency=latency, stall=stall, seed=seed)
    draw = random.Random(seed)
    streams = [getattr(dut, opcode.name.lower()) for opcode in ENGINES]
    received, results = [], []
    for address, image in programs:
        dram.image[address:address + len(image)] = image

    async def queues(ctx):
        while True:
            for port in streams:
                ctx.set(port.ready, draw.random() >= refuse)
            signals = [signal for port in streams
                       for signal in (port.valid, port.ready, port.payload)]
            _, _, *values = await ctx.tick().sample(*signals)
            for opcode, valid, ready, payload in zip(ENGINES, *(values[i::3] for i in range(3))):
                if valid and ready:
                    received.append((opcode, flatten(opcode, payload)))

    async def bench(ctx):
        for address, _ in programs:
            received.clear()
            dram.reads.clear()
            ctx.set(dut.program, address)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            assert not ctx.get(dut.idle) and not ctx.get(dut.illegal)
            dispatched = 0
            while not ctx.get(dut.idle):
                *_, pulse = await ctx.tick().sample(dut.dispatched)
                dispatched += pulse
            results.append((list(received), ctx.get(dut.illegal), list(dram.reads)))
            assert dispatched == len(received) + (not ctx.get(dut.illegal))
            await ctx.tick().repeat(draw.randint(1, 3))

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.read_command, dut.read_data)

    simulate_beside(dut, [bench], [queues, reads])
    return results


def check(program, result, bus_bytes):
    """Every instruction before END arrived whole; at most one burst beyond END's was read."""
    address, image = program
    received, illegal, reads = result
    expected = [decode(image[i:i + 32]) for i in range(0, len(image) - 32, 32)]
    assert not illegal
    assert [opcode for opcode, _ in received] == [i.opcode for i in expected]
    for instruction, (_, fields) in zip(expected, received):
        assert fields == {name: getattr(instruction, name) for name in fields}
    position = address
    for start, beats in reads:
        assert start == position
        position += beats * bus_bytes
    assert position <= (address + len(image) - 1) // BURST_BYTES * BURST_BYTES + 2 * BURST_BYTES


@pytest.mark.parametrize("bus_bytes", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("refuse, latency, stall", [(0, 0, 0), (0.7, 30, 0), (0.3, 5, 0.4)])
def test_instructions_arrive_whole_and_in_order(bus_bytes, refuse, latency, stall):
    draw = random.Random(bus_bytes)
    end = encode(Instruction(Opcode.END, {}))
    programs = []
    for address, count in ((0x40, 19), (0x1FC0, 3), (0x4000, 0), (0xC040, 1), (0x8000, 7)):
        body = [encode(random_instruction(draw, draw.choice(ENGINES))) for _ in range(count)]
        programs.append((address, b"".join(body) + end))
    results = run(bus_bytes, programs, refuse=refuse, latency=latency, stall=stall)
    for program, result in zip(programs, results, strict=True):
        check(program, result, bus_bytes)


@pytest.mark.parametrize("opcode", [5, 6])
def test_an_illegal_opcode_stops_the_dispatch(opcode):
    draw = random.Random(3)
    first = b"".join(encode(random_instruction(draw, Opcode.NORM)) for _ in range(3))
    rest = first + encode(Instruction(Opcode.END, {}))
    legal = (0x1000, rest)
    results = run(8, [(0x40, first + bytes([opcode]) + bytes(31) + rest), legal])
    received, illegal, _ = results[0]
    assert illegal and len(received) == 3
    check(legal, results[1], 8)


def test_prefetch_keeps_up():
    """With a memory of 20 cycles, an instruction leaves in every fifth cycle of a 64-bit bus."""
    dut = Fetch(config(8))
    dram = Dram(8, latency=20)
    count = 64
    for i in range(count):
        dram.image[32 * i:32 * i + 32] = encode(Instruction(Opcode.NORM, {"rows": i}))
    times = []

    async def bench(ctx):
        ctx.set(dut.norm.ready, 1)
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        for cycle in itertools.count():
            *_, pulse = await ctx.tick().sample(dut.dispatched)
            if pulse:
                times.append(cycle)
            if len(times) == count:
                break

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.read_command, dut.read_data)

    simulate_beside(dut, [bench], [reads])
    assert times[-1] - times[0] <= 5 * (count - 1) + 10


def test_stop():
    dut = Fetch(config(8))
    dram = Dram(8, latency=5)
    dram.image[:1024] = encode(Instruction(Opcode.NORM, {})) * 32

    async def bench(ctx):
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        await ctx.tick().until(dut.blocked)
        ctx.set(dut.stop, 1)
        await ctx.tick()
        ctx.set(dut.stop, 0)
        ctx.set(dut.norm.ready, 1)
        await ctx.tick().until(dut.idle)
        assert not ctx.get(dut.norm.valid) and not ctx.get(dut.illegal)

    async def reads(ctx):
        await dram.serve_reads(ctx, dut.read_command, dut.read_data)

    simulate_beside(dut, [bench], [reads])
