import itertools

import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.registers import ENGINE_COUNTERS, MAGIC, Control, Register, Status, counter
from moeware.hw.control import ControlUnit

from .background import simulate_beside
from .host import access, read, write
from .simulate import simulate

CONFIG = Config(tokens=1, outputs=2, depth=2, queries=1, lanes=1, bus_bytes=2, activation_banks=1,
                activation_words=16, residual_words=16, weight_words=16, param_words=16, tables=1,
                row_words=4, max_rows=4, max_experts=6, max_chosen=2, queue=3)


async def end(ctx, dut, *, error=0):
    ctx.set(dut.finished, 1)
    ctx.set(dut.error, error)
    await ctx.tick()
    ctx.set(dut.finished, 0)
    ctx.set(dut.error, 0)


def test_identity_and_unknown_registers():
    dut = ControlUnit(CONFIG)

    async def bench(ctx):
        assert await read(ctx, dut.registers, Register.MAGIC) == MAGIC
        assert await read(ctx, dut.registers, Register.DIGEST, patience=3) == CONFIG.digest
        await write(ctx, dut.registers, Register.PROGRAM, 0xDEADBE80)
        assert await read(ctx, dut.registers, Register.PROGRAM) == 0xDEADBE80
        assert ctx.get(dut.program) == 0xDEADBE80
        last = counter(Engine.STORE, ENGINE_COUNTERS[-1])
        for index in (Register.CONTROL, 9, 15, last + 1, 255):
            await access(ctx, dut.registers, write=1, index=index, data=0xFFFFFFFE)
            assert await read(ctx, dut.registers, index) == 0
        assert await read(ctx, dut.registers, Register.STATUS) == 0
        await access(ctx, dut.registers, write=1, index=Register.MAGIC, data=5)
        assert await read(ctx, dut.registers, Register.MAGIC) == MAGIC

    simulate(dut, bench)


@pytest.mark.parametrize("error", [0, 1])
def test_start_and_end(error):
    dut = ControlUnit(CONFIG)
    starts = []

    async def bench(ctx):
        for _ in range(2):
            await write(ctx, dut.registers, Register.CONTROL, Control.START)
            assert await read(ctx, dut.registers, Register.STATUS) == Status.BUSY
            await write(ctx, dut.registers, Register.CONTROL, Control.START)
            ctx.set(dut.error, error)
            await ctx.tick()
            ctx.set(dut.error, 0)
            await end(ctx, dut)
            expected = Status.DONE | (Status.ERROR if error else 0)
            assert await read(ctx, dut.registers, Register.STATUS) == expected
            ctx.set(dut.error, 1)
            await ctx.tick()
            ctx.set(dut.error, 0)
            assert await read(ctx, dut.registers, Register.STATUS) == expected
        assert len(starts) == 2

    async def count_starts(ctx):
        while True:
            *_, start = await ctx.tick().sample(dut.start)
            if start:
                starts.append(1)

    simulate_beside(dut, [bench], [count_starts])


@pytest.mark.parametrize("program", [4, 32, 0x1001])
def test_start_refuses_a_misaligned_program(program):
    dut = ControlUnit(CONFIG)

    async def bench(ctx):
        await write(ctx, dut.registers, Register.PROGRAM, program)
        await write(ctx, dut.registers, Register.CONTROL, Control.START)
        assert await read(ctx, dut.registers, Register.STATUS) == Status.DONE | Status.ERROR
        await write(ctx, dut.registers, Register.PROGRAM, 128)
        await write(ctx, dut.registers, Register.CONTROL, Control.START)
        assert await read(ctx, dut.registers, Register.STATUS) == Status.BUSY

    simulate(dut, bench)


def test_counters():
    """Each counter counts its own event, from START to the end, and starts anew."""
    dut = ControlUnit(CONFIG)
    port = dut.registers
    lengths = []

    async def clock(ctx):
        for cycle in itertools.count():
            *_, start, finished = await ctx.tick().sample(dut.start, dut.finished)
            if start:
                lengths.append(-cycle)
            if finished:
                lengths[-1] += cycle

    async def bench(ctx):
        ctx.set(dut.read_beat, 1)
        for repeat in (1, 2):
            await write(ctx, port, Register.CONTROL, Control.START)
            events = {Register.INSTRUCTIONS: dut.dispatched, Register.WRITE_BEATS: dut.write_beat}
            events |= {counter(engine, name): getattr(dut, name)[engine]
                       for engine in Engine for name in ENGINE_COUNTERS}
            for length, event in enumerate(events.values(), start=repeat):
                ctx.set(event, 1)
                for _ in range(length):
                    await ctx.tick()
                ctx.set(event, 0)
            await end(ctx, dut)
            for length, index in enumerate(events, start=repeat):
                assert await read(ctx, port, index) == length
            cycles = await read(ctx, port, Register.CYCLES)
            assert cycles == lengths[-1] > sum(range(repeat, repeat + len(events)))
            assert await read(ctx, port, Register.READ_BEATS) == cycles
            assert await read(ctx, port, Register.CYCLES) == cycles

    simulate_beside(dut, [bench], [clock])
