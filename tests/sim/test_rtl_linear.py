"""LINEARs of every kind, one close upon the other, on gateware and golden device: as many at work
at once as their tokens allow."""

import random

import numpy as np
import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory, Opcode, Target
from moeware.hw.arch.registers import Control, Register, Status
from moeware.sim.dram import IDEAL
from moeware.sim.golden import Machine
from moeware.sim.rtl import RtlTarget, build

from ..hw.test_accelerator import Assembly, bit

ROWS, COUNT, DRAM = 8, 250, 1 << 17
SHAPES = {
    "narrow": {"tokens": 2, "outputs": 4, "depth": 12, "lanes": 2, "narrow": 1},
    "wide": {"tokens": 4, "outputs": 4, "depth": 8, "lanes": 4},
    "router forms": {"tokens": 3, "outputs": 6, "depth": 4, "lanes": 2, "router_forms": 1},
    "products": {"tokens": 3, "outputs": 6, "depth": 8, "lanes": 2, "narrow": 1, "products": 1},
}


def shaped(name):
    return Config(**{
        "queries": 1, "bus_bytes": 8, "activation_banks": 2, "activation_words": 128,
        "residual_words": 256, "weight_words": 64, "param_words": 32, "tables": 1, "row_words": 4,
        "max_rows": ROWS, "max_experts": 4, "max_chosen": 2, "queue": 4} | SHAPES[name])


def drawn(config, draw):
    """Fields of a LINEAR, and the words that it reads and writes; "queues" stands for them all."""
    if draw.random() < 0.08:
        words, experts, form = draw.randint(1, 4), draw.randint(2, 4), {}
        if config.router_forms:
            form = draw.choice(({}, {"sigmoid": 1, "shift": 14},
                                {"sigmoid": 1, "by_score": 1, "shift": 14},
                                {"group": 2, "chosen_groups": 1},
                                {"sparse": 1, "threshold": 9_000, "over_chosen": 0}, {
                                    "sigmoid": 1, "by_score": 1, "group": 2, "chosen_groups": 1,
                                    "pair": 1, "shift": 14}))
            experts += experts % 2
        return {"target": Target.ROUTER, "rows": ROWS, "source": 0, "source_stride": 4,
                "source_words": words, "channels": experts, "weight": draw.randrange(16),
                "chosen": 2, "over_chosen": draw.randint(0, 1), "multiplier": 40_000, "shift": 20,
                } | form, {("activation", word) for word in range(32)}, {"queues"}
    target = draw.choice((Target.ACTIVATION, Target.RESIDUAL))
    memory, width = (("activation", config.depth) if target == Target.ACTIVATION
                     else ("residual", config.lanes))
    channels, words = draw.randint(1, 3 * config.outputs), draw.randint(1, 4)
    product = config.products * (target == Target.ACTIVATION) * draw.randint(0, 1)
    if product:  # an even number of words
        channels += config.lanes * (-(-channels // config.lanes) % 2)
    stride = -(-channels // width)
    queued = draw.random() < 0.4
    fields = {"target": target, "rows": draw.randint(0, ROWS), "queued": queued,
              "expert": draw.randrange(4) * queued, "source_words": words, "source_stride": 4,
              "source": draw.choice((0, 40, 80, 120)), "channels": channels,
              "weight": draw.randrange(16), "param": draw.randrange(8),
              "destination": draw.choice((40, 80, 120, 160) if memory == "activation"
                                         else (0, 60, 120)), "destination_stride": stride,
              **{name: draw.randint(0, 1) for name in ("tabled", "accumulate", "gather", "scatter",
                                                       "gated")},
              "narrow": draw.randint(0, 1) * config.narrow, "product": product}
    reads = {("activation", fields["source"] + 4 * row + word)
             for row in range(ROWS) for word in range(words)}
    writes = {(memory, fields["destination"] + word) for word in range(ROWS * stride)}
    return fields, reads | ({"queues"} if queued else set()), writes


def program(config, seed):
    """An assembly: loads, the LINEARs with the tokens that they need of each other, stores."""
    draw, assembly = random.Random(seed), Assembly(config, seed, entry=1 << 16)
    nibbles = assembly.random.integers(-7, 8, (2, 64, config.outputs * config.depth))
    assembly.load(Memory.WEIGHT, 0, (nibbles[1] * 16 + (nibbles[0] & 15)).astype(np.uint8))
    assembly.load(Memory.PARAM, 0, assembly.params(32 * config.lanes))
    assembly.load(Memory.TABLE, 0, words=256)
    assembly.load(Memory.ACTIVATION, 0, words=256)
    assembly.load(Memory.RESIDUAL, 0, words=256, signal=bit(Engine.LINEAR))
    work = [drawn(config, draw) for _ in range(COUNT)]
    waits, signals, known = [0] * COUNT, [0] * COUNT, -1
    waits[0] = bit(Engine.LOAD)
    signals[-1] = bit(Engine.STORE)
    for number, (_, reads, writes) in enumerate(work):
        needed = max((before for before in range(number)
                      if work[before][2] & (reads | writes) or work[before][1] & writes),
                     default=-1)
        if needed > known:
            known = needed
            waits[number] |= bit(Engine.LINEAR)
            signals[needed] |= bit(Engine.LINEAR)
    for (fields, _, _), wait, signal in zip(work, waits, signals):
        assembly.add(Opcode.LINEAR, **fields, wait=wait, signal=signal)
    assembly.store(Memory.ACTIVATION, 0, 256, wait=bit(Engine.LINEAR))
    assembly.store(Memory.RESIDUAL, 0, 256)
    return assembly


@pytest.mark.parametrize("name", SHAPES)
def test_linears_close_upon_each_other(name):
    config = shaped(name)
    target = RtlTarget(build(config, fast=False), bus_bytes=config.bus_bytes, dram=IDEAL)
    target.reserve(DRAM)
    for seed in range(3):
        assembly = program(config, seed)
        for address, data in assembly.image().items():
            target.write_memory(address, data)
        expected = np.frombuffer(target.read_memory(0, DRAM), np.uint8).copy()
        Machine(config, expected).run(assembly.entry)
        target.write_register(Register.PROGRAM, assembly.entry)
        target.write_register(Register.CONTROL, Control.START)
        target.wait_done(60)
        assert target.read_register(Register.STATUS) == Status.DONE
        assert target.read_memory(0, DRAM) == expected.tobytes()
