import itertools
import random

import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import TOKEN_LIMIT, Engine, Opcode
from moeware.hw.sequencer import IN_FLIGHT, Sequencer, Tokens

from .background import simulate_beside
from .simulate import simulate
from .streams import put_all

CONFIG = Config(tokens=1, outputs=2, depth=2, queries=1, lanes=1, bus_bytes=2, activation_banks=1,
                activation_words=16, residual_words=16, weight_words=16, param_words=16, tables=1,
                row_words=4, max_rows=4, max_experts=6, max_chosen=2, queue=3)


def instruction(number, *, wait=0, signal=0, conditional=0, expert=0):
    """A LOAD that can be told by its address."""
    return {"wait": wait, "signal": signal, "conditional": conditional,
            "fields": {"memory": 0, "local": 0, "words": 0, "address": number, "expert": expert}}


def sequencer():
    return Sequencer(CONFIG, Opcode.LOAD)


def test_tokens_count():
    """Random additions and takings, against a table of counts."""
    dut = Tokens()
    draw = random.Random(7)
    count = {pair: 0 for pair in itertools.product(Engine, Engine)}

    async def bench(ctx):
        for cycle in range(600):
            likely = 0.7 if cycle % 300 < 150 else 0.3
            for (source, target), held in count.items():
                available = ctx.get(dut.available[target][source])
                assert available == (held > 0)
                add, take = draw.random() < likely, held > 0 and draw.random() < 1 - likely
                ctx.set(dut.add[source][target], add)
                ctx.set(dut.take[target][source], take)
                count[source, target] += add - take
            await ctx.tick()
        ctx.set(dut.clear, 1)
        await ctx.tick()
        for source, target in count:
            assert not ctx.get(dut.available[target][source])

    simulate(dut, bench)


def test_tokens_do_not_wrap():
    dut = Tokens()

    async def bench(ctx):
        ctx.set(dut.add[Engine.LOAD][Engine.STORE], 1)
        await ctx.tick().repeat(TOKEN_LIMIT + 5)
        ctx.set(dut.add[Engine.LOAD][Engine.STORE], 0)
        ctx.set(dut.take[Engine.STORE][Engine.LOAD], 1)
        for _ in range(TOKEN_LIMIT):
            assert ctx.get(dut.available[Engine.STORE][Engine.LOAD])
            await ctx.tick()
        assert not ctx.get(dut.available[Engine.STORE][Engine.LOAD])

    simulate(dut, bench)


def engine_bench(dut, log, *, depth, seed):
    """An engine that takes up to `depth` instructions and finishes them in order, when it likes."""
    draw = random.Random(seed)

    async def bench(ctx):
        inside = []
        while True:
            ready, done = draw.random() < 0.5 and len(inside) < depth, False
            if inside and draw.random() < 0.3:
                done = True
                log.append(("done", inside.pop(0)))
            ctx.set(dut.engine.instruction.ready, ready)
            ctx.set(dut.engine.done, done)
            ctx.set(dut.engine.busy, bool(inside) or done)
            *_, valid, address, give = await ctx.tick().sample(
                dut.engine.instruction.valid, dut.engine.instruction.p.address, dut.give)
            if give:
                log.append(("give", give))
            if valid and ready:
                inside.append(address)
                log.append(("start", address))
    return bench


def run(dut, log, work, *, available=0x1F, empty=0, depth=2, seed=0):
    """Runs `work`; returns once everything is done and all tokens are given."""
    async def bench(ctx):
        ctx.set(dut.available, available)
        ctx.set(dut.empty, empty)
        await put_all(ctx, dut.queued, work)
        await ctx.tick().repeat(2)
        await ctx.tick().until(dut.idle)

    simulate_beside(dut, [bench], [engine_bench(dut, log, depth=depth, seed=seed)], deadline=3000)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_instructions_and_tokens(depth, seed):
    """Tokens of an instruction, also of one passed over, come after `done` and in order."""
    draw = random.Random(seed)
    work = [instruction(i, signal=draw.randrange(1, 32), conditional=draw.random() < 0.4,
                        expert=draw.randrange(6)) for i in range(40)]
    empty = 0b101010
    log = []
    run(sequencer(), log, work, empty=empty, depth=depth, seed=seed)

    executed = [i for i, w in enumerate(work)
                if not (w["conditional"] and empty >> w["fields"]["expert"] & 1)]
    assert 10 < len(executed) < 40
    assert [i for what, i in log if what == "start"] == executed
    assert [i for what, i in log if what == "done"] == executed
    assert [mask for what, mask in log if what == "give"] == [w["signal"] for w in work]
    given = 0
    for position, (what, value) in enumerate(log):
        if what == "give":
            if given in executed:
                assert ("done", given) in log[:position]
            given += 1


def test_done_right_behind_an_instruction_passed_over():
    """Two `done` in a row, with an instruction between that is passed over: no token is lost."""
    dut = sequencer()

    async def bench(ctx):
        ctx.set(dut.engine.instruction.ready, 1)
        ctx.set(dut.empty, 1)
        await put_all(ctx, dut.queued, [instruction(i, signal=1 << i, conditional=i == 1)
                                        for i in range(3)])
        await ctx.tick().repeat(12)
        given = []
        for done in (1, 1, 0, 0, 0, 0):
            ctx.set(dut.engine.done, done)
            *_, give = await ctx.tick().sample(dut.give)
            given += [give] * (give != 0)
        assert given == [1, 2, 4]

    simulate(dut, bench)


def test_an_instruction_takes_all_its_tokens_at_once():
    dut = sequencer()

    async def bench(ctx):
        await put_all(ctx, dut.queued, [instruction(1, wait=0b10100)])
        ctx.set(dut.engine.instruction.ready, 1)
        for available in (0, 0b00100, 0b10000, 0b01011):
            ctx.set(dut.available, available)
            for _ in range(4):
                await ctx.tick()
                assert not ctx.get(dut.take) and not ctx.get(dut.engine.instruction.valid)
            assert ctx.get(dut.waiting) and not ctx.get(dut.idle)
        ctx.set(dut.available, 0b11111)
        assert ctx.get(dut.take) == 0b10100 and not ctx.get(dut.waiting)
        await ctx.tick()
        assert ctx.get(dut.take) == 0
        assert ctx.get(dut.engine.instruction.valid)

    simulate(dut, bench)


def test_the_expert_is_looked_at_after_the_tokens():
    """The queue fills while the instruction waits: it executes, though it was empty before."""
    for filled in (False, True):
        dut = sequencer()

        async def bench(ctx):
            ctx.set(dut.empty, 0b111111)
            await put_all(ctx, dut.queued, [
                instruction(1, wait=1, signal=2, conditional=1, expert=4)])
            await ctx.tick().repeat(5)
            if filled:
                ctx.set(dut.empty, 0b101111)
            ctx.set(dut.available, 1)
            await ctx.tick().repeat(2)
            assert ctx.get(dut.engine.instruction.valid) == filled
            await ctx.tick()
            assert ctx.get(dut.give) == (0 if filled else 2)

        simulate(dut, bench)


def test_queue_and_flight_are_bounded():
    """An engine that takes everything and finishes nothing, then one that takes nothing."""
    dut = sequencer()

    async def bench(ctx):
        ctx.set(dut.engine.instruction.ready, 1)
        held = IN_FLIGHT + 1 + CONFIG.queue
        await put_all(ctx, dut.queued, [instruction(i) for i in range(held)])
        await ctx.tick().repeat(10)
        assert not ctx.get(dut.queued.ready)
        assert not ctx.get(dut.engine.instruction.valid)
        ctx.set(dut.engine.done, 1)
        await ctx.tick()
        ctx.set(dut.engine.done, 0)
        await ctx.tick().repeat(5)
        assert ctx.get(dut.queued.ready)

    simulate(dut, bench)


def test_clear():
    dut = sequencer()

    async def bench(ctx):
        await put_all(ctx, dut.queued, [instruction(i, wait=1) for i in range(3)])
        await ctx.tick().repeat(3)
        assert ctx.get(dut.waiting)
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        assert ctx.get(dut.idle) and not ctx.get(dut.waiting)
        ctx.set(dut.available, 1)
        await ctx.tick().repeat(5)
        assert not ctx.get(dut.engine.instruction.valid)

    simulate(dut, bench)
