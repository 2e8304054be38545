# amaranth: UnusedElaboratable=no
"""`LinearUnit` against `numerics`, exactly: every target and row selection on shapes that divide
nothing, under random stalls, one by one and one after another; and its cycles."""

import random

import numpy as np
import pytest

from moeware.hw.arch.isa import FIELDS, Opcode, Target
from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.linear import LinearUnit
from moeware.hw.linear.array import FIELD, TERMS

from .linear_machine import (
    HIDDEN,
    RESIDUAL,
    SOURCE,
    TABLE,
    TOKENS,
    Machine,
    config,
    halves,
    pairs,
    signed,
)
from .simulate import simulate

EVERY = {name: 0 for name, _ in FIELDS[Opcode.LINEAR]} | {"expert": 0}


async def _load_table(ctx, unit, machine):
    for entry in range(256):
        ctx.set(unit.table_write.payload, {"address": 256 * TABLE + entry,
                                           "data": machine.tables[TABLE][entry] & 255})
        ctx.set(unit.table_write.valid, 1)
        await ctx.tick()
    ctx.set(unit.table_write.valid, 0)


def run(config, instructions, seed=1, refuse=0.0):
    """Execute instructions one by one on unit and model, comparing everything after each.
    Returns the cycles of each, from the one in which it is taken to `done`, and `overhead`."""
    machine, model = Machine(config, seed, refuse), Machine(config, seed)
    unit, cycles = LinearUnit(config), []

    async def host(ctx):
        await _load_table(ctx, unit, machine)
        for number, fields in enumerate(instructions):
            fields = EVERY | fields
            writes, before = model.execute(fields), machine.writes
            ctx.set(unit.engine.instruction.payload, fields)
            ctx.set(unit.engine.instruction.valid, 1)
            await ctx.tick().until(unit.engine.instruction.ready)
            ctx.set(unit.engine.instruction.valid, 0)
            taken = 1
            while not ctx.get(unit.engine.done):
                assert ctx.get(unit.engine.busy)
                await ctx.tick()
                taken += 1
            cycles.append(taken)
            await ctx.tick()  # the bench has seen the last cycle
            where = f"instruction {number}: {fields}"
            assert (machine.activation == model.activation).all(), where
            assert (machine.residual == model.residual).all(), where
            assert machine.logits == model.logits, where
            assert machine.writes - before == writes, where
            machine.logits.clear()
            model.logits.clear()
            assert not ctx.get(unit.engine.done) and not ctx.get(unit.engine.busy), where
        assert len(machine.setups) == sum(
            f.get("target") == Target.ROUTER and f["rows"] > 0 for f in instructions)
        machine.over = True

    async def surroundings(ctx):
        await machine.bench(ctx, unit)

    simulate(unit, surroundings, host, deadline=60_000)
    return cycles, unit.overhead


def touched(config, f, queues):
    """Words that an instruction reads, and that it writes, as (memory, word)."""
    rows = len(queues[f["expert"]]) if f["queued"] else f["rows"]
    if not rows or not f["channels"] or not f["source_words"]:
        return set(), set()
    scattered = f["queued"] and f["scatter"], f["queued"] and f["gather"]
    targets, sources = (TOKENS if by else rows for by in scattered)
    results = f["channels"]
    reads = {("activation", f["source"] + row * f["source_stride"] + word)
             for row in range(sources) for word in range(f["source_words"])}
    if f["target"] == Target.ROUTER:
        return reads, set()
    memory, width = (("activation", config.depth) if f["target"] == Target.ACTIVATION
                     else ("residual", config.lanes))
    if f["product"] and memory == "activation":
        results = len(pairs(config, f))
    return reads, {(memory, f["destination"] + row * f["destination_stride"] + word)
                   for row in range(targets) for word in range(-(-results // width))}


def run_stream(config, instructions, seed=1, refuse=0.0, interval=3, prepare=lambda machine: None):
    """After `prepare`, execute instructions as a sequencer gives them, each once what it depends on is done, one
    every `interval` cycles at best, and compare all their effects, and `done` with their writes.

    Returns the cycles from taking the first to the last `done`, and `overhead`.
    """
    machine, model = Machine(config, seed, refuse), Machine(config, seed)
    instructions = [EVERY | fields for fields in instructions]
    prepare(machine)
    prepare(model)
    unit, written, needs, took = LinearUnit(config), [0], [], []
    done, effects = [], [touched(config, fields, model.queues) for fields in instructions]
    for number, fields in enumerate(instructions):
        written.append(written[-1] + model.execute(fields))
        reads, writes = effects[number]
        # Writes are done in order, so only these two must wait.
        needs.append(max((before + 1 for before in range(number)
                          if effects[before][1] & reads or effects[before][0] & writes), default=0))

    async def monitor(ctx):
        cycle = 0
        while not machine.over:
            _, _, finished, busy, taken = await ctx.tick().sample(
                unit.engine.done, unit.engine.busy,
                unit.engine.instruction.valid & unit.engine.instruction.ready)
            assert busy == (len(done) < len(took))
            if finished:
                done.append(cycle)
                assert machine.writes >= written[len(done)]
            if taken:
                took.append(cycle)
            cycle += 1

    async def host(ctx):
        await _load_table(ctx, unit, machine)
        for number, fields in enumerate(instructions):
            ctx.set(unit.engine.instruction.payload, fields)
            while len(done) < needs[number]:
                await ctx.tick()
            ctx.set(unit.engine.instruction.valid, 1)
            await ctx.tick().until(unit.engine.instruction.ready)
            ctx.set(unit.engine.instruction.valid, 0)
            await ctx.tick().repeat(interval - 1)
        while len(done) < len(instructions):
            await ctx.tick()
        await ctx.tick().repeat(30)
        machine.over = True

    async def surroundings(ctx):
        await machine.bench(ctx, unit)

    simulate(unit, surroundings, monitor, host, deadline=60_000)
    assert len(done) == len(instructions)
    assert (machine.activation == model.activation).all()
    assert (machine.residual == model.residual).all()
    assert machine.logits == model.logits and machine.writes == written[-1]
    return done[-1] - took[0], unit.overhead


def cases(config, seed):
    """Instructions of every target and row selection; their sizes vary with the seed."""
    draw = random.Random(seed)

    def case(target, words=None, channels=None, **fields):
        words = words or draw.randint(1, config.row_words)
        # Never a multiple of `outputs`, unless that is 1.
        channels = channels or config.outputs * draw.randint(0, 2) + draw.randint(
            1, max(1, config.outputs - 1))
        activation = target == Target.ACTIVATION
        stride = -(-channels // (config.depth if activation else config.lanes))
        return {
            "target": target, "rows": draw.randint(1, TOKENS),
            "source": SOURCE, "source_words": words,
            "source_stride": max(words, draw.randint(3, 8)), "channels": channels,
            "weight": draw.randrange(16), "param": draw.randrange(8),
            "destination": HIDDEN if activation else RESIDUAL,
            "destination_stride": stride + draw.randint(0, 2)} | fields

    yield case(Target.ACTIVATION)
    yield case(Target.ACTIVATION, rows=1, tabled=1, table=TABLE)
    yield case(Target.RESIDUAL, channels=3 * config.outputs)
    yield case(Target.RESIDUAL, accumulate=1, words=1)
    yield case(Target.ACTIVATION, rows=0)
    yield case(Target.ROUTER, rows=0)
    yield case(Target.ROUTER)
    yield case(Target.RESIDUAL, queued=1, gated=1, expert=4)
    # Many short output groups, and many short token groups.
    yield case(Target.RESIDUAL, rows=6, words=1, channels=8 * config.outputs)
    yield case(Target.ACTIVATION, rows=40, words=1, channels=1, source_stride=1)
    for expert in range(5):
        yield case(Target.ACTIVATION, queued=1, gather=1, expert=expert, tabled=1,
                   table=TABLE)
        yield case(Target.RESIDUAL, queued=1, scatter=1, gated=1, accumulate=1, expert=expert)
    yield case(Target.ACTIVATION, queued=1, gather=1, scatter=1, expert=4)
    # No router sends a token twice to an expert, but consecutive results may meet in a word.
    yield case(Target.RESIDUAL, queued=1, scatter=1, accumulate=1, channels=config.lanes, expert=5)
    yield case(Target.RESIDUAL, queued=1, gather=1, scatter=1, expert=3)
    yield case(Target.RESIDUAL, accumulate=1, gated=1, gather=1, scatter=1, expert=2)


SHAPES = [(3, 5, 6, 1), (2, 4, 8, 2), (1, 1, 1, 1), (5, 6, 9, 3), (1, 6, 4, 2), (4, 4, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.4], ids=("steady", "stalling"))
def test_matches_numerics(shape, refuse):
    run(config(*shape), list(cases(config(*shape), seed=sum(shape))), refuse=refuse)


def paired_cases(config, seed):
    """Products of pairs: of every number of words in an output group and in its tail, an odd number of
    which makes pairs that two groups share; of rows of queues; with and without a table."""
    draw = random.Random(seed)
    for number in range(16):
        words = draw.randint(1, config.row_words)
        # The last word of a row may be ragged, but is a second one.
        channels = config.lanes * (2 * draw.randint(0, 3 * max(1, config.outputs // config.lanes))
                                   + 1) + draw.randint(1, config.lanes)
        yield {
            "target": Target.ACTIVATION, "product": 1, "tabled": number % 2, "table": TABLE,
            "rows": draw.randint(1, TOKENS), "source": SOURCE, "source_words": words,
            "source_stride": max(words, draw.randint(3, 8)), "channels": channels,
            "weight": draw.randrange(16), "param": draw.randrange(8), "destination": HIDDEN,
            "destination_stride": -(-channels // config.depth) + draw.randint(0, 2),
            "narrow": draw.randint(0, 1) * config.narrow,
            **({"queued": 1, "gather": 1, "scatter": draw.randint(0, 1), "expert": draw.randrange(5)}
               if number % 3 == 0 else {})}
    # What came before is not met: neither by plain results, nor by those of another target.
    yield {"target": Target.ACTIVATION, "rows": 5, "source_words": 1, "source_stride": 1,
           "channels": 2 * config.outputs, "destination": HIDDEN,
           "destination_stride": 2 * config.outputs, "tabled": 1, "table": TABLE}
    yield {"target": Target.RESIDUAL, "product": 1, "rows": 5, "source_words": 1, "source_stride": 1,
           "channels": config.outputs, "destination": RESIDUAL,
           "destination_stride": config.outputs, "accumulate": 1}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.4], ids=("steady", "stalling"))
def test_products_match_numerics(shape, refuse):
    sizes = config(*shape, products=1, narrow=shape[0] % 2)
    run(sizes, list(paired_cases(sizes, seed=sum(shape))), refuse=refuse)


def mixed(config, seed, count):
    """Instructions of all kinds in random order, some of which read what others write."""
    draw = random.Random(seed)
    for _ in range(count):
        target = draw.choice((Target.ACTIVATION, Target.RESIDUAL, Target.RESIDUAL, Target.ROUTER)
                             if draw.random() < 0.3 else (Target.ACTIVATION, Target.RESIDUAL))
        channels = draw.randint(1, 2 * config.outputs + 1)
        width = config.depth if target == Target.ACTIVATION else config.lanes
        words = draw.randint(1, 3)
        product = config.products * draw.randint(0, 1)
        if product:
            channels += config.lanes * (-(-channels // config.lanes) % 2)
        yield {
            "target": target, "rows": draw.choice((0, 1, 1, 2, 3, 5, 7)), "source_words": words,
            "source": draw.choice((SOURCE, SOURCE, HIDDEN, 270)),
            "source_stride": draw.randint(words, 4), "channels": channels,
            "weight": draw.randrange(16), "param": draw.randrange(8),
            "destination": draw.choice((HIDDEN, 270, 390) if target == Target.ACTIVATION
                                       else (RESIDUAL, 180, 350)),
            "destination_stride": -(-channels // width) + draw.randint(0, 1),
            "tabled": draw.randint(0, 1), "table": TABLE, "accumulate": draw.randint(0, 1),
            "narrow": draw.randint(0, 1) * config.narrow, "product": product,
            **({"queued": target != Target.ROUTER, "expert": draw.randrange(5),
                "gather": draw.randint(0, 1), "scatter": draw.randint(0, 1),
                "gated": draw.randint(0, 1)} if draw.random() < 0.5 else {})}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.3], ids=("steady", "stalling"))
def test_streams_match_numerics(shape, refuse):
    run_stream(config(*shape), list(mixed(config(*shape), sum(shape), 60)), refuse=refuse)


@pytest.mark.parametrize("shape", [(2, 3, 6, 1), (1, 1, 1, 1), (2, 4, 8, 2), (1, 2, 18, 2)], ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.3], ids=("steady", "stalling"))
def test_narrow_streams_match_numerics(shape, refuse):
    """Weights of 4 and of 8 bits in turn."""
    sizes = config(*shape, narrow=1)
    run_stream(sizes, list(mixed(sizes, sum(shape), 60)), refuse=refuse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.6], ids=("steady", "stalling"))
def test_streams_with_products_match_numerics(shape, refuse):
    """Pairs and plain results in turn, close upon each other, also with narrow weights."""
    sizes = config(*shape, products=1, narrow=1 - shape[0] % 2)
    run_stream(sizes, list(mixed(sizes, sum(shape), 60)), refuse=refuse)


def test_packed_products_are_exact():
    """Every activation with every pair of weights, and the largest sums that stay together."""
    activation, low, high = np.ogrid[-128:128, -7:8, -7:8]
    for terms in (1, TERMS):
        both = terms * activation * ((high << FIELD) + low)
        assert (signed(both, FIELD) == terms * activation * low).all()
        assert (((both >> FIELD) + (both >> FIELD - 1 & 1)) == terms * activation * high).all()
        assert abs(both).max() < 1 << 2 * FIELD - 1
    operand = (high << FIELD) + low
    assert -(1 << 17) <= operand.min() and operand.max() < 1 << 17


@pytest.mark.parametrize("depth", [5, 8, 20])
def test_packed_sums_at_their_limits(depth):
    """In every sum all products have the same sign, and the largest size."""
    sizes = config(2, 4, depth, 1, narrow=1, row_words=4)

    def extreme(machine):
        rng = np.random.default_rng(depth)
        machine.activation[:] = rng.choice((-128, 127), (len(machine.activation), 1))
        limits = rng.choice((-7, 7), (2, 1, sizes.outputs, 1))
        machine.weight[:] = halves(np.broadcast_to(limits, (2, *machine.weight.shape)))
        machine.weight[40:] = rng.choice((-128, 127), (len(machine.weight) - 40, 4, 1))

    run_stream(sizes, [{
        "target": Target.ROUTER, "rows": 7, "source_words": words, "source_stride": 4,
        "channels": 16, "weight": 0 if narrow else 40, "narrow": narrow}
        for words in (1, 4) for narrow in (1, 0)], prepare=extreme)


MODES = {  # fields, and the cycles that they add
    "activation": ({"target": Target.ACTIVATION}, 1),
    "tabled": ({"target": Target.ACTIVATION, "tabled": 1, "table": TABLE}, 1),
    "residual": ({"target": Target.RESIDUAL}, 1),
    "expert": ({"target": Target.RESIDUAL, "accumulate": 1, "queued": 1, "gated": 1,
                "scatter": 1, "expert": 3}, (READ_LATENCY + 3) + 3),
}
# Source words and output groups: many words; few; one, which does not hide the pipeline. Whether
# the array or write-back is the limit differs from shape to shape and from group to group.
SIZES = [(12, 5, ("tabled", "expert")), (4, 5, ("residual", "tabled")),
         (1, 8, ("activation", "expert"))]


@pytest.mark.parametrize("shape", [(3, 5, 6, 1), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("products", [0, 1])
def test_no_cycle_is_lost(shape, products):
    tokens, outputs, depth, lanes = shape
    sizes = config(*shape, row_words=12, activation_words=1024, products=products)
    instructions, expected = [], []
    for words, groups, modes in SIZES:
        for mode, extra in map(MODES.get, modes):
            channels = groups * outputs - 2
            if products and mode["target"] == Target.ACTIVATION:  # of an even number of words
                mode = mode | {"product": 1}
                channels += lanes * (-(-channels // lanes) % 2)
            width = depth if mode["target"] == Target.ACTIVATION else lanes
            instructions.append({
                "rows": TOKENS, "source": 0, "source_stride": words, "source_words": words,
                "channels": channels,
                "destination": 400 if mode["target"] == Target.ACTIVATION else 0,
                "destination_stride": -(-channels // width)} | mode)
            now = free = 0
            for first in range(0, TOKENS, tokens):
                rows = min(tokens, TOKENS - first)
                # A row takes at least two cycles to fetch, but its last word has not to wait.
                now = max(now, (first + rows - 1) * max(words, 2) + words)
                for base in range(0, channels, outputs):
                    now = max(now + words, free)
                    free = now + rows * -(-min(outputs, channels - base) // lanes)
            expected.append(free + extra)
    cycles, overhead = run(sizes, instructions)
    assert [taken - overhead for taken in cycles] == expected


@pytest.mark.parametrize("shape, words, groups", [
    ((2, 4, 8, 2), 4, 4), ((3, 5, 6, 1), 5, 4), ((1, 6, 4, 2), 2, 3), ((4, 4, 4, 4), 3, 5)], ids=str)
def test_no_cycle_is_lost_between_instructions(shape, words, groups):
    """Short instructions of several kinds, whose rows are fetched in time: the array, or where that
    takes longer write-back, is at work in every cycle from the first to the last."""
    tokens, outputs, depth, lanes = shape
    kinds = [(mode, extra) for mode, extra in MODES.values() if not mode.get("queued")]
    instructions, now, free = [], 0, 0
    for number in range(40):
        (mode, extra), rows = kinds[number % len(kinds)], tokens * (1 + number % 2)
        channels = groups * outputs - number % 3
        width = depth if mode["target"] == Target.ACTIVATION else lanes
        instructions.append({
            "rows": rows, "source_stride": words, "source_words": words, "channels": channels,
            "weight": number % 8, "param": number % 4,
            "destination": 400 if mode["target"] == Target.ACTIVATION else 100,
            "destination_stride": -(-channels // width)} | mode)
        for _ in range(0, rows, tokens):
            now = max(now, (tokens - 1) * max(words, 2) + words)
            for base in range(0, channels, outputs):
                now = max(now + words, free)
                free = now + tokens * -(-min(outputs, channels - base) // lanes)
    cycles, overhead = run_stream(config(*shape), instructions)
    assert cycles == free + overhead + extra
