"""Lowered programs do what the quantised graph says: on every configuration, in every legal order."""

import dataclasses

import numpy as np
import pytest

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Lowered
from moeware.compiler.tile import PLANS
from moeware.compiler.verify import verify_addresses
from moeware.hw.arch import isa
from moeware.hw.arch.isa import Engine, Memory, NormMode, Opcode
from moeware.hw.arch.quantised import Linear
from moeware.hw.arch.work import works
from moeware.sim.golden import GoldenDevice, Machine

from ..hw.arch import configs
from ..hw.arch.configs import config
from ..runtime.reference import Graph, evaluate
from .lowering import lower, program, transformer

CONFIGS = [dataclasses.replace(each, products=1) for each in configs.CONFIGS]
SIZES = {
    "odd": dict(tokens=7, depth=5, width=3, heads=4, hidden=9, experts=5, chosen=2),
    "one": dict(tokens=1, depth=1, width=1, heads=1, hidden=1, experts=1, chosen=1),
    "wide": dict(tokens=16, depth=24, width=16, heads=3, hidden=70, experts=16, chosen=4,
                 causal=True, mode=NormMode.RMS),
    "loud": dict(tokens=5, depth=6, width=5, heads=2, hidden=8, experts=3, chosen=3, gain=6.0),
    "of 4 bits": dict(tokens=7, depth=5, width=3, heads=4, hidden=9, experts=5, chosen=2, bits=4),
    "ternary": dict(tokens=6, depth=7, width=6, heads=2, hidden=21, experts=4, chosen=1, bits=2),
    "gated": dict(tokens=7, depth=5, width=3, heads=4, hidden=9, experts=5, chosen=2, gated=True),
    "gated, wide": dict(tokens=16, depth=24, width=16, heads=3, hidden=70, experts=16, chosen=4,
                        gated=True, gain=3.0),
    "gated, one": dict(tokens=1, depth=1, width=1, heads=1, hidden=1, experts=1, chosen=1,
                       gated=True),
    "gated, of 4 bits": dict(tokens=7, depth=9, width=3, heads=4, hidden=33, experts=5, chosen=2,
                             bits=4, gated=True),
}


def check_golden(graph, compiled, frames: int) -> None:
    """The golden device computes, tensor by tensor, what the operations of ``graph`` say."""
    inputs = graph.integers(frames)
    found = GoldenDevice().run(compiled, compiled.steps[0], inputs, probes=True)
    expected = evaluate(graph.operations, inputs)
    assert found
    for tensor, values in found.items():
        np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.linear_macs}macs-{c.digest:08x}")
def test_golden_device_computes_the_quantised_graph(config, size):
    graph = transformer(3, **SIZES[size])
    compiled = program(graph, config)
    inputs = graph.integers(3)
    found = GoldenDevice().run(compiled, compiled.steps[0], inputs, probes=True)
    expected = evaluate(graph.operations, inputs)
    probed = {probe.tensor for probe in compiled.steps[0].probes}
    assert probed == {op.output for op in graph.operations} - {
        op.output for op in graph.operations if type(op).__name__ == "Route"}
    for op in graph.operations:
        if op.output in probed:
            np.testing.assert_array_equal(found[op.output], expected[op.output], err_msg=op.output)


@pytest.mark.parametrize("form", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
def test_router_forms_on_the_golden_device(config, form):
    config = dataclasses.replace(config, router_forms=1)
    graph = transformer(form, **SIZES["odd"] | {"experts": 8, "chosen": 3}, form=form)
    compiled = program(graph, config)
    check_golden(graph, compiled, frames=3)


@pytest.mark.parametrize("form", [2, 6])
def test_a_router_without_gateware_is_refused(form):
    graph = transformer(2, **SIZES["odd"] | {"experts": 8}, form=form)
    with pytest.raises(CompileError, match="more than Config.router_forms = 0"):
        program(graph, CONFIGS[0])


def weight_loads(config, bits: int):
    """Work of the loads of a program's weights: those of the gate, the others."""
    graph = transformer(3, **SIZES["wide"], bits=bits)
    gate = next(op.name for op in graph.operations if type(op).__name__ == "Route")
    compiled = program(graph, config, trace=False)
    loads = [work for work in works(compiled, compiled.steps[0])
             if work.engine is Engine.LOAD and work.instruction.memory == Memory.WEIGHT]
    return [[work for work in loads if (work.layer == gate) == which] for which in (True, False)]


@pytest.mark.parametrize("bits, packed", [(4, 1), (2, 2)])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
def test_weights_of_few_bits_take_a_share_of_the_bus(config, bits, packed):
    (gate, others), (same, whole) = weight_loads(config, bits), weight_loads(config, 8)
    assert {work.instruction.packed for work in others} == {packed}
    assert not any(work.instruction.packed for work in gate + same + whole)
    assert [work.beats for work in gate] == [work.beats for work in same]
    assert [work.instruction.words for work in others] == [work.instruction.words for work in whole]
    assert [work.beats for work in others] == [-(-work.beats // 2 ** packed) for work in whole]
    sums = [sum(work.beats for work in loads) for loads in (others, whole)]
    assert 1 / 2 ** packed <= sums[0] / sums[1] < 1.02 / 2 ** packed


@pytest.mark.parametrize("bits", [4, 2])
def test_narrow_weights_share_their_bytes_on_chip_too(bits):
    narrow = dataclasses.replace(CONFIGS[0], narrow=1)
    _, others = weight_loads(narrow, bits)
    assert not any(work.instruction.packed for work in others)
    whole = weight_loads(narrow, 8)[1]
    assert sum(work.instruction.words for work in others) < 0.6 * sum(
        work.instruction.words for work in whole)


@pytest.mark.parametrize("size", ["odd", "of 4 bits", "gated", "gated, of 4 bits", "gated, wide"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.linear_macs}macs-{c.digest:08x}")
def test_narrow_arrays_compute_the_same(config, size):
    graph, narrow = transformer(3, **SIZES[size]), dataclasses.replace(config, narrow=1)
    check_golden(graph, program(graph, narrow), frames=2)


def test_words_of_gate_and_factor_take_turns():
    graph = transformer(3, **SIZES["gated"])
    lowered = lower(graph, CONFIGS[0])
    products = [instr for instr in lowered.instructions if instr.fields.get("product")]
    assert {"/" + instr.layer.split("/")[1] for instr in products} == {
        op.name for op in graph.operations if getattr(op, "gate", None) is not None}
    hidden, depth, lanes = SIZES["gated"]["hidden"], CONFIGS[0].depth, CONFIGS[0].lanes
    words = -(-hidden // depth)
    dense = next(op for op in graph.operations if isinstance(op, Linear) and op.gate is not None)
    dense, = [instr for instr in products if instr.layer == dense.name]
    assert (dense.fields["channels"], dense.writes[0].words) == (2 * words * depth, words)
    assert dense.fields["channels"] % (2 * lanes) == 0


@pytest.mark.parametrize("size", ["wide", "gated, wide"])
def test_small_memories_cut_products_into_tiles(size):
    tight = config(2, 4, 8, 2, 2, 8, weight_words=24, param_words=24, activation_words=103,
                   residual_words=500, products=1)
    graph = transformer(5, **SIZES[size])
    compiled = program(graph, tight)
    names = {instr.layer for instr in lower(graph, tight).instructions}
    tiles = [i for i in Machine(tight, image(compiled)).decode(0) if i.opcode is Opcode.LINEAR]
    assert len(tiles) > 2 * len(names)
    inputs = graph.integers(2)
    found = GoldenDevice().run(compiled, compiled.steps[0], inputs)
    expected = evaluate(graph.operations, inputs)
    for port in compiled.steps[0].outputs:
        np.testing.assert_array_equal(found[port.tensor], expected[port.tensor])


@pytest.mark.parametrize("plan", PLANS[1:], ids=["lean", "halves", "quarters", "spill"])
@pytest.mark.parametrize("size", ["odd", "wide", "one", "gated", "gated, wide"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
def test_every_plan_gives_the_same(config, size, plan):
    graph = transformer(3, **SIZES[size])
    compiled = program(graph, config, plans=[plan], frames=2)
    check_golden(graph, compiled, frames=3)


def test_tensors_spill_where_memories_are_far_too_small():
    tight = config(2, 4, 8, 2, 2, 8, weight_words=24, param_words=24, activation_words=30,
                   residual_words=200)
    graph = transformer(5, **SIZES["wide"])
    with pytest.raises(CompileError, match="must fit in the activation memory"):
        program(graph, tight, plans=PLANS[:-1])
    check_golden(graph, program(graph, tight), frames=2)


@pytest.mark.parametrize("frames", [1, 2])
def test_more_rows_than_queues_hold_are_routed_block_by_block(frames):
    short, graph = dataclasses.replace(CONFIGS[0], max_rows=8), Graph(5)
    x = graph.input(21, 12, Memory.RESIDUAL)
    y = graph.norm(x, NormMode.RMS)
    x = graph.experts(y, x, graph.route(y, 3, 2), 3, 10)
    graph.add_linear(graph.norm(x, NormMode.RMS), None, 7)
    check_golden(graph, program(graph, short, plans=PLANS[-1:], frames=frames), frames=frames)


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize("size", ["wide", "gated"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
def test_frames_in_flight_are_those_apart(config, size, frames):
    graph = transformer(3, **SIZES[size])
    compiled = program(graph, config, frames=frames)
    check_golden(graph, compiled, frames=5)


def image(compiled) -> np.ndarray:
    dram = np.zeros(compiled.dram_bytes, np.uint8)
    dram[:len(compiled.image)] = np.frombuffer(compiled.image, np.uint8)
    return dram


def run_in_random_order(machine: Machine, entry: int, draw: np.random.Generator) -> int:
    """Engines in any interleaving that tokens and dispatch allow; how often a later one overtook."""
    machine.reset()
    pending = list(enumerate(machine.decode(entry)))
    overtaken = 0
    while pending:
        heads = {}
        waiting: dict[Opcode, int] = {}
        for number, instr in pending:  # dispatch stops at the first full queue
            waiting[instr.opcode] = waiting.get(instr.opcode, 0) + 1
            if waiting[instr.opcode] > machine.config.queue + 1:
                break
            heads.setdefault(instr.opcode, (number, instr))
        ready = [head for head in heads.values() if machine.ready(head[1])]
        assert ready, "deadlock"
        number, instr = ready[draw.integers(len(ready))]
        overtaken += number != pending[0][0]
        machine.execute(instr)
        pending.remove((number, instr))
    return overtaken


@pytest.mark.parametrize("size", ["odd", "gated"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
def test_any_interleaving_that_tokens_allow_gives_the_same(config, size):
    graph = transformer(7, **SIZES[size])
    compiled = program(graph, config)
    step, inputs = compiled.steps[0], graph.integers(1)
    expected = evaluate(graph.operations, inputs)
    dram = image(compiled)
    for port in step.inputs:
        raw = port.region.pack(config, inputs[port.tensor][0])
        dram[port.region.address:][:len(raw)] = np.frombuffer(raw, np.uint8)
    machine = Machine(config, dram)
    overtaken = 0
    for seed in range(20):
        overtaken += run_in_random_order(machine, step.entry, np.random.default_rng(seed))
        for probe in step.probes:
            found = probe.region.unpack(config, dram[probe.region.address:].tobytes())
            np.testing.assert_array_equal(found, expected[probe.tensor][0], err_msg=probe.name)
    assert overtaken > 100, "engines never ran ahead of one another"


def test_without_tokens_an_interleaving_goes_wrong():
    """The test above can fail: the same program with no tokens does not survive it."""
    graph = transformer(7, **SIZES["odd"])
    compiled = program(graph, CONFIGS[0])
    step, inputs = compiled.steps[0], graph.integers(1)
    dram = image(compiled)
    machine = Machine(CONFIGS[0], dram)
    for number, instr in enumerate(machine.decode(step.entry)):
        bare = isa.Instruction(instr.opcode, instr.fields | {"wait": 0, "signal": 0})
        dram[step.entry + number * isa.BYTES:][:isa.BYTES] = np.frombuffer(isa.encode(bare), np.uint8)
    expected = evaluate(graph.operations, inputs)
    wrong = 0
    for seed in range(5):
        run_in_random_order(machine, step.entry, np.random.default_rng(seed))
        probe = step.probes[-1]
        found = probe.region.unpack(CONFIGS[0], dram[probe.region.address:].tobytes())
        wrong += (found != expected[probe.tensor][0]).any()
    assert wrong


def test_weights_load_ahead_of_the_products_before_them():
    """Double buffering: most weight loads stand before the product of the tile before."""
    lowered: Lowered = lower(transformer(3, **SIZES["wide"]), CONFIGS[0], trace=False)
    user = {}
    for number, instr in enumerate(lowered.instructions):
        for span in instr.reads:
            if span.buffer.memory is Memory.WEIGHT:
                user[id(span.buffer)] = number
    ahead = sum(
        any(o.opcode is Opcode.LINEAR for o in lowered.instructions[n:user[id(i.writes[0].buffer)]])
        for n, i in enumerate(lowered.instructions)
        if i.writes and i.writes[0].buffer.memory is Memory.WEIGHT and i.opcode is Opcode.LOAD)
    assert ahead > len(user) / 2


def test_overlapping_buffers_are_caught():
    lowered = lower(transformer(3, **SIZES["odd"]), CONFIGS[0])
    placed = [b for b in lowered.buffers if b.memory is Memory.ACTIVATION]
    placed[2].address = placed[1].address
    placed[3].address = placed[1].address
    with pytest.raises(CompileError, match="still holds what was written"):
        verify_addresses(lowered, CONFIGS[0])


@pytest.mark.parametrize("change, message", [
    (dict(residual_words=20), r"Buffer '.*' of \d+ words must fit in the residual memory of 20 "
                              r"words beside .*: \d+ words too many"),
    (dict(activation_words=4), r"must fit in the activation memory of 16 words .* words too many"),
    (dict(weight_words=4), r"smallest weight tile of .* takes \d+, \d+ more than "
                           r"Config.weight_words = 4"),
    (dict(row_words=2), r"A row of .* takes \d+, \d+ more than Config.row_words = 2"),
    (dict(max_experts=8), r"experts of .* takes 16, 8 more than Config.max_experts = 8"),
    (dict(max_chosen=3), r"takes 4, 1 more than Config.max_chosen = 3"),
    (dict(max_rows=16), r"The keys of .* takes 17, 1 more than Config.max_rows = 16"),
])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(CompileError, match=message):
        lower(transformer(3, **SIZES["wide"]), config(2, 4, 8, 2, 2, 8, **change))
