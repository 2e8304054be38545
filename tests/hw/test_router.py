"""The router against `numerics`, and the known faults of earlier designs."""

import random

import numpy as np
import pytest

from moeware.hw.arch import numerics
from moeware.hw.arch.config import Config
from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.router import Router

from .simulate import simulate

LOUD = (40000, 30)  # multiplier and shift that spread the weights of logits of some 2**20
FLAT = (0, 1)  # all weights alike


def config(**sizes):
    base = {"tokens": 2, "outputs": 4, "depth": 8, "queries": 2, "lanes": 2, "bus_bytes": 2,
            "activation_banks": 1, "activation_words": 64, "residual_words": 64,
            "weight_words": 64, "param_words": 64, "tables": 1, "row_words": 64, "max_rows": 32,
            "max_experts": 16, "max_chosen": 2, "queue": 2}
    return Config(**base | sizes)


def random_logits(rows, experts, seed, limit=1 << 20):
    return np.random.default_rng(seed).integers(-limit, limit, (rows, experts))


def words(sizes, logits):
    """Logits as the linear unit sends them; lanes past the last expert hold anything."""
    rows, experts = logits.shape
    draw = np.random.default_rng(9)
    for group in range(0, rows, sizes.tokens):
        for output in range(0, experts, sizes.outputs):
            for row in range(group, min(group + sizes.tokens, rows)):
                for channel in range(output, min(output + sizes.outputs, experts), sizes.lanes):
                    word = draw.integers(1 << 30, 1 << 31, sizes.lanes)
                    part = logits[row, channel:channel + sizes.lanes]
                    word[:len(part)] = part
                    yield {"row": row, "channel": channel, "logits": word.tolist()}


def expected_queues(sizes, logits, chosen, over_chosen, multiplier, shift):
    queues = [[] for _ in range(sizes.max_experts)]
    if len(logits):
        indices = numerics.chosen_experts(logits, chosen)
        weights = numerics.gate_weights(logits, indices, multiplier, shift, over_chosen=over_chosen)
        for token, (experts, gates) in enumerate(zip(indices.tolist(), weights.tolist())):
            for expert, gate in zip(experts, gates):
                queues[expert].append((token, gate))
    return queues


async def read_queues(ctx, dut, sizes):
    """All queues, by the rules of `QueuePort`, with an index in every cycle."""
    port, queues = dut.queue, []
    for expert in range(sizes.max_experts):
        ctx.set(port.expert, expert)
        await ctx.tick().repeat(2)
        length, entries = ctx.get(port.length), []
        for index in range(length + READ_LATENCY):
            ctx.set(port.index.payload, {"expert": expert, "index": min(index, sizes.max_rows - 1)})
            ctx.set(port.index.valid, index < length)
            assert ctx.get(port.entry.valid) == (index >= READ_LATENCY)
            if index >= READ_LATENCY:
                entry = ctx.get(port.entry.payload)
                entries.append((entry.token, entry.weight))
            await ctx.tick()
        assert ctx.get(dut.empty) >> expert & 1 == (not entries)
        queues.append(entries)
    return queues


def route(sizes, inferences, pauses=0.0, check_queues=True, append=False):
    """Runs `(logits, chosen, over_chosen, (multiplier, shift))` one after another and compares the
    queues of each; returns the cycles that each took from its setup to `done`. With `append` the
    queues grow from one to the next, whose tokens have other numbers."""
    dut = Router(sizes)
    draw = random.Random(8)
    cycles = []
    turn = {"setup": 0, "sent": 0}

    async def feeder(ctx):
        for number, (logits, *_) in enumerate(inferences):
            while turn["setup"] <= number:
                await ctx.tick()
            for word in words(sizes, logits):
                while draw.random() < pauses:
                    await ctx.tick()
                ctx.set(dut.logits.payload, word)
                ctx.set(dut.logits.valid, 1)
                await ctx.tick().until(dut.logits.ready)
                ctx.set(dut.logits.valid, 0)

    async def controller(ctx):
        assert ctx.get(dut.empty) == (1 << sizes.max_experts) - 1
        before = [[]] * sizes.max_experts
        for number, (logits, chosen, over_chosen, (multiplier, shift)) in enumerate(inferences):
            token = 100 * number * append
            ctx.set(dut.setup.payload, {
                "rows": len(logits), "append": append and number > 0, "token": token,
                "experts": logits.shape[1], "chosen": chosen,
                "over_chosen": over_chosen, "multiplier": multiplier, "shift": shift})
            ctx.set(dut.setup.valid, 1)
            await ctx.tick().until(dut.setup.ready)
            ctx.set(dut.setup.valid, 0)
            turn["setup"] += 1
            spent = 1
            while not ctx.get(dut.done):
                await ctx.tick()
                spent += 1
            cycles.append(spent)
            if check_queues:
                expected = expected_queues(sizes, logits, chosen, over_chosen, multiplier, shift)
                expected = [old + [(token + row, weight) for row, weight in new]
                            for old, new in zip(before, expected)]
                assert await read_queues(ctx, dut, sizes) == expected
                before = expected if append else before
            else:
                await ctx.tick()
            assert not ctx.get(dut.done)

    simulate(dut, feeder, controller)
    return cycles


SHAPES = [
    ({"tokens": 1, "outputs": 1, "lanes": 1}, 16, 2),
    ({}, 16, 2),
    ({}, 13, 2),
    ({"tokens": 3, "lanes": 4, "outputs": 8, "max_experts": 6}, 6, 2),
    ({"tokens": 5, "lanes": 3, "outputs": 6, "depth": 6, "max_experts": 20, "max_chosen": 4},
     20, 4),
    ({"tokens": 4, "lanes": 8, "outputs": 8, "max_experts": 5, "max_chosen": 5}, 5, 5),
]


@pytest.mark.parametrize("shape, experts, chosen", SHAPES)
@pytest.mark.parametrize("over_chosen", [0, 1])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_matches_numerics(shape, experts, chosen, over_chosen, pauses):
    sizes = config(**shape)
    route(sizes, [(random_logits(7, experts, seed=1), chosen, over_chosen, LOUD),
                  (random_logits(6, experts, seed=2), chosen, 1 - over_chosen, LOUD)], pauses)


@pytest.mark.parametrize("over_chosen", [0, 1])
def test_all_tokens_on_one_expert(over_chosen):
    sizes = config()
    logits = random_logits(sizes.max_rows, 16, seed=3)
    logits[:, 11] = 1 << 21
    route(sizes, [(logits, 1, over_chosen, LOUD)])


def test_ties_go_to_the_lower_expert():
    sizes = config(max_chosen=4)
    logits = np.random.default_rng(4).integers(-2, 2, (20, 16))
    logits[5], logits[6] = 0, np.arange(16) // 4
    route(sizes, [(logits, 3, 0, FLAT), (logits, 4, 1, (65535, 8))])


def test_a_second_inference_sees_nothing_of_the_first():
    sizes = config()
    low, high = random_logits(5, 16, seed=5), random_logits(3, 16, seed=6)
    low[:, 8:] -= 1 << 22
    high[:, :8] -= 1 << 22
    none = np.zeros((0, 16), np.int64)
    route(sizes, [(low, 2, 0, LOUD), (high, 2, 0, LOUD), (none, 2, 1, LOUD), (low, 1, 1, LOUD)])


def test_queues_grow():
    sizes = config()
    route(sizes, [(random_logits(rows, 16, seed=rows), 2, 1, LOUD) for rows in (5, 1, 0, 8)],
          append=True)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_few_experts(experts):
    sizes = config(max_chosen=3)
    logits = random_logits(5, experts, seed=7)
    route(sizes, [(logits, experts, over_chosen, LOUD) for over_chosen in (0, 1)]
          + [(logits, 1, over_chosen, LOUD) for over_chosen in (0, 1)])


def test_single_expert_machine():
    sizes = config(max_experts=1, max_chosen=1)
    route(sizes, [(random_logits(3, 1, seed=8), 1, 0, LOUD),
                  (random_logits(2, 1, seed=9), 1, 1, LOUD)])


def test_a_lone_weight_is_one():
    sizes = config()
    logits = random_logits(2, 16, seed=10)
    queues = expected_queues(sizes, logits, 1, 1, *LOUD)
    assert {weight for queue in queues for _, weight in queue} == {65535}
    logits[:] = -(1 << 20)
    logits[:, 0] = 1 << 20
    route(sizes, [(logits, 1, 1, (65535, 1)), (logits, 2, 0, (65535, 1))])


def test_extreme_logits():
    sizes = config(max_chosen=4)
    draw = np.random.default_rng(11)
    logits = draw.choice([-(1 << 31), (1 << 31) - 1, 0, -1, 1], (9, 16))
    logits[0] = [(1 << 31) - 1] + [-(1 << 31)] * 15
    logits[1] = -(1 << 31)
    route(sizes, [(logits, 4, 0, (65535, 47)), (logits, 4, 1, (65535, 36)), (logits, 4, 0, (1, 20)),
                  (logits, 3, 1, (65535, 1))])


@pytest.mark.parametrize("experts, chosen, over_chosen", [(16, 2, 1), (16, 2, 0), (32, 4, 0),
                                                           (4, 2, 0), (4, 4, 1), (32, 4, 1)])
def test_rate(experts, chosen, over_chosen):
    sizes = config(max_experts=32, max_chosen=4, lanes=4)
    lone, many = route(
        sizes, [(random_logits(rows, experts, seed=12), chosen, over_chosen, LOUD)
                for rows in (1, 21)], check_queues=False)
    fed = 1 + experts // sizes.lanes  # cycles to send a row, after its setup
    scanned = chosen if over_chosen else experts + chosen
    assert lone == fed + experts + scanned + chosen + Router.LATENCY
    # The first rows come a token group at a time.
    assert many <= (lone + fed * (sizes.tokens - 1)
                    + 20 * max(experts, scanned, Router.ROW_INTERVAL))
