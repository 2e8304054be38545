"""Each instruction of the golden device against plain Python arithmetic, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest

from moeware.hw.arch import layout, numerics
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory, NormMode, Opcode, Target
from moeware.sim.golden import GoldenDevice, GoldenError, Machine

from ..compiler.lowering import program, transformer
from ..runtime.reference import evaluate
from .golden_machine import CONFIG, LINEAR, ROUTE, D, execute, exponential, scaled

ATTENTION = {"rows": 4, "keys": 6, "words": 2, "query": 0, "key": 20, "value": 40, "stride": 3,
             "destination": 90, "destination_stride": 2, "multiplier": 40000, "shift": 24,
             "out_multiplier": 50000, "out_shift": 16}


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shift", [20, 24])
def test_attention(machine, causal, shift):
    def row(first, number):
        return [int(machine.activation[first + 3 * number + i // D, i % D]) for i in range(2 * D)]

    expected = []
    for r in range(4):
        seen = range(6) if not causal else range(r + 6 - 4 + 1)
        score = [sum(a * b for a, b in zip(row(0, r), row(20, k))) for k in seen]
        weight = [(exponential(max(score) - s, 40000, shift) + 32) >> 6 for s in score]
        total = sum(weight)
        bits = total.bit_length()
        inverse = min((1 << (bits + 15)) // total, 65535)
        scale = {"multiplier": (inverse * 50000 + (1 << 15)) >> 16, "shift": 16 + bits - 1}
        expected.append([scaled(sum(w * row(40, k)[i] for w, k in zip(weight, seen)), scale)
                         for i in range(2 * D)])
    execute(machine, (Opcode.ATTENTION, ATTENTION | {"causal": causal, "shift": shift}))
    assert machine.activation[90:98].reshape(4, 2 * D).tolist() == expected


NORM = {"rows": 3, "channels": 6, "source": 5, "source_stride": 8, "destination": 100,
        "destination_stride": 3, "param": 3, "epsilon": 1000}


@pytest.mark.parametrize("mode", NormMode)
def test_norm(machine, mode):
    for index in range(6):
        machine.param[3 + index, 0]["shift"] = 18 if mode == NormMode.SCALE else 14
    before = machine.activation.copy()
    execute(machine, (Opcode.NORM, NORM | {"mode": mode}))
    for r in range(3):
        row = [int(machine.residual[5 + 8 * r + i, 0]) for i in range(6)]
        value = row
        if mode != NormMode.SCALE:
            total = sum(row) if mode == NormMode.LAYER else 0
            variance = 6 * sum(x * x for x in row) - total * total + 1000
            h = next(h for h in range(40) if variance < 1 << 2 * h)
            root = math.isqrt(variance << 32 - 2 * h if h <= 16 else variance >> 2 * h - 32)
            inverse = (1 << 32) // root
            value = [max(-32768, min(32767, ((6 * x - total) * inverse + (1 << h + 5)) >> h + 6))
                     for x in row]
        for i in range(8):  # the word is filled up with zeros
            expected = scaled(value[i] + int(machine.param[3 + i, 0]["bias"]),
                              machine.param[3 + i, 0]) if i < 6 else 0
            assert machine.activation[100 + 3 * r + i // D, i % D] == expected
        before[100 + 3 * r:][:2] = machine.activation[100 + 3 * r:][:2]
    assert np.array_equal(machine.activation, before)


def test_norm_of_equal_channels_is_the_bias(machine):
    machine.residual[5:29] = 700
    execute(machine, (Opcode.NORM, NORM | {"mode": NormMode.LAYER, "epsilon": 0}))
    for i in range(6):
        expected = scaled(int(machine.param[3 + i, 0]["bias"]), machine.param[3 + i, 0])
        assert {int(machine.activation[100 + 3 * r + i // D, i % D]) for r in range(3)} == {expected}


def test_norm_of_rows_that_no_product_takes(machine):
    wide = NORM | {"rows": 1, "channels": 17}
    execute(machine, (Opcode.NORM, wide | {"mode": NormMode.SCALE}))
    for mode in (NormMode.LAYER, NormMode.RMS):
        with pytest.raises(GoldenError, match=r"NORM.channels .* Config.depth = 16, not 17"):
            execute(machine, (Opcode.NORM, wide | {"mode": mode}))


ROTARY = dataclasses.replace(CONFIG, outputs=4, lanes=2, rotary=1)
TURN = NORM | {"channels": 10, "counted": 7, "factors": 60, "factor_stride": 3, "factor_words": 2}


@pytest.mark.parametrize("mode", NormMode)
def test_norm_turns_pairs_and_counts_channels(mode):
    machine, draw = Machine(ROTARY, np.zeros(1 << 14, np.uint8)), np.random.default_rng(4)
    machine.residual[:] = draw.integers(-20000, 20000, machine.residual.shape)
    machine.param["bias"] = draw.integers(-900, 900, machine.param.shape)
    machine.param["multiplier"] = draw.integers(20000, 65536, machine.param.shape)
    machine.param["shift"] = 16 if mode == NormMode.SCALE else 12
    execute(machine, (Opcode.NORM, TURN | {"mode": mode}))
    for r in range(3):
        value = machine.residual[5 + 8 * r:][:5].ravel().astype(np.int64)
        if mode != NormMode.SCALE:
            value = numerics.normalise(value, 7, 1000, centred=mode == NormMode.LAYER)
        wide = [scaled(int(x) + int(p["bias"]), p, 16)
                for x, p in zip(value, machine.param[3:8].ravel())]
        expected = []
        for pair in range(5):  # two pairs, and their factors again
            cos, sin = machine.residual[60 + 3 * r + pair % 2].tolist()
            a, b = wide[2 * pair:2 * pair + 2]
            expected += [max(-128, min(127, x + (1 << 19) >> 20))
                         for x in (a * cos - b * sin, b * cos + a * sin)]
        assert machine.activation[100 + 3 * r:][:3].ravel().tolist() == [*expected, 0, 0]


def test_turning_needs_gateware_and_pairs(machine):
    for field in ("counted", "factor_words"):
        with pytest.raises(GoldenError, match="must be 0 where Config.rotary is 0"):
            execute(machine, (Opcode.NORM, NORM | {field: 2}))
    with pytest.raises(GoldenError, match="NORM.channels must be even .*, not 9"):
        execute(Machine(ROTARY, np.zeros(1 << 14, np.uint8)), (Opcode.NORM, TURN | {"channels": 9}))
    with pytest.raises(GoldenError, match="residual word 128 must be below 128"):
        execute(Machine(ROTARY, np.zeros(1 << 14, np.uint8)), (Opcode.NORM, TURN | {"factors": 121}))


@pytest.mark.parametrize(("memory", "word_bytes"), [
    (Memory.ACTIVATION, 4), (Memory.RESIDUAL, 2), (Memory.WEIGHT, 12), (Memory.PARAM, 8),
    (Memory.TABLE, 1)])
def test_load_places_words_as_the_layout_says(machine, memory, word_bytes, draw):
    machine.dram[:256] = list(draw.randbytes(256))
    execute(machine, (Opcode.LOAD, {"memory": memory, "local": 9, "words": 5, "address": 64}))
    array = {Memory.ACTIVATION: machine.activation, Memory.RESIDUAL: machine.residual,
             Memory.WEIGHT: machine.weight, Memory.PARAM: machine.param,
             Memory.TABLE: machine.table}[memory]
    for word in range(5):
        per_beat = max(1, 8 // word_bytes)
        place = (64 + 8 * (word // per_beat) + word % per_beat * word_bytes if word_bytes <= 8
                 else 64 + 16 * word)  # 12 bytes take two bus words
        assert array[9 + word].tobytes() == machine.dram[place:place + word_bytes].tobytes()


@pytest.mark.parametrize(("packed", "bits"), [(1, 4), (2, 2)])
def test_load_expands_packed_weights(machine, packed, bits, draw):
    machine.dram[:256] = list(draw.randbytes(256))
    execute(machine, (Opcode.LOAD, {"memory": Memory.WEIGHT, "local": 9, "words": 5, "address": 64,
                                    "packed": packed}))
    for place in range(5 * 16):  # bytes of the words, of which 12 are used in two bus words
        word, byte = divmod(place, 16)
        beat, column = divmod(place, 8)
        field = int(machine.dram[64 + 8 * (beat // 2 ** packed) + column]) >> beat % 2 ** packed * bits
        field &= (1 << bits) - 1
        if byte < 12:
            assert machine.weight[9 + word].ravel()[byte] == field - (field >> bits - 1 << bits)


@pytest.mark.parametrize("memory", [Memory.ACTIVATION, Memory.RESIDUAL])
def test_store_is_the_inverse_of_load(machine, memory):
    array = machine.activation if memory is Memory.ACTIVATION else machine.residual
    kept = array[20:27].copy()
    at = {"memory": memory, "words": 7, "address": 128}
    execute(machine, (Opcode.STORE, at | {"local": 20}), (Opcode.LOAD, at | {"local": 40}))
    assert np.array_equal(array[40:47], kept)
    assert machine.dram[128:].tobytes().startswith(layout.pack(
        CONFIG, memory, kept.view(np.uint8).reshape(7, -1)))


def test_instructions_without_rows_or_words_do_nothing(machine):
    before = [array.copy() for array in (machine.activation, machine.residual, machine.dram[:512])]
    execute(machine, (Opcode.LINEAR, LINEAR | {"rows": 0}), (Opcode.ATTENTION, ATTENTION | {"rows": 0}),
            (Opcode.NORM, NORM | {"rows": 0}),
            (Opcode.LOAD, {"memory": Memory.ACTIVATION, "local": 1 << 19}),
            (Opcode.STORE, {"memory": Memory.RESIDUAL, "address": 64}))
    after = [machine.activation, machine.residual, machine.dram[:512]]
    assert all(map(np.array_equal, before, after))


def test_a_run_starts_without_queues(machine):
    execute(machine, (Opcode.LINEAR, ROUTE))
    before = machine.residual.copy()
    execute(machine, (Opcode.LINEAR, LINEAR | {"queued": 1, "expert": 0, "target": Target.RESIDUAL}))
    assert np.array_equal(machine.residual, before)


def bit(*engines):
    return sum(1 << engine for engine in engines)


def test_tokens_are_counted(machine):
    nothing = {"rows": 0}
    execute(machine, (Opcode.NORM, nothing | {"signal": bit(Engine.LINEAR, Engine.STORE)}),
            (Opcode.LINEAR, nothing | {"wait": bit(Engine.NORM)}),
            (Opcode.STORE, {"wait": bit(Engine.NORM)}))
    assert not machine.tokens.any()


@pytest.mark.parametrize(("instructions", "message"), [
    ([(Opcode.LINEAR, {"wait": bit(Engine.NORM)})], "LINEAR waits for a token that only a"),
    ([(Opcode.NORM, {"signal": bit(Engine.LOAD)})] * 256, "at most 255 tokens may wait from NORM to LOAD"),
    ([(Opcode.LOAD, {"memory": Memory.WEIGHT, "local": 60, "words": 5})],
     "words 60 to 64 must lie in a memory of 64 words"),
    ([(Opcode.LOAD, {"memory": 6, "words": 1})], "6 is not a valid Memory"),
    ([(Opcode.LOAD, {"memory": Memory.PARAM, "words": 1, "packed": 1})],
     "LOAD.packed must be 0, 1 or 2 for WEIGHT and 0 for other memories, not 1 for PARAM"),
    ([(Opcode.LOAD, {"memory": Memory.WEIGHT, "words": 1, "packed": 3})], "not 3 for WEIGHT"),
    ([(Opcode.LINEAR, LINEAR | {"source": 120})], "activation word 133 must be below 128"),
    ([(Opcode.LINEAR, LINEAR | {"source_words": 5})], "LINEAR.source_words must be at most 4, not 5"),
    ([(Opcode.LINEAR, LINEAR | {"weight": 60})], "words 60 to 65 must lie in a memory of 64 words"),
    ([(Opcode.LINEAR, LINEAR | {"param": 26})], "words 26 to 32 must lie in a memory of 32 words"),
    ([(Opcode.LINEAR, LINEAR | {"narrow": 1})], "LINEAR.narrow must be 0 on this configuration"),
    ([(Opcode.LINEAR, LINEAR | {"product": 1})], "must fill an even number of words with product, "
                                                 "not be 7 with Config.lanes = 1"),
    ([(Opcode.LINEAR, LINEAR | {"destination": 120})], "word 129 must be below 128"),
    ([(Opcode.ATTENTION, ATTENTION | {"keys": 13})], "ATTENTION.keys must be at most 12, not 13"),
    ([(Opcode.NORM, NORM | {"source": 120})], "residual word 141 must be below 128"),
    ([(Opcode.NORM, NORM | {"destination": 125})], "word 132 must be below 128")])
def test_what_no_accelerator_could_execute(machine, instructions, message):
    with pytest.raises(GoldenError, match=message) as error:
        execute(machine, *instructions)
    assert f"instruction {len(instructions) - 1} at {0x1000 + 32 * (len(instructions) - 1):#x}" in str(
        error.value)


def test_an_illegal_instruction_is_named(machine):
    machine.dram[0x800:0x820] = 255
    with pytest.raises(GoldenError, match="instruction 0 at 0x800: .*zeros after its last field"):
        machine.run(0x800)


@pytest.mark.parametrize("seed", range(4))
def test_programs_compute_their_quantised_graph(seed):
    """Several frames back to back, also of a second program on the same device."""
    sizes = {"tokens": 4 + seed, "depth": 7, "width": 4, "heads": 2, "hidden": 9, "experts": 4,
             "chosen": 1 + seed % 2, "causal": bool(seed % 2)}
    graph = transformer(seed, **sizes)
    inputs = graph.integers(3)
    expected = evaluate(graph.operations, inputs)
    config = Config(**CONFIG.to_dict() | {"weight_words": 128, "param_words": 64, "row_words": 8,
                                          "activation_words": 256, "residual_words": 512})
    made, device = program(graph, config), GoldenDevice()
    progress = []
    for _ in range(2):
        results = device.run(made, made.steps[0], inputs, probes=True,
                             progress=lambda *frames: progress.append(frames))
        assert {probe.tensor for probe in made.steps[0].probes} <= set(results)
        for tensor, values in results.items():
            assert np.array_equal(values, expected[tensor]), tensor
    assert progress == [(1, 3), (2, 3), (3, 3)] * 2
    assert len({counters["instructions"] for counters in device.counters}) == 1
