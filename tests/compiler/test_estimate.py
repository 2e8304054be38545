# amaranth: UnusedElaboratable=no
"""The estimate of cycles against the gateware's, in total and layer by layer."""

import dataclasses

import numpy as np
import pytest

import moeware
from moeware.compiler import estimate as estimate_module
from moeware.compiler import estimate_costs, estimate_dma, estimate_dram
from moeware.compiler.estimate import DramCycles, estimate
from moeware.hw import sequencer
from moeware.hw.arch.isa import Engine, NormMode, Opcode, Target
from moeware.hw.attention.passes import PassReader
from moeware.hw.attention.results import ResultWriter
from moeware.hw.dma import bursts, load, share, store
from moeware.hw.linear.scale import Scale
from moeware.hw.norm.inverse_root import InverseRoot
from moeware.hw.norm.rotate import Rotate
from moeware.hw.norm.variance import Variance
from moeware.hw.router.unit import Router
from moeware.runtime.chosen import chosen_experts
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.profile import ProfilingDevice
from moeware.sim.rtl import RtlDevice

from ..hw.arch.configs import CONFIGS
from ..sim.test_rtl import SHAPES, shaped
from ..sim.test_rtl_rotary import CONFIGURATIONS as TURNING
from .lowering import decoder, program, transformer

MEMORIES = [IDEAL, SDRAM_16BIT, DDR]
CONFIGURATIONS = {**{name: shaped(name) for name in SHAPES},
                  **{f"of {CONFIGS[number].linear_macs} products": CONFIGS[number]
                     for number in (0, 1, 4, 5)},
                  "router forms": dataclasses.replace(shaped("even"), router_forms=1, products=1,
                                                      max_experts=8)}
MODELS = {
    "bidirectional": {"tokens": 11, "depth": 10, "width": 6, "heads": 2, "hidden": 17},
    "causal": {"tokens": 6, "depth": 7, "width": 5, "heads": 3, "hidden": 9, "causal": True,
               "mode": NormMode.RMS},
    "long": {"tokens": 15, "depth": 12, "width": 8, "heads": 1, "hidden": 20},
}
MODELS |= {"of 4 bits": MODELS["bidirectional"] | {"bits": 4}, "ternary": MODELS["long"] | {"bits": 2},
           "gated": MODELS["bidirectional"] | {"gated": True}}
DECODERS = [("llama", {"tokens": 12, "width": 8, "heads": 3, "hidden": 20}),
             ("olmoe", {"tokens": 9, "width": 10, "heads": 2, "hidden": 17}),
             ("qwen3", {"tokens": 15, "width": 12, "heads": 2, "hidden": 9}),
             ("qwen3", {"tokens": 3, "width": 6, "heads": 4, "hidden": 9})]
TOTAL, LAYER = 0.05, 0.10  # errors that we allow
BOUNDARY = 0.01  # of the run, where one layer ends and the next begins
INSTRUCTION_BURST = 256  # bytes; a few cycles decide before which layer's loads it goes


def cycles(memory, config, clock_hz: float = 100e6) -> DramCycles:
    timing = memory.cycles(config.bus_bytes, clock_hz)
    return DramCycles(**{name: getattr(timing, name) for name, _ in timing._fields_})


def made(config, model: str, seed: int = 1):
    form = config.router_forms and list(MODELS).index(model) + 1  # to each model one of its own
    graph = transformer(seed, experts=config.max_experts, chosen=min(2, config.max_chosen),
                        form=form, **MODELS[model])
    compiled = program(graph, config, trace=False)
    return compiled, compiled.steps[0], graph.integers(1)


def of_operations(layers: dict[str, int]) -> dict[str, int]:
    """All experts of a router as one layer."""
    sums: dict[str, int] = {}
    for layer, taken in layers.items():
        name = layer.split("/expert")[0] if "/expert" in layer[1:] else layer
        sums[name] = sums.get(name, 0) + taken
    return sums


def hold(label, config, memory, compiled, step, inputs) -> None:
    """The estimate of a run against the gateware's cycles, in total and layer by layer."""
    device = ProfilingDevice(config, fast=False, dram=memory)
    device.run(compiled, step, inputs)
    found = device.profiles[0].timeline
    expected = estimate(compiled, step, cycles(memory, config),
                        chosen_experts(compiled, step, inputs)[0])
    assert expected.cycles == pytest.approx(found.cycles, rel=TOTAL), label
    burst = INSTRUCTION_BURST / memory.bytes_per_cycle(config.bus_bytes, 100e6)
    slack = max(BOUNDARY * found.cycles, burst)
    layers = of_operations(found.layer_cycles())
    for layer, taken in of_operations(expected.layer_cycles()).items():
        assert taken == pytest.approx(layers[layer], rel=LAYER, abs=slack), (label, layer)
    for row, other in zip(expected.table(), found.table(), strict=True):
        assert (row.layer, row.engine, row.instructions, row.skipped, row.macs, row.bytes) == (
            other.layer, other.engine, other.instructions, other.skipped, other.macs,
            other.bytes)
    for engine in (Engine.LOAD, Engine.LINEAR):
        for what in ("busy", "waiting", "stalled"):
            if (engine, what) == (Engine.LINEAR, "stalled"):
                continue  # engines do not disturb each other in the estimate
            sums = [sum(getattr(row, what) for row in table if row.engine == engine)
                    for table in (expected.table(), found.table())]
            assert sums[0] == pytest.approx(sums[1], rel=LAYER, abs=LAYER * found.cycles / 2)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_cycles_are_those_of_the_gateware(name):
    config = CONFIGURATIONS[name]
    models = [model for model, sizes in MODELS.items()
              if config.products or not sizes.get("gated")]
    for number, model in enumerate(models):
        memory = MEMORIES[(number + list(CONFIGURATIONS).index(name)) % len(MEMORIES)]
        hold(model, config, memory, *made(config, model))


@pytest.mark.parametrize("name", TURNING)
def test_cycles_of_turned_queries_and_keys(name):
    config = TURNING[name]
    for number, (form, sizes) in enumerate(DECODERS):
        graph = decoder(1, form, **sizes)
        compiled = program(graph, config, trace=False)
        memory = MEMORIES[(number + list(TURNING).index(name)) % len(MEMORIES)]
        hold((form, sizes), config, memory, compiled, compiled.steps[0], graph.integers(1))


def test_constants_are_those_of_the_gateware():
    assert estimate_module.IN_FLIGHT == sequencer.IN_FLIGHT
    assert estimate_dma.PAGE_BYTES == bursts.PAGE_BYTES and estimate_dma.LONGEST == bursts.LONGEST
    assert (estimate_dma.JOBS, estimate_dma.READS, estimate_dma.WRITES) == (
        load.JOBS, share.BURSTS, store.WRITES)
    assert estimate_costs.Norm.VARIANCE == Variance.INTERVAL
    assert (estimate_costs.Norm.ROOT, estimate_costs.Norm.ROOT_LATENCY) == (
        InverseRoot.INTERVAL, InverseRoot.LATENCY)
    assert estimate_costs.Norm.ROTATE == Rotate.LATENCY
    assert estimate_costs.Attention.ROWS_PER_DIVIDER == ResultWriter.ROWS_PER_DIVIDER
    assert estimate_costs.Attention.GROUP >= PassReader.GROUP_CYCLES
    assert estimate_costs.Linear.ROUTE_ROW == Router.ROW_INTERVAL
    assert (estimate_costs.Linear.FORMS, estimate_costs.Linear.GROUPS) == (
        Router.FORMS_LATENCY, Router.GROUPS_LATENCY)
    latencies = [Scale(dataclasses.replace(CONFIGS[0], products=each)).latency for each in (0, 1)]
    assert estimate_costs.Linear.PRODUCTS == latencies[1] - latencies[0]


def test_narrow_buses_and_slow_memories_take_longer():
    config = CONFIGS[0]
    compiled, step, _ = made(config, "bidirectional")
    ideal = cycles(IDEAL, config)
    reference = estimate(compiled, step, ideal).cycles
    for changes in ({"rate": 64 * config.bus_bytes}, {"read_latency": 40}, {"activate": 30},
                    {"refresh_interval": 200, "refresh": 50}):
        slower = estimate(compiled, step, dataclasses.replace(ideal, **changes)).cycles
        assert slower > reference, changes
    again = estimate(compiled, step, ideal)
    assert again.cycles == reference and not again.skipped.any()


def test_experts_without_tokens_cost_nothing():
    config = CONFIGS[0]
    compiled, step, inputs = made(config, "bidirectional")
    choices = chosen_experts(compiled, step, inputs)[0]
    one = {name: np.zeros_like(chosen) for name, chosen in choices.items()}
    found = estimate(compiled, step, cycles(SDRAM_16BIT, config), one)
    assert found.skipped.sum() > config.max_experts
    assert found.cycles < estimate(compiled, step, cycles(SDRAM_16BIT, config)).cycles
    linear = [work for work in found.works if work.instruction.opcode is Opcode.LINEAR
              and work.instruction.queued and not work.skipped]
    assert {work.instruction.expert for work in linear} == {0}
    router = next(work for work in found.works if work.instruction.opcode is Opcode.LINEAR
                  and work.instruction.target == Target.ROUTER)
    assert {work.rows for work in linear} == {router.rows * router.instruction.chosen}


def test_frames_in_flight_all_send_their_tokens():
    """Two equal frames: every expert works for both, as the gateware's does."""
    config = CONFIGURATIONS["even"]
    graph = transformer(1, experts=config.max_experts, chosen=min(2, config.max_chosen),
                        **MODELS["causal"])
    inputs = {name: np.concatenate([value, value]) for name, value in graph.integers(1).items()}
    macs, found = {}, {}
    for frames in (1, 2):
        compiled = program(graph, config, trace=False, frames=frames)
        runs = chosen_experts(compiled, compiled.steps[0], inputs)
        assert len(runs) == 2 // frames
        found[frames] = estimate(compiled, compiled.steps[0], cycles(SDRAM_16BIT, config), runs[0])
        macs[frames] = sum(work.macs for work in found[frames].works)
    assert macs[2] == 2 * macs[1]
    device = RtlDevice(config, dram=SDRAM_16BIT, clock_hz=100e6)
    device.run(compiled, compiled.steps[0], inputs)
    assert found[2].cycles == pytest.approx(device.counters[0]["cycles"], rel=TOTAL)


def test_tokens_that_cannot_come_are_an_error():
    config = CONFIGS[0]
    compiled, step, _ = made(config, "causal")
    image = bytearray(compiled.image)
    image[step.entry] |= 1 << 3 + Engine.STORE  # the first load waits for the first store
    broken = dataclasses.replace(compiled, image=bytes(image))
    with pytest.raises(ValueError, match="must not wait for tokens that cannot come"):
        estimate(broken, step, cycles(IDEAL, config))


def test_the_api_estimates_files_with_and_without_inputs(tmp_path):
    config = CONFIGS[0]
    compiled, step, inputs = made(config, "long")
    compiled.save(tmp_path / "model.moe")
    balanced, = moeware.estimate(tmp_path / "model.moe", dram=IDEAL)
    feeds = {port.name: inputs[port.tensor].astype(np.float32) * port.scale
             for port in step.inputs}
    chosen, = moeware.estimate(compiled, dram=IDEAL, feeds=feeds)
    assert chosen.cycles == estimate(compiled, step, cycles(IDEAL, config),
                                     chosen_experts(compiled, step, inputs)[0]).cycles
    assert balanced.cycles != chosen.cycles
    faster, = moeware.estimate(compiled, clock_hz=20e6)  # fewer cycles pass for a word
    assert faster.cycles < moeware.estimate(compiled, clock_hz=200e6)[0].cycles


def test_the_data_bus_moves_words_at_its_pace():
    clock = estimate_dram.Clock()
    dram = estimate_dram.Dram(clock, DramCycles(bus_bytes=8, rate=512, read_latency=5, activate=3,
                                                row_bytes=64, banks=2))
    moved = []
    for address in (0, 32, 128):  # two bursts of one row; another row of the same bank
        dram.add(estimate_dram.Burst(address, 4, lambda *when: moved.append(when)))
    clock.run()
    assert moved == [(6, 18), (22, 34), (41, 53)]
