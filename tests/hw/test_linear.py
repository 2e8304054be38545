# amaranth: UnusedElaboratable=no
"""`LinearUnit` against `numerics`, exactly: every target and row selection on shapes that divide
nothing, under random stalls, one by one and one after another; and its cycles."""

import random

import numpy as np
import pytest
from amaranth import Value

from moeware.hw.arch import numerics
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import FIELDS, Opcode, Target
from moeware.hw.arch.layout import pack_params
from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.linear import LinearUnit

from .simulate import simulate

EXPERTS = {0: "empty", 1: "one", 2: "some", 3: "all", 4: "ragged", 5: "repeated"}
TOKENS, SOURCE, HIDDEN = 11, 7, 150  # rows; activation word of the input; of the written rows
RESIDUAL, TABLE, TABLES = 3, 1, 2


def config(tokens, outputs, depth, lanes, **changes):
    return Config(**{
        "tokens": tokens, "outputs": outputs, "depth": depth, "lanes": lanes,
        "queries": 1, "bus_bytes": 4, "activation_banks": 1, "activation_words": 512,
        "residual_words": 512, "weight_words": 512, "param_words": 128, "tables": TABLES,
        "row_words": 5, "max_rows": 16, "max_experts": 8, "max_chosen": 2, "queue": 2} | changes)


class Machine:
    """The memories, queues and router around a linear unit: as numpy arrays for `execute`, and as
    a bench that refuses at random with probability `refuse`."""

    def __init__(self, config, seed, refuse=0.0):
        self.config, self.refuse = config, refuse
        self.draw, rng = random.Random(seed), np.random.default_rng(seed)
        self.activation = rng.integers(-128, 128, (config.activation_words, config.depth))
        self.residual = rng.integers(-32768, 32768, (config.residual_words, config.lanes))
        self.weight = rng.integers(-128, 128, (config.weight_words, config.outputs, config.depth))
        channels = config.param_words * config.lanes
        self.bias = rng.integers(-2**31, 2**31, channels) >> rng.integers(13, 31, channels)
        self.bias[5::13] = rng.choice((-2**31, 2**31 - 1), len(self.bias[5::13]))  # sums wrap
        self.multiplier = rng.integers(0, 1 << 16, channels)
        self.shift = rng.integers(14, 30, channels)
        self.shift[6::7], self.shift[3::11] = 1, 47
        params = pack_params(config, self.bias, self.multiplier, self.shift)
        self.params = [int.from_bytes(word.tobytes(), "little") for word in params]
        self.tables = rng.integers(-128, 128, (config.tables, 256))
        tokens = {"empty": [], "one": [TOKENS - 1], "some": [2, 3, 5, 9],
                  "all": range(TOKENS), "ragged": [10, 0, 1, 4, 7],
                  "repeated": [3, 3, 3, 2, 3, 3]}
        self.queues = {expert: [(token, (0, 65535, 32768, self.draw.randrange(1 << 16))[i % 4])
                                for i, token in enumerate(tokens[name])]
                       for expert, name in EXPERTS.items()}
        self.logits, self.setups, self.writes, self.over = [], [], 0, False
        self.routed = 0

    # The unit's ports, on the same arrays.

    async def bench(self, ctx, unit):
        reads = [(unit.activation_read, lambda a: _pack(self.activation[a], 8)),
                 (unit.residual_read, lambda a: _pack(self.residual[a], 16)),
                 (unit.weight_read, lambda a: _pack(self.weight[a].ravel(), 8)),
                 (unit.param_read, self.params.__getitem__)]
        writes = [(unit.activation_write.write, self.activation, 8),
                  (unit.residual_write.write, self.residual, 16)]
        readies = ([port.address.ready for port, _ in reads if port is not unit.weight_read]
                   + [port.ready for port, _, _ in writes] + [unit.logits.ready, unit.route.ready])
        ctx.set(unit.weight_read.address.ready, 1)
        pending = [[None] * (READ_LATENCY - 1) for _ in reads]
        entries, length, route_in = [None] * (READ_LATENCY - 1), 0, 0
        sampled = ([s for port, _ in reads
                    for s in (port.address.valid, port.address.ready, port.address.payload)]
                   + [s for port, _, _ in writes for s in (port.valid, port.ready, port.payload)]
                   + [unit.logits.valid, unit.logits.ready, unit.logits.payload,
                      unit.route.valid, unit.route.ready, unit.route.payload,
                      unit.queue.expert, unit.queue.index.valid, unit.queue.index.payload])
        while not self.over:
            for ready in readies:
                ctx.set(ready, self.draw.random() >= self.refuse)
            values = iter((await ctx.tick().sample(*sampled))[2:])
            for i, (port, look_up) in enumerate(reads):
                valid, ready, address = next(values), next(values), next(values)
                payload, word = Value.cast(port.data.payload), pending[i].pop(0)
                # What is on the port when nothing arrives must not matter.
                ctx.set(payload, self.draw.getrandbits(len(payload)) if word is None else word)
                ctx.set(port.data.valid, word is not None)
                pending[i].append(look_up(address) if valid and ready else None)
            for port, memory, bits in writes:
                valid, ready, payload = next(values), next(values), next(values)
                if valid and ready:
                    self.writes += 1
                    for cell in range(memory.shape[1]):
                        if payload.mask >> cell & 1:
                            memory[payload.address, cell] = _signed(
                                payload.data >> bits * cell, bits)
            valid, ready, payload = next(values), next(values), next(values)
            ctx.set(unit.route_done, route_in == 1)
            route_in = max(0, route_in - 1)
            if valid and ready:
                experts, rows = self.setups[-1].experts, self.setups[-1].rows
                count = min(self.config.lanes, experts - payload.channel)
                self.logits.append((payload.row, payload.channel, *payload.logits[:count]))
                self.routed += 1
                if self.routed == rows * -(-experts // self.config.lanes):
                    route_in = 1
            valid, ready, payload = next(values), next(values), next(values)
            if valid and ready:
                self.setups.append(payload)
                self.routed = 0
            expert, valid, index = next(values), next(values), next(values)
            ctx.set(unit.queue.length, length)
            length = len(self.queues.get(expert, ()))
            token, weight = entries.pop(0) or (self.draw.getrandbits(13), self.draw.getrandbits(16))
            ctx.set(unit.queue.entry.payload, {"token": token, "weight": weight})
            entries.append(self.queues[index.expert][index.index] if valid else None)

    # The same in numpy.

    def execute(self, fields):
        """Effects of LINEAR on the arrays, given every field. Returns the writes that it takes."""
        f, c = fields, self.config
        queue = self.queues[f["expert"]] if f["queued"] else [(i, 0) for i in range(f["rows"])]
        sources, targets = ([token if f[by] and f["queued"] else i
                             for i, (token, _) in enumerate(queue)] for by in ("gather", "scatter"))
        if not queue or not f["channels"] or not f["source_words"]:
            return 0
        groups = -(-f["channels"] // c.outputs)
        weight = self.weight[f["weight"]:][:groups * f["source_words"]]
        weight = weight.reshape(groups, -1, c.outputs, c.depth).swapaxes(1, 2)
        weight = weight.reshape(groups * c.outputs, -1)[:f["channels"]]
        rows = [self.activation[f["source"] + row * f["source_stride"]:][:f["source_words"]].ravel()
                for row in sources]
        channels = slice(f["param"] * c.lanes, f["param"] * c.lanes + f["channels"])
        bias, scale = self.bias[channels], (self.multiplier[channels], self.shift[channels])
        values = (np.array(rows) @ weight.T + bias).astype(np.int32).astype(np.int64)

        if f["target"] == Target.ROUTER:
            for first in range(0, len(rows), c.tokens):
                for base in range(0, f["channels"], c.outputs):
                    for row in range(first, min(first + c.tokens, len(rows))):
                        for channel in range(base, min(base + c.outputs, f["channels"]), c.lanes):
                            self.logits.append((row, channel, *values[row, channel:][
                                :min(c.lanes, f["channels"] - channel)].tolist()))
            return 0
        for row, target in enumerate(targets):
            start = f["destination"] + target * f["destination_stride"]
            if f["target"] == Target.ACTIVATION:
                result = numerics.requantise(values[row], *scale)
                if f["tabled"]:
                    result = self.tables[f["table"]][result & 255]
                self.activation[start:].reshape(-1)[:f["channels"]] = result
            else:
                result = numerics.requantise(values[row], *scale, bits=16)
                if f["gated"] and f["queued"]:
                    result = numerics.gated(result, queue[row][1])
                flat = self.residual[start:].reshape(-1)[:f["channels"]]
                flat[:] = numerics.accumulate_residual(flat, result) if f["accumulate"] else result
        return len(rows) * -(-f["channels"] // c.lanes)


def _pack(values, bits):
    return sum((int(value) & (1 << bits) - 1) << bits * i for i, value in enumerate(values))


def _signed(value, bits):
    value &= (1 << bits) - 1
    return value - (value >> bits - 1 << bits)


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
    reads = {("activation", f["source"] + row * f["source_stride"] + word)
             for row in range(sources) for word in range(f["source_words"])}
    if f["target"] == Target.ROUTER:
        return reads, set()
    memory, width = (("activation", config.depth) if f["target"] == Target.ACTIVATION
                     else ("residual", config.lanes))
    return reads, {(memory, f["destination"] + row * f["destination_stride"] + word)
                   for row in range(targets) for word in range(-(-f["channels"] // width))}


def run_stream(config, instructions, seed=1, refuse=0.0, interval=3):
    """Execute instructions as a sequencer gives them, each once what it depends on is done, one
    every `interval` cycles at best, and compare all their effects, and `done` with their writes.

    Returns the cycles from taking the first to the last `done`, and `overhead`.
    """
    machine, model = Machine(config, seed, refuse), Machine(config, seed)
    instructions = [EVERY | fields for fields in instructions]
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


def mixed(config, seed, count):
    """Instructions of all kinds in random order, some of which read what others write."""
    draw = random.Random(seed)
    for _ in range(count):
        target = draw.choice((Target.ACTIVATION, Target.RESIDUAL, Target.RESIDUAL, Target.ROUTER)
                             if draw.random() < 0.3 else (Target.ACTIVATION, Target.RESIDUAL))
        channels = draw.randint(1, 2 * config.outputs + 1)
        width = config.depth if target == Target.ACTIVATION else config.lanes
        words = draw.randint(1, 3)
        yield {
            "target": target, "rows": draw.choice((0, 1, 1, 2, 3, 5, 7)), "source_words": words,
            "source": draw.choice((SOURCE, SOURCE, HIDDEN, 270)),
            "source_stride": draw.randint(words, 4), "channels": channels,
            "weight": draw.randrange(16), "param": draw.randrange(8),
            "destination": draw.choice((HIDDEN, 270, 390) if target == Target.ACTIVATION
                                       else (RESIDUAL, 180, 350)),
            "destination_stride": -(-channels // width) + draw.randint(0, 1),
            "tabled": draw.randint(0, 1), "table": TABLE, "accumulate": draw.randint(0, 1),
            **({"queued": target != Target.ROUTER, "expert": draw.randrange(5),
                "gather": draw.randint(0, 1), "scatter": draw.randint(0, 1),
                "gated": draw.randint(0, 1)} if draw.random() < 0.5 else {})}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refuse", [0.0, 0.3], ids=("steady", "stalling"))
def test_streams_match_numerics(shape, refuse):
    run_stream(config(*shape), list(mixed(config(*shape), sum(shape), 60)), refuse=refuse)


MODES = {  # fields, and the cycles that they add
    "activation": ({"target": Target.ACTIVATION}, 0),
    "tabled": ({"target": Target.ACTIVATION, "tabled": 1, "table": TABLE}, 0),
    "residual": ({"target": Target.RESIDUAL}, 0),
    "expert": ({"target": Target.RESIDUAL, "accumulate": 1, "queued": 1, "gated": 1,
                "scatter": 1, "expert": 3}, (READ_LATENCY + 1) + 3),
}
# Source words and output groups: many words; few; one, which does not hide the pipeline. Whether
# the array or write-back is the limit differs from shape to shape and from group to group.
SIZES = [(12, 5, ("tabled", "expert")), (4, 5, ("residual", "tabled")),
         (1, 8, ("activation", "expert"))]


@pytest.mark.parametrize("shape", [(3, 5, 6, 1), (4, 4, 4, 4)], ids=str)
def test_no_cycle_is_lost(shape):
    tokens, outputs, depth, lanes = shape
    sizes = config(*shape, row_words=12, activation_words=1024)
    instructions, expected = [], []
    for words, groups, modes in SIZES:
        channels = groups * outputs - 2
        for mode, extra in map(MODES.get, modes):
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
    kinds = [mode for mode, _ in MODES.values() if not mode.get("queued")]
    instructions, now, free = [], 0, 0
    for number in range(40):
        mode, rows = kinds[number % len(kinds)], tokens * (1 + number % 2)
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
    assert cycles == free + overhead
