"""Blocks of language models on the gateware that turns pairs, integer by integer."""

import pytest

from moeware.hw.arch.config import Config
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

from ..compiler.lowering import decoder, program
from .test_rtl import SHAPES, SMALL

ROTARY = SMALL | {"rotary": 1}
CONFIGURATIONS = {
    "even": Config(**ROTARY | SHAPES["even"]),
    "nothing divides": Config(**ROTARY | {"tokens": 3, "outputs": 10, "depth": 6, "lanes": 2,
                                          "queries": 3, "bus_bytes": 4, "queue": 2}),
}
SIZES = {"tokens": 6, "width": 8, "heads": 3, "hidden": 9}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_gateware_equals_golden_equals_pytorch(name):
    config = CONFIGURATIONS[name]
    devices = {"golden": GoldenDevice(), "PyTorch": TorchDevice()} | {
        f"RTL {label}": RtlDevice(config, fast=False, **options) for label, options in {
            "SDRAM": {"dram": SDRAM_16BIT}, "ideal, stalled": {"dram": IDEAL, "stall_seed": 1},
            "DDR, stalled": {"dram": DDR, "stall_seed": 2}}.items()}
    for seed, (form, changes) in enumerate((
            ("llama", {}), ("llama", {"gain": 6.0, "causal": False, "bits": 4}), ("olmoe", {}),
            ("olmoe", {"width": 10, "heads": 2}), ("qwen3", {}), ("qwen3", {"turned": False}),
            ("qwen3", {"tokens": 1, "width": 2, "heads": 1, "hidden": 1}))):
        graph = decoder(seed, form, **SIZES | changes)
        made = program(graph, config, frames=1 + seed % 2)
        step = made.steps[0]
        found = compare(made, step, devices, graph.integers(3))
        assert found.equal, (form, changes, str(found))
        assert {tensor for _, tensor, *_ in found.tensors} == {
            op.output for op in graph.operations}
