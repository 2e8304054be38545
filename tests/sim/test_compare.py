import numpy as np
import pytest

from moeware.hw.arch.config import Config
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice

from ..compiler.lowering import program, transformer

CONFIG = Config(tokens=2, outputs=4, depth=4, queries=2, lanes=2, bus_bytes=8, activation_banks=2,
                activation_words=512, residual_words=512, weight_words=256, param_words=256,
                tables=2, row_words=32, max_rows=32, max_experts=4, max_chosen=2, queue=4)


class Faulty:
    """A device that returns another's results with faults added to some elements."""

    name, config, counters = "faulty", None, []

    def __init__(self, device, faults):
        self.device, self.faults = device, faults

    def run(self, *arguments, **options):
        results = dict(self.device.run(*arguments, **options))
        for (tensor, *index), fault in self.faults.items():
            results[tensor] = results[tensor].copy()
            results[tensor][tuple(index)] += fault
        return results


@pytest.fixture(scope="module")
def traced():
    graph = transformer(3, tokens=5, depth=6, width=6, heads=2, hidden=9, experts=4, chosen=2)
    made = program(graph, CONFIG)
    return made, made.steps[0], graph.integers(2)


def output(step, kind):
    return next(op for op in step.operations if type(op).__name__ == kind).output


def test_equal_devices(traced):
    made, step, inputs = traced
    found = compare(made, step, {"golden": GoldenDevice(), "PyTorch": TorchDevice()}, inputs)
    stored = {probe.tensor: 2 * probe.region.rows * probe.region.channels for probe in step.probes}
    assert found.equal and found.first is None
    assert {tensor: values for _, tensor, values, _ in found.tensors} == stored
    assert str(found) == f"golden = PyTorch: {sum(stored.values()):,} values, 0 differences"


def test_the_first_difference_in_program_order_is_named(traced):
    made, step, inputs = traced
    early, late = output(step, "Norm"), output(step, "Experts")
    faults = {(late, 0, 0, 0): 1, (early, 1, 4, 5): -7, (early, 1, 5, 0): 1}
    found = compare(made, step, {"golden": GoldenDevice(), "RTL": Faulty(GoldenDevice(), faults)},
                    inputs)
    first = found.first
    assert found.differences == 3 and not found.equal
    assert (first.layer, first.tensor) == (f"/{early}", early)
    assert (first.frame, first.row, first.channel) == (1, 4, 5)
    assert (first.token_group, first.output_group) == (4 // 2, 5 // 4)
    assert first.values["RTL"] == first.values["golden"] - 7
    text = str(found)
    assert "golden / RTL: " in text and "3 differences" in text
    assert f"first difference: layer `/{early}`" in text
    assert (f"frame 1, tile (token group 2, output group 1), row 4, channel 5: golden "
            f"{first.values['golden']}, RTL {first.values['RTL']}") in text


def test_tiles_follow_the_words_of_heads_and_the_first_row(traced):
    """Heads of 6 channels start at words of 4, so that channel 6 lies in column 8; a layer that adds
    to the rows from 1 on counts them from there."""
    made, step, inputs = traced
    query = next(op for op in step.operations if type(op).__name__ == "Attention").query
    embedding = output(step, "AddLinear")
    for tensor, row, channel, group in ((query, 5, 6, (2, 2)), (embedding, 2, 6, (0, 1))):
        faulty = Faulty(GoldenDevice(), {(tensor, 0, row, channel): 1})
        first = compare(made, step, {"a": GoldenDevice(), "b": faulty}, inputs).first
        assert (first.tensor, first.row, first.channel) == (tensor, row, channel)
        assert (first.token_group, first.output_group) == group


def test_a_third_device_that_differs_is_seen(traced):
    made, step, inputs = traced
    tensor = output(step, "Linear")
    devices = {"golden": GoldenDevice(), "PyTorch": TorchDevice(),
               "board": Faulty(GoldenDevice(), {(tensor, 1, 0, 0): 2})}
    first = compare(made, step, devices, inputs).first
    assert first.values["board"] - 2 == first.values["golden"] == first.values["PyTorch"]


def test_what_cannot_be_compared(traced):
    made, step, inputs = traced
    with pytest.raises(ValueError, match="must be two or more"):
        compare(made, step, {"golden": GoldenDevice()}, inputs)

    class Cropped(Faulty):
        def run(self, *arguments, **options):
            return {tensor: values[:, :1] for tensor, values in self.device.run(
                *arguments, **options).items()}

    with pytest.raises(ValueError, match="must have one shape on all devices"):
        compare(made, step, {"a": GoldenDevice(), "b": Cropped(GoldenDevice(), {})}, inputs)

    class Silent(Faulty):
        def run(self, *arguments, **options):
            return {"other": np.zeros((1, 1, 1))}

    with pytest.raises(ValueError, match="a tensor in common"):
        compare(made, step, {"a": GoldenDevice(), "b": Silent(GoldenDevice(), {})}, inputs)
