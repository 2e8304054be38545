"""The gateware against the golden device, integer by integer, on random programs."""

import numpy as np
import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import connect, flipped

from moeware.hw import accelerator
from moeware.hw.arch import isa, layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, NormMode, Opcode
from moeware.hw.arch.work import works
from moeware.hw.attention.unit import AttentionUnit
from moeware.runtime.chosen import chosen_experts
from moeware.runtime.device import DeviceError, open_device
from moeware.runtime.drive import counter_names
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice, build
from moeware.sim.verilog import to_verilog

from ..compiler.lowering import program, transformer

SMALL = {"activation_banks": 3, "activation_words": 512, "residual_words": 512, "weight_words": 256,
         "param_words": 512, "tables": 2, "row_words": 64, "max_rows": 32, "max_experts": 5,
         "max_chosen": 3, "queue": 3}
SHAPES = {
    "even": {"tokens": 2, "outputs": 4, "depth": 4, "lanes": 2, "queries": 2, "bus_bytes": 8},
    "nothing divides": {"tokens": 3, "outputs": 5, "depth": 6, "lanes": 1, "queries": 3,
                        "bus_bytes": 4, "products": 1},
    "one of each": {"tokens": 1, "outputs": 1, "depth": 1, "lanes": 1, "queries": 1, "bus_bytes": 2,
                    "activation_banks": 1, "activation_words": 2048, "weight_words": 512,
                    "queue": 1},
    "wide, 512 products": {"tokens": 8, "outputs": 8, "depth": 8, "lanes": 8, "queries": 1,
                           "bus_bytes": 64, "max_experts": 4, "max_chosen": 1},
    "odd words": {"tokens": 5, "outputs": 3, "depth": 9, "lanes": 3, "queries": 4, "bus_bytes": 16,
                  "activation_banks": 2, "products": 1},
    "many outputs": {"tokens": 1, "outputs": 12, "depth": 2, "lanes": 2, "queries": 5,
                     "bus_bytes": 32, "activation_banks": 8, "queue": 8, "products": 1},
}
FETCHED_AHEAD = 512  # bytes of instructions behind END: two bursts


def shaped(name):
    return Config(**SMALL | SHAPES[name])


def traced(config, seed, **changes):
    """A random transformer that stores every tensor, and inputs of three frames."""
    sizes = {"tokens": 6, "depth": 10, "width": 6, "heads": 2, "hidden": 9,
             "experts": config.max_experts, "chosen": config.max_chosen}
    graph = transformer(seed, **sizes | changes)
    made = program(graph, config)
    return made, made.steps[0], graph.integers(3)


@pytest.mark.parametrize("name", SHAPES)
def test_gateware_equals_golden_equals_pytorch(name):
    config = shaped(name)
    devices = {"golden": GoldenDevice(), "PyTorch": TorchDevice()} | {
        f"RTL {label}": RtlDevice(config, fast=False, **options) for label, options in {
            "SDRAM": {"dram": SDRAM_16BIT}, "ideal, stalled": {"dram": IDEAL, "stall_seed": 1},
            "DDR, stalled": {"dram": DDR, "stall_seed": 2}}.items()}
    gated = ({"gated": True, "hidden": 13, "gain": 3.0}, {"gated": True, "bits": 4, "tokens": 5})
    for seed, changes in enumerate((
            {}, {"causal": True, "mode": NormMode.RMS, "gain": 4.0, "bits": 4},
            {"tokens": 1, "depth": 3, "width": 1, "heads": 1, "hidden": 1, "experts": 1,
             "chosen": 1, "bits": 2}, *(gated if config.products else ()))):
        made, step, inputs = traced(config, seed, **changes)
        found = compare(made, step, devices, inputs)
        assert found.equal, str(found)
        assert {tensor for _, tensor, *_ in found.tensors} == {probe.tensor for probe in step.probes}


def test_router_forms():
    """Sigmoid scores, corrections, groups and a sparse mixer, and the softmax of others on the same
    gateware."""
    config = Config(**SMALL | SHAPES["nothing divides"] | {"router_forms": 1, "max_experts": 8})
    devices = {"golden": GoldenDevice(), "PyTorch": TorchDevice(),
               "RTL": RtlDevice(config, fast=False, dram=DDR, stall_seed=2)}
    for form in range(7):
        made, step, inputs = traced(config, 20 + form, form=form)
        found = compare(made, step, devices, inputs)
        assert found.equal, str(found)


def beats(region, config):
    """Bus words of all parts of a region, without what lies between them."""
    words = region.rows * region.words_per_row(config) // region.parts
    return region.parts * layout.beats(config, region.memory, words)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_counters_of_each_frame(bits):
    config = shaped("even")
    made, step, inputs = traced(config, 5, bits=bits)
    device = open_device("rtl", config, fast=False, dram=IDEAL)
    seen = []
    device.run(made, step, inputs, progress=lambda *frames: seen.append(frames))
    assert seen == [(1, 3), (2, 3), (3, 3)] and len(device.counters) == 3
    golden = GoldenDevice()
    golden.run(made, step, inputs)
    choices = chosen_experts(made, step, inputs)
    for counters, expected, chosen in zip(device.counters, golden.counters, choices, strict=True):
        assert list(counters) == counter_names()
        assert counters["instructions"] == expected["instructions"]
        assert 0 < counters["linear_busy"] < counters["cycles"]
        stored = [*step.outputs, *step.probes]
        assert counters["write_beats"] == sum(
            beats(place.region, config) for place in stored)
        loaded = sum(work.beats for work in works(made, step, chosen) if work.engine is Engine.LOAD)
        fetched = (counters["read_beats"] - loaded) * config.bus_bytes
        assert 0 <= fetched - isa.BYTES * counters["instructions"] <= FETCHED_AHEAD


def test_a_program_for_another_configuration_is_refused():
    made, step, inputs = traced(shaped("nothing divides"), 0)
    with pytest.raises(DeviceError, match="Configuration of rtl must have the digest"):
        RtlDevice(shaped("even"), fast=False).run(made, step, inputs)


class OneWrongWord(wiring.Component):
    """An attention unit that flips a bit of channel 1 of one activation word that it writes."""

    def __init__(self, config, word, **options):
        self.unit, self.word = AttentionUnit(config, **options), word
        super().__init__(self.unit.signature)

    def elaborate(self, platform):
        m = Module()
        m.submodules.unit = unit = self.unit
        for name in self.signature.members:
            if name != "activation_write":
                connect(m, flipped(getattr(self, name)), getattr(unit, name))
        write, correct = self.activation_write.write, unit.activation_write.write
        m.d.comb += [
            write.valid.eq(correct.valid), correct.ready.eq(write.ready),
            write.p.address.eq(correct.p.address), write.p.mask.eq(correct.p.mask),
            write.p.data.eq(correct.p.data ^ ((correct.p.address.word == self.word) << 8))]
        return m


def test_a_faulty_unit_is_named_with_layer_tile_and_element(monkeypatch):
    config = shaped("even")
    made, step, inputs = traced(config, 7)
    decoded = (isa.decode(made.image[at:at + isa.BYTES])
               for at in range(step.entry, len(made.image), isa.BYTES))
    attention = next(i for i in decoded if i.opcode is Opcode.ATTENTION)
    row = 5
    word = attention.destination + row * attention.destination_stride
    monkeypatch.setattr(accelerator, "AttentionUnit",
                        lambda config, **options: OneWrongWord(config, word, **options))
    verilog = to_verilog(accelerator.Accelerator(config), "accelerator")
    monkeypatch.undo()

    devices = {"golden": GoldenDevice(), "RTL": RtlDevice(config, verilog=verilog, fast=False)}
    found = compare(made, step, devices, inputs)
    layer = next(op for op in step.operations if type(op).__name__ == "Attention")
    first = found.first
    assert (first.layer, first.tensor) == (layer.name, layer.output)
    assert (first.frame, first.row, first.channel) == (0, row, 1)
    assert (first.token_group, first.output_group) == (row // config.tokens, 0)
    assert first.values["RTL"] == first.values["golden"] ^ 1
    assert found.differences >= len(inputs)
    before = [wrong for _, tensor, _, wrong in found.tensors][
        :[tensor for _, tensor, *_ in found.tensors].index(layer.output)]
    assert before and not any(before)


def test_damaged_instructions_are_an_error():
    config = shaped("even")
    made, step, inputs = traced(config, 0)
    device = RtlDevice(config, fast=False, dram=IDEAL)
    good = device.run(made, step, inputs)
    device.target.write_memory(step.entry + 128, b"\xFD" * 32)  # no such opcode; not read back
    with pytest.raises(DeviceError, match="met an illegal instruction"):
        device.run(made, step, inputs)
    again = device.run(made, step, inputs)
    assert all(np.array_equal(again[tensor], good[tensor]) for tensor in good)


def test_verilog_that_does_not_compile_is_an_error():
    with pytest.raises(DeviceError, match="cannot be built: Verilator must compile 'accelerator'"):
        RtlDevice(shaped("even"), verilog="module accelerator(", notify=lambda line: None)


def test_one_build_serves_a_configuration():
    lines = []
    config = shaped("even")
    assert build(config, fast=False, notify=lines.append) == build(config, fast=False,
                                                                   notify=lines.append)
    assert len(lines) <= 1
