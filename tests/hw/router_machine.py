"""A bench around the router, and what its queues must hold."""

import random

import numpy as np

from moeware.hw.arch import routing
from moeware.hw.arch.config import Config
from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.router import Router

from .simulate import simulate

__all__ = ["FLAT", "LOUD", "config", "expected_queues", "random_logits", "route"]

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


def expected_queues(sizes, logits, chosen, over_chosen, multiplier, shift, corrections=None, *,
                    taken=None, capacity=0, choice=0, same_frame=0, **form):
    """taken : tokens of the frame that each queue took, which this changes."""
    queues, taken = [[] for _ in range(sizes.max_experts)], [] if taken is None else taken
    if not (same_frame and taken):
        taken[:] = [0] * sizes.max_experts
    if len(logits):
        indices, weights = routing.route(
            logits, corrections, chosen=chosen, over_chosen=over_chosen, multiplier=multiplier,
            shift=shift, by_score=corrections is not None, **form)
        for token, (experts, gates) in enumerate(zip(indices.tolist(), weights.tolist())):
            for number, (expert, gate) in enumerate(zip(experts, gates), 1):
                if choice in (0, number) and (not capacity or taken[expert] < capacity):
                    queues[expert].append((token, gate))
                    taken[expert] += capacity > 0
    return queues


async def send_corrections(ctx, dut, sizes, experts, corrections):
    """As the linear unit does, a word in every cycle, with anything past the last expert or where
    there are none."""
    draw = np.random.default_rng(10)
    for channel in range(0, experts, sizes.lanes):
        word = draw.integers(0, 1 << routing.CORRECTION_BITS, sizes.lanes)
        if corrections is not None:
            part = corrections[channel:channel + sizes.lanes]
            word[:len(part)] = part
        ctx.set(dut.corrections.payload, {"channel": channel, "values": word.tolist()})
        ctx.set(dut.corrections.valid, 1)
        await ctx.tick()
    ctx.set(dut.corrections.valid, 0)


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
    """Runs `(logits, chosen, over_chosen, (multiplier, shift), form)` one after another and compares
    the queues of each; returns the cycles that each took from its setup to `done`. With `append` the
    queues grow from one to the next, whose tokens have other numbers.

    form : may be left out; `sigmoid` and all fields behind it of LINEAR, and the `corrections`
    [experts] where experts are chosen by score."""
    dut = Router(sizes)
    draw = random.Random(8)
    cycles = []
    turn = {"setup": 0, "sent": 0}

    async def feeder(ctx):
        for number, (logits, _, _, _, *form) in enumerate(inferences):
            while turn["setup"] <= number:
                await ctx.tick()
            if sizes.router_forms:
                await send_corrections(ctx, dut, sizes, logits.shape[1],
                                       form[0].get("corrections") if form else None)
            for word in words(sizes, logits):
                while draw.random() < pauses:
                    await ctx.tick()
                ctx.set(dut.logits.payload, word)
                ctx.set(dut.logits.valid, 1)
                await ctx.tick().until(dut.logits.ready)
                ctx.set(dut.logits.valid, 0)

    async def controller(ctx):
        assert ctx.get(dut.empty) == (1 << sizes.max_experts) - 1
        before, taken = [[]] * sizes.max_experts, []
        for number, (logits, chosen, over_chosen, (multiplier, shift), *rest) in enumerate(inferences):
            form = dict(rest[0]) if rest else {}
            by_score = form.pop("corrections", None) is not None
            token = 100 * number * append
            ctx.set(dut.setup.payload, {
                "rows": len(logits), "append": append and number > 0, "token": token,
                "experts": logits.shape[1], "chosen": chosen,
                "over_chosen": over_chosen, "multiplier": multiplier, "shift": shift,
                "by_score": by_score, **form})
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
                expected = expected_queues(sizes, logits, chosen, over_chosen, multiplier, shift,
                                           taken=taken, **(rest[0] if rest else {}))
                expected = [old + [(token + row, weight) for row, weight in new]
                            for old, new in zip(before, expected)]
                assert await read_queues(ctx, dut, sizes) == expected
                before = expected if append else before
            else:
                await ctx.tick()
            assert not ctx.get(dut.done)

    simulate(dut, feeder, controller, deadline=10_000 + 2_000 * len(inferences))
    return cycles
