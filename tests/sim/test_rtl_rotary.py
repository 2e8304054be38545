"""Blocks of language models on the gateware that turns pairs, integer by integer."""

import pytest

from moeware.hw.arch.config import Config
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

from ..compiler.lowering import decoder, latent, program
from ..runtime.reference import Graph
from .test_rtl import SHAPES, SMALL

ROTARY = SMALL | {"rotary": 1}
CONFIGURATIONS = {
    "even": Config(**ROTARY | SHAPES["even"]),
    "nothing divides": Config(**ROTARY | {"tokens": 3, "outputs": 10, "depth": 6, "lanes": 2,
                                          "queries": 3, "bus_bytes": 4, "queue": 2}),
}
SIZES = {"tokens": 6, "width": 8, "heads": 3, "hidden": 9}


LATENT = {"tokens": 6, "plain": 6, "turned": 2, "value": 5, "heads": 3, "hidden": 9}


def devices(config: Config) -> dict:
    return {"golden": GoldenDevice(), "PyTorch": TorchDevice()} | {
        f"RTL {label}": RtlDevice(config, fast=False, **options) for label, options in {
            "SDRAM": {"dram": SDRAM_16BIT}, "ideal, stalled": {"dram": IDEAL, "stall_seed": 1},
            "DDR, stalled": {"dram": DDR, "stall_seed": 2}}.items()}


def check(graph: Graph, config: Config, frames: int, what) -> None:
    """Every tensor of three frames is the same on all devices."""
    made = program(graph, config, frames=frames)
    found = compare(made, made.steps[0], devices(config), graph.integers(3))
    assert found.equal, (what, str(found))
    assert {tensor for _, tensor, *_ in found.tensors} == {op.output for op in graph.operations}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_gateware_equals_golden_equals_pytorch(name):
    for seed, (form, changes) in enumerate((
            ("llama", {}), ("llama", {"gain": 6.0, "causal": False, "bits": 4}), ("olmoe", {}),
            ("olmoe", {"width": 10, "heads": 2}), ("qwen3", {}), ("qwen3", {"turned": False}),
            ("qwen3", {"tokens": 1, "width": 2, "heads": 1, "hidden": 1}))):
        check(decoder(seed, form, **SIZES | changes), CONFIGURATIONS[name], 1 + seed % 2,
              (form, changes))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keys_of_two_products_and_values_of_another_size(name):
    for seed, changes in enumerate((
            {}, {"value": 11, "rank": None, "gain": 6.0}, {"plain": 8, "turned": 8, "value": 16, "bits": 4},
            {"joined": True}, {"tokens": 1, "plain": 1, "turned": 1, "value": 1, "heads": 1, "hidden": 1})):
        check(latent(seed, **LATENT | changes), CONFIGURATIONS[name], 1 + seed % 2, changes)
