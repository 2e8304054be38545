# amaranth: UnusedElaboratable=no
"""NORM against `numerics`: every mode, ragged rows, stalls on every port, chained instructions."""

import collections
import itertools
import random

import numpy as np
import pytest
from amaranth import Value, unsigned

from moeware.hw.arch import numerics
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import NormMode
from moeware.hw.arch.layout import pack_params
from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.norm import NormUnit
from moeware.hw.norm.rotate import Rotate
from moeware.hw.norm.row_queue import RowQueue

from .simulate import simulate, word_at
from .streams import get_all, put_all


def config(**sizes):
    base = {"tokens": 2, "outputs": 16, "depth": 8, "queries": 2, "lanes": 2, "bus_bytes": 2,
            "activation_banks": 1, "activation_words": 1024, "residual_words": 1024,
            "weight_words": 64, "param_words": 64, "tables": 1, "row_words": 64, "max_rows": 256,
            "max_experts": 16, "max_chosen": 2, "queue": 2}
    return Config(**base | sizes)


def norm(**fields):
    return {"rows": 1, "mode": NormMode.LAYER, "channels": 1, "source": 0, "source_stride": 0,
            "destination": 0, "destination_stride": 0, "param": 0, "epsilon": 0, "counted": 0,
            "factors": 0, "factor_stride": 0, "factor_words": 0} | fields


class Memories:
    """Random contents of the memories that the unit reads."""

    def __init__(self, sizes, seed, loud=False):
        draw = np.random.default_rng(seed)
        lanes = sizes.lanes
        limit = 1 << 15 if loud else 1000
        self.residual = draw.integers(-limit, limit, (sizes.residual_words, lanes))
        count = sizes.param_words * lanes
        self.bias = draw.integers(-3000, 3000, count)
        self.multiplier = draw.integers(0, 1 << 16, count)
        self.shift = draw.integers(15, 24, count)
        self.params = pack_params(sizes, self.bias, self.multiplier, self.shift)


def execute(sizes, memories, instruction):
    """The words that an instruction writes, by address, by `numerics`."""
    lanes, depth = sizes.lanes, sizes.depth
    channels, result = instruction["channels"], {}
    for i in range(instruction["rows"] if channels else 0):
        words = -(-channels // lanes)
        start = instruction["source"] + i * instruction["source_stride"]
        x = memories.residual[start:start + words].reshape(-1)[:channels]
        if instruction["mode"] != NormMode.SCALE:
            x = numerics.normalise(x, instruction["counted"] or channels, instruction["epsilon"],
                                   centred=instruction["mode"] == NormMode.LAYER)
        c = instruction["param"] * lanes + np.arange(channels)
        turns = instruction["factor_words"]
        y = numerics.requantise(x + memories.bias[c], memories.multiplier[c], memories.shift[c],
                                16 if turns else 8)
        if turns:
            start = instruction["factors"] + i * instruction["factor_stride"]
            factors = memories.residual[start + np.arange(words) % turns].reshape(-1)[:channels]
            y = numerics.rotate(y, factors)
        row = np.zeros(-(-channels // depth) * depth, np.uint8)
        row[:channels] = y.astype(np.int8).view(np.uint8)
        start = instruction["destination"] + i * instruction["destination_stride"]
        result |= enumerate(row.reshape(-1, depth), start)
    return result


def run(sizes, memories, instructions, refuse=0.0, gaps=0.0):
    """Runs instructions and compares what each wrote; every port refuses with probability `refuse`,
    and instructions come late with probability `gaps`. Returns counts."""
    dut = NormUnit(sizes)
    draw = random.Random(7)
    activation = {}
    state = {"done": 0, "cycles": 0, "reads": 0, "writes": 0, "stalled": 0}
    running = lambda: state["done"] < len(instructions)

    def reader(port, words):
        raw = [int.from_bytes(word.tobytes(), "little") for word in words]

        async def bench(ctx):
            data, garbage = Value.cast(port.data.payload), draw.getrandbits(16)
            under_way = collections.deque([None] * (READ_LATENCY - 1))
            while running():
                ready = draw.random() >= refuse
                ctx.set(port.address.ready, ready)
                *_, valid, address = await ctx.tick().sample(
                    port.address.valid, port.address.payload)
                state["reads"] += valid and ready
                under_way.append(raw[address] if valid and ready else None)
                word = under_way.popleft()
                ctx.set(port.data.valid, word is not None)
                ctx.set(data, garbage if word is None else word)
        return bench

    async def writer(ctx):
        write = dut.activation_write.write
        while running():
            ready = draw.random() >= refuse
            ctx.set(write.ready, ready)
            *_, valid, address, data, mask = await ctx.tick().sample(
                write.valid, write.p.address, write.p.data, write.p.mask)
            if valid and ready:
                state["writes"] += 1
                value = np.frombuffer(data.to_bytes(sizes.depth, "little"), np.uint8)
                assert mask == (1 << sizes.depth) - 1
                activation[word_at(address, sizes)] = value

    async def sequencer(ctx):
        for instruction in instructions:
            while draw.random() < gaps:
                await ctx.tick()
            ctx.set(dut.engine.instruction.payload, instruction)
            ctx.set(dut.engine.instruction.valid, 1)
            await ctx.tick().until(dut.engine.instruction.ready)
            ctx.set(dut.engine.instruction.valid, 0)

    async def observer(ctx):
        while running():
            *_, done, busy, stalled = await ctx.tick().sample(
                dut.engine.done, dut.engine.busy, dut.engine.stalled)
            state["cycles"] += 1
            state["stalled"] += stalled
            assert busy or not (done or stalled)
            if done:
                # All that it writes is there when it is done; the next may be ahead, elsewhere.
                expected = execute(sizes, memories, instructions[state["done"]])
                for address, word in expected.items():
                    assert np.array_equal(activation[address], word), (state, address)
                state["done"] += 1
        for _ in range(30):  # nothing comes after the last
            assert not ctx.get(dut.engine.done) and not ctx.get(dut.activation_write.write.valid)
            await ctx.tick()
        assert not ctx.get(dut.engine.busy)

    ports = [dut.residual_read, *([dut.factor_read] if sizes.rotary else [])]
    simulate(dut, *(reader(port, memories.residual.astype("<i2")) for port in ports),
             reader(dut.param_read, memories.params), writer, sequencer, observer)
    wanted = {a for i in instructions for a in execute(sizes, memories, i)}
    assert activation.keys() == wanted
    return state


SHAPES = [
    {"lanes": 1, "depth": 1, "outputs": 1}, {"lanes": 1, "depth": 4, "outputs": 4},
    {"lanes": 2, "depth": 8}, {"lanes": 4, "depth": 4},
    {"lanes": 3, "depth": 6, "outputs": 6}, {"lanes": 8, "depth": 16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("refuse", [0.0, 0.4])
def test_matches_numerics(shape, refuse):
    sizes = config(**shape)
    memories = Memories(sizes, seed=1, loud=sizes.lanes == 4)
    instructions = []
    for index, (mode, channels) in enumerate(
            [(NormMode.LAYER, 21), (NormMode.RMS, 16), (NormMode.SCALE, 13), (NormMode.LAYER, 1),
             (NormMode.RMS, 2 * sizes.depth + 1), (NormMode.LAYER, sizes.lanes)]):
        words = -(-channels // sizes.depth)
        instructions.append(norm(
            rows=3, mode=mode, channels=channels, source=7 + 11 * index, source_stride=23,
            destination=150 * index + 5, destination_stride=words + index, param=index,
            epsilon=(0, 5000, 1 << 33)[index % 3]))
    run(sizes, memories, instructions, refuse, gaps=refuse)


TURNING = [{"lanes": 2, "depth": 8}, {"lanes": 2, "depth": 2}, {"lanes": 4, "depth": 12, "outputs": 4},
           {"lanes": 8, "depth": 16}]


@pytest.mark.parametrize("shape", TURNING, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("refuse", [0.0, 0.4])
def test_pairs_are_turned(shape, refuse):
    """Instructions that turn and others that do not, back to back; rows whose factors begin again in
    their middle, end there, or last for all of the row; ragged last words."""
    sizes = config(rotary=1, residual_words=1600, param_words=128, **shape)
    memories = Memories(sizes, seed=8, loud=sizes.lanes == 4)
    memories.shift -= 4  # near the range of 16 bits, and beyond
    memories.params = pack_params(sizes, memories.bias, memories.multiplier, memories.shift)
    instructions, destination = [], 0
    for index, (mode, channels, words, counted) in enumerate([
            (NormMode.RMS, 20, 3, 17), (NormMode.SCALE, 2 * sizes.lanes, 1, 0),
            (NormMode.LAYER, 13, 0, 0), (NormMode.RMS, 2, 9, 0), (NormMode.SCALE, 26, 2, 0),
            (NormMode.LAYER, 24, 12, 20), (NormMode.RMS, 9, 0, 5), (NormMode.SCALE, 6, 0, 0),
            (NormMode.LAYER, 4 * sizes.lanes + 2, 4, 0)]):
        stride = -(-channels // sizes.depth)
        instructions.append(norm(
            rows=3, mode=mode, channels=channels, counted=counted, source=7 + 11 * index,
            source_stride=23, destination=destination, destination_stride=stride, param=index,
            epsilon=(0, 5000, 1 << 33)[index % 3], factors=900 + 5 * index,
            factor_stride=words + index % 2, factor_words=words))
        destination += 3 * stride
    run(sizes, memories, instructions, refuse, gaps=refuse)


def test_turned_rows_lose_no_cycle():
    sizes = config(rotary=1)
    state = run(sizes, Memories(sizes, seed=4), [norm(
        rows=12, mode=NormMode.RMS, channels=96, source_stride=30, destination_stride=12,
        factors=500, factor_stride=8, factor_words=8)])
    assert state["cycles"] <= 13 * 48 + 97 + Rotate.LATENCY
    assert state["reads"] == 3 * 12 * 48  # values, parameters and factors
    assert not state["stalled"]


def test_extreme_values():
    sizes = config(residual_words=1200, depth=4, param_words=1024, outputs=4, row_words=512)
    memories = Memories(sizes, seed=2)
    memories.multiplier[:], memories.shift[:], memories.bias[:] = 3000, 24, 0
    memories.params = pack_params(sizes, memories.bias, memories.multiplier, memories.shift)
    rows = memories.residual
    rows[:1024] = -1 << 15  # the largest sums: 2,048 times the most negative value
    rows[1024:1032] = 0
    rows[1032:1040] = 77
    rows[1040:1048] = [[32767, -32768]] * 8
    rows[1048:1056] = 0
    rows[1055] = [1, 0]
    instructions = [norm(mode=mode, channels=2048, source=0, destination=0, epsilon=epsilon)
                    for mode, epsilon in ((NormMode.RMS, (1 << 48) - 1), (NormMode.LAYER, 0))]
    for index, (mode, epsilon) in enumerate(
            [(mode, epsilon) for mode in (NormMode.LAYER, NormMode.RMS)
             for epsilon in (0, 1, (1 << 48) - 1)]):
        instructions.append(norm(rows=4, mode=mode, channels=16, source=1024, source_stride=8,
                                 destination=520 + 16 * index, destination_stride=4,
                                 epsilon=epsilon))
    run(sizes, memories, instructions)


def test_wide_rows():
    """Rows as wide as the configuration has them, with a ragged tail: the largest sums and variance,
    a variance of 0, and groups of wider rows. Biases take what `numerics` expects of every channel away,
    so that nothing of a difference is lost in 8 bits."""
    channels, words, draw = 4099, 513, np.random.default_rng(9)
    sizes = config(lanes=8, depth=8, row_words=words, residual_words=4 * words, param_words=6 * words,
                   activation_words=6 * words)
    memories = Memories(sizes, seed=9)
    rows = memories.residual.reshape(4, words * 8)
    rows[0] = -1 << 15
    rows[1] = np.where(np.arange(words * 8) % 2, -1 << 15, 32767)
    rows[2] = 12345
    rows[3] = draw.integers(-500, 500, words * 8)
    rows[3, ::600] = draw.integers(-1 << 15, 1 << 15, len(rows[3, ::600]))  # loud
    memories.multiplier[:], memories.shift[:] = 1 << 15, 15
    memories.bias[:] = draw.integers(-100, 101, len(memories.bias))
    instructions = []
    for index, (mode, row, epsilon) in enumerate([
            (NormMode.RMS, 0, (1 << 48) - 1), (NormMode.LAYER, 1, 1), (NormMode.LAYER, 2, 0),
            (NormMode.LAYER, 3, 7), (NormMode.RMS, 3, 0), (NormMode.LAYER, 0, (1 << 48) - 1)]):
        expected = numerics.normalise(rows[row, :channels], channels, epsilon,
                                      centred=mode == NormMode.LAYER)
        memories.bias[index * words * 8:][:channels] -= expected
        instructions.append(norm(mode=mode, channels=channels, epsilon=epsilon, source=row * words,
                                 destination=index * words, param=index * words))
    memories.params = pack_params(sizes, memories.bias, memories.multiplier, memories.shift)
    run(sizes, memories, instructions, refuse=0.2)


def test_values_that_are_only_scaled_may_be_of_wider_rows():
    sizes = config(param_words=512)
    memories = Memories(sizes, seed=6)
    assert 1024 > NormUnit(sizes).max_channels
    run(sizes, memories, [norm(rows=2, mode=NormMode.SCALE, channels=1024, source_stride=512,
                               destination_stride=128),
                          norm(rows=2, channels=16, source_stride=8, destination=300,
                               destination_stride=2)])


def test_empty_instructions():
    sizes = config()
    memories = Memories(sizes, seed=3)
    instructions = [norm(rows=0, channels=8), norm(rows=2, channels=0, mode=NormMode.RMS),
                    norm(rows=2, channels=10, source_stride=5, destination_stride=2),
                    norm(rows=0, channels=0, mode=NormMode.SCALE),
                    norm(rows=1, channels=9, mode=NormMode.SCALE, destination=9)]
    state = run(sizes, memories, instructions)
    assert state["writes"] == 2 * 2 + 2


@pytest.mark.parametrize("mode, channels, rows", [
    (NormMode.LAYER, 96, 12), (NormMode.RMS, 95, 12), (NormMode.SCALE, 96, 12),
    (NormMode.LAYER, 16, 30), (NormMode.SCALE, 16, 30)])
def test_rate(mode, channels, rows):
    sizes = config()
    memories = Memories(sizes, seed=4)
    state = run(sizes, memories, [norm(
        rows=rows, mode=mode, channels=channels, source_stride=30, destination_stride=12)])
    period = max(-(-channels // sizes.lanes), NormUnit.ROW_INTERVAL)
    assert state["cycles"] <= (rows + 1) * period + 97
    assert state["writes"] == rows * -(-channels // sizes.depth)  # whole words, each once
    assert state["reads"] == 2 * rows * -(-channels // sizes.lanes)  # values and parameters
    assert not state["stalled"]


def test_instructions_overlap():
    sizes = config()
    memories = Memories(sizes, seed=5)
    instructions = [norm(rows=2, channels=96, source=48 * i, source_stride=48, destination=24 * i,
                         destination_stride=12) for i in range(8)]
    state = run(sizes, memories, instructions)
    assert state["cycles"] <= (2 * 8 + 1) * 48 + 97 + 8 * 20


@pytest.mark.parametrize("idle, refuse", [((), ()), ((1, 1, 0), ()), ((), [1] * 20 + [0] * 20),
                                          ((1, 0, 0), (0, 1))])
def test_row_queue(idle, refuse):
    dut, sent = RowQueue(unsigned(8), 8), [random.Random(6).randrange(256) for _ in range(100)]

    async def producer(ctx):
        await put_all(ctx, dut.arriving, sent, itertools.cycle(idle))

    async def consumer(ctx):
        assert await get_all(ctx, dut.leaving, len(sent), itertools.cycle(refuse)) == sent
        assert not ctx.get(dut.leaving.valid)

    simulate(dut, producer, consumer, deadline=len(sent) * 4)


def test_row_queue_holds_its_depth():
    dut = RowQueue(unsigned(8), 4)

    async def bench(ctx):
        ctx.set(dut.arriving.valid, 1)
        taken = 0
        for cycle in range(20):
            assert ctx.get(dut.leaving.valid) == (cycle >= dut.LATENCY)
            taken += ctx.get(dut.arriving.ready)
            await ctx.tick()
        assert taken == 4 + 2

    simulate(dut, bench)


@pytest.mark.parametrize("depth", [0, 1, 6])
def test_row_queue_refuses_depth(depth):
    with pytest.raises(ValueError, match="RowQueue.depth must be a power of two"):
        RowQueue(unsigned(8), depth)
