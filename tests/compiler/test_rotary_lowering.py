"""Queries and keys that are normalised and turned on their way to attention, lowered."""

import dataclasses

import numpy as np
import pytest

from moeware.compiler.errors import CompileError
from moeware.compiler.tile import PLANS, chain
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, NormMode, Opcode
from moeware.hw.arch.program import Program
from moeware.hw.arch.work import works
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice, Machine

from ..hw.arch.configs import CONFIGS, config
from ..runtime.reference import Graph, evaluate
from .lowering import decoder, lower, program
from .test_lowering import image, run_in_random_order

ROTARY = [dataclasses.replace(each, rotary=1) for each in CONFIGS if each.lanes % 2 == 0]
# Whose words have two values, so that a head of six is three; nothing else divides.
ROTARY.append(config(3, 10, 6, 2, 2, 4, activation_banks=3, activation_words=1500, queue=2, rotary=1))
FORMS = ("llama", "olmoe", "qwen3")
SIZES = {
    "odd": dict(tokens=7, width=6, heads=4, hidden=9),
    "one": dict(tokens=1, width=2, heads=1, hidden=1),
    "wide": dict(tokens=19, width=16, heads=3, hidden=40),
    "loud": dict(tokens=5, width=10, heads=2, hidden=8, gain=6.0, causal=False),
    "of 4 bits": dict(tokens=6, width=8, heads=2, hidden=20, bits=4),
}
NAMES = [f"{each.linear_macs}macs" for each in ROTARY]


def compare(graph: Graph, compiled, frames: int = 3) -> None:
    """Every tensor of a run of the golden device and of PyTorch is that of the quantised graph."""
    inputs = graph.integers(frames)
    expected = evaluate(graph.operations, inputs)
    for device in (GoldenDevice(), TorchDevice()):
        found = device.run(compiled, compiled.steps[0], inputs, probes=True)
        assert found.keys() >= {op.output for op in graph.operations}
        for tensor, values in found.items():
            np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", ROTARY, ids=NAMES)
def test_golden_device_and_pytorch_compute_the_quantised_graph(config, form, size):
    graph = decoder(3, form, **SIZES[size])
    compare(graph, program(graph, config))


@pytest.mark.parametrize("plan", PLANS[1:], ids=["lean", "halves", "quarters", "spill"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [ROTARY[0], ROTARY[-1]], ids=["even", "ragged"])
def test_every_plan_gives_the_same(config, form, plan):
    for size in ("odd", "wide", "one"):
        graph = decoder(4, form, **SIZES[size])
        compare(graph, program(graph, config, plans=[plan], frames=2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [ROTARY[0], ROTARY[-1]], ids=["even", "ragged"])
def test_any_interleaving_that_tokens_allow_gives_the_same(config, form):
    run_in_any_order(decoder(7, form, **SIZES["odd"]), config)


def run_in_any_order(graph: Graph, config: Config) -> None:
    """Every tensor of two frames is that of the quantised graph, whatever engine comes first, and
    whatever the memories held before."""
    compiled = program(graph, config, frames=2)
    step, inputs = compiled.steps[0], graph.integers(2)
    expected = evaluate(graph.operations, inputs)
    dram = image(compiled)
    for frame in range(2):
        for port in step.inputs:
            region = port.region.of_frame(config, frame)
            raw = region.pack(config, inputs[port.tensor][frame])
            dram[region.address:][:len(raw)] = np.frombuffer(raw, np.uint8)
    machine = Machine(config, dram)
    for draw in map(np.random.default_rng, range(5)):
        for memory in (machine.activation, machine.residual):
            memory[:] = draw.integers(-128, 128, memory.shape)
        run_in_random_order(machine, step.entry, draw)
        for frame in range(2):
            for probe in step.probes:
                region = probe.region.of_frame(config, frame)
                found = region.unpack(config, dram[region.address:].tobytes())
                np.testing.assert_array_equal(found, expected[probe.tensor][frame],
                                              err_msg=probe.name)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_rows_behind_attention_give_the_same(monkeypatch, form, frames):
    monkeypatch.setattr(chain, "LEAST_CYCLES", 1)
    large = dataclasses.replace(ROTARY[0], activation_words=4096, residual_words=16384, max_rows=200)
    graph = decoder(5, form, tokens=95, width=8, heads=3, hidden=16)
    compiled = program(graph, large, frames=frames)
    again = [work.instruction.address for work in works(compiled, compiled.steps[0])
             if work.layer == "/addlinear7" and work.instruction.opcode is Opcode.LOAD]
    assert len(again) > len(set(again))  # a block's weights are loaded for it
    compare(graph, compiled, frames=2)


def test_what_is_normalised_as_a_whole_is_made_in_blocks_where_room_is_short():
    graph = decoder(6, "olmoe", tokens=64, width=8, heads=3, hidden=16)
    for frames in (1, 3):
        # The stream takes 768 words a frame, factors 256, and a block of queries or keys 384.
        tight = dataclasses.replace(ROTARY[0], activation_words=4096, max_rows=200,
                                    residual_words=768 * frames + 256 + 384)
        with pytest.raises(CompileError, match="must fit in the residual memory"):
            program(graph, tight, plans=PLANS[:2], frames=frames)
        compare(graph, program(graph, tight, plans=PLANS[2:4], frames=frames), frames=frames)


def test_programs_are_kept_in_files(tmp_path):
    graph = decoder(3, "qwen3", **SIZES["odd"])
    compiled = program(graph, ROTARY[0])
    compiled.save(tmp_path / "model.moe")
    compare(graph, Program.load(tmp_path / "model.moe"))


def test_heads_are_made_one_by_one_and_share_their_factors():
    graph = decoder(3, "qwen3", **SIZES["wide"])
    lowered = lower(graph, ROTARY[0], trace=False)
    turning = [instr for instr in lowered.instructions if instr.fields.get("factor_words")]
    assert {instr.fields["channels"] for instr in turning} == {16}
    assert len({id(instr.fields["factors"].buffer) for instr in turning}) == 1
    order = [instr.opcode for instr in lowered.instructions
             if instr.opcode is Opcode.ATTENTION or instr in turning]
    assert order.index(Opcode.ATTENTION) < len(order) - order[::-1].index(Opcode.NORM)


def test_keys_that_several_queries_share_are_made_once():
    graph = Graph(5)
    y, rotation = graph.norm(graph.input(9, 20, Memory.RESIDUAL), NormMode.RMS), graph.rotation(9, 8)
    q, k = (graph.norm(graph.add_linear(y, None, heads * 8), NormMode.RMS, groups=heads,
                       rotation=rotation) for heads in (4, 2))
    attended = graph.attention(q, k, graph.linear(y, 16), 4, 2, causal=True)
    graph.add_linear(attended, None, 3)
    compiled = program(graph, ROTARY[0])
    norms = [work for work in works(compiled, compiled.steps[0])
             if work.instruction.opcode is Opcode.NORM and work.instruction.factor_words]
    assert len(norms) == 4 + 2
    compare(graph, compiled)


def test_a_norm_of_all_heads_is_one_instruction_for_all():
    graph = decoder(3, "olmoe", **SIZES["odd"])
    compiled = program(graph, ROTARY[-1], trace=False)
    norms = [work.instruction for work in works(compiled, compiled.steps[0])
             if work.instruction.opcode is Opcode.NORM and work.instruction.factor_words]
    assert [(i.rows, i.channels, i.counted, i.factor_words) for i in norms] == 2 * [(7, 24, 0, 3)]
    compiled = program(graph, ROTARY[0], trace=False)  # words of 8 channels, heads of 6
    norms = [work.instruction for work in works(compiled, compiled.steps[0])
             if work.instruction.opcode is Opcode.NORM and work.instruction.factor_words]
    assert [(i.rows, i.channels, i.counted, i.factor_words) for i in norms] == 2 * [(7, 32, 24, 4)]


def test_gateware_that_cannot_is_named():
    for form, turned, message in (("llama", True, "turns pairs"), ("qwen3", True, "turns pairs"),
                                  ("olmoe", False, "of 24 channels, which Config.depth = 8")):
        graph = decoder(3, form, **SIZES["odd"], turned=turned)
        with pytest.raises(CompileError, match=f"{message}.* must have Config.rotary = 1, not 0"):
            program(graph, CONFIGS[0])
    graph = decoder(3, "qwen3", **SIZES["odd"], turned=False)
    compare(graph, program(graph, CONFIGS[0]))  # normalised only


def test_groups_that_are_no_heads_are_named():
    graph = Graph(1)
    source = graph.input(4, 12)
    y = graph.norm(graph.add_linear(source, None, 12), NormMode.RMS, groups=2)
    v = graph.linear(source, 12)
    graph.add_linear(graph.attention(y, v, v, 3, 3), None, 5)
    with pytest.raises(CompileError, match="all channels or each head .* not have 2 groups of 3 heads"):
        program(graph, ROTARY[0])
    graph = Graph(1)
    source = graph.input(4, 12)
    y = graph.norm(graph.add_linear(source, None, 12), NormMode.SCALE, rotation=graph.rotation(4, 6))
    v = graph.linear(source, 12)
    graph.add_linear(graph.attention(y, v, v, 3, 3), None, 5)
    with pytest.raises(CompileError, match="must turn each of 3 heads of attention, not 2"):
        program(graph, ROTARY[0])
