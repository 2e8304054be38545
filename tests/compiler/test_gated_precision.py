"""Bits of gated experts: for each of them under a budget, nested, and what narrow ones lose."""

import dataclasses

import numpy as np
import pytest

from moeware.compiler.calibrate import calibrate
from moeware.compiler.partition import partition
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.quantise import quantise
from moeware.compiler.quantise.expert_layer import MEASURED_ROWS, ExpertLayer
from moeware.compiler.reference import evaluate as in_float
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.nested import upper_half
from moeware.hw.arch.program import Program
from moeware.runtime.session import Session
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice

from ..runtime.reference import evaluate
from .canonical_models import gated_model
from .test_gated import WITH, images, state_of

PRODUCTS = ("gate", "up", "down")


def route_to(model, experts: list[int]):
    """The model with all tokens on these experts."""
    route = next(node for node in model.graph if node.op_type == "Route")
    bias = route.inputs[2].const_value.numpy().copy()
    bias[experts] += 100
    route.inputs[2].const_value = type(route.inputs[2].const_value)(bias)
    return model


def routed(operations: list[q.Operation]) -> q.Experts:
    found, = (op for op in operations if isinstance(op, q.Experts))
    return found


def exact(program: Program) -> None:
    """Golden device, PyTorch and plain numpy have the same integers, tensor by tensor."""
    step, = program.steps
    integers = {port.tensor: port.quantise(images(3, seed=8)) for port in step.inputs}
    found = compare(program, step, {"golden": GoldenDevice(), "PyTorch": TorchDevice()}, integers)
    assert found.equal, found
    expected = evaluate(step.operations, integers)
    for tensor, values in GoldenDevice().run(program, step, integers, probes=True).items():
        np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


def followed(model, program: Program, least_db: float) -> None:
    """Every grid up to the first router stands for what the float model has there."""
    step, = program.steps
    real: dict[str, np.ndarray] = {}
    feeds = images(24, seed=9)
    in_float(model, {"image": feeds}, real.__setitem__)
    values = evaluate(step.operations, {port.tensor: port.quantise(feeds) for port in step.inputs})
    branch = next(node for node in model.graph if node.op_type == "GatedExperts").outputs[0].name
    assert branch in step.grids
    for name, grid in step.grids.items():
        found = grid.varying(values)
        wanted = grid.wanted(real[name].reshape(*found.shape[:2], -1))
        noise = np.square(found - wanted).mean() / np.square(wanted).mean()
        assert -10 * np.log10(noise) > least_db, name


@pytest.mark.parametrize("options", [{}, {"experts": 1, "chosen": 1, "width": 7, "function": "gelu"},
                                     {"experts": 9, "chosen": 3, "hidden": 8}])
def test_mixed_bits_are_the_same_integers_everywhere(options, tmp_path):
    program = state_of(gated_model(11, **options), expert_bits=4.5, trace=True).program
    bits = program.metadata["expert_bits"]["layers"]
    found = routed(program.steps[0].operations)
    assert bits == {found.name: found.bits.tolist()}
    assert np.mean(found.bits) <= 4.5 and program.metadata["expert_bits"]["bytes"] <= (
        4.5 * sum(getattr(found, name).size for name in PRODUCTS) / 8)
    for expert, width in enumerate(found.bits.tolist()):
        assert all(np.abs(getattr(found, name)[expert]).max() == WEIGHT_BITS[width]
                   for name in PRODUCTS)
    exact(program)
    program.save(tmp_path / "mixed.moe")
    loaded = Program.load(tmp_path / "mixed.moe")
    feeds = {"image": images(2, seed=3)}
    np.testing.assert_array_equal(Session(loaded, GoldenDevice()).run(None, feeds)[0],
                                  Session(program, TorchDevice()).run(None, feeds)[0])


@pytest.mark.parametrize("options", [{}, {"function": "gelu_tanh", "experts": 1, "chosen": 1},
                                     {"experts": 8, "chosen": 1}])
def test_nested_weights_are_the_same_integers_everywhere(options, tmp_path):
    model = gated_model(12, **options)
    if options.get("chosen") == 1 < options["experts"]:
        route_to(model, [5])  # and seven experts without a token
    program = state_of(model, nested=True, trace=True).program
    whole, half = (routed(each.steps[0].operations) for each in (program, program.upper))
    assert set(whole.bits) == {8} and set(half.bits) == {4}
    for name in PRODUCTS:
        np.testing.assert_array_equal(getattr(half, name), upper_half(getattr(whole, name)))
        assert np.abs(getattr(half, name)).max() == 7
    program.save(tmp_path / "nested.moe")
    loaded = Program.load(tmp_path / "nested.moe")
    for made, read in ((program, loaded), (program.upper, loaded.upper)):
        exact(made)
        assert made.image == read.image
        one, other = (routed(each.steps[0].operations) for each in (made, read))
        for name in PRODUCTS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert made.steps[0].grids.keys() == read.steps[0].grids.keys()


def test_a_file_holds_nested_weights_once(tmp_path):
    """Factors and gates, too: 4 bits more cost little but instructions and scales."""
    program = state_of(gated_model(13, width=64, hidden=96), nested=True).program
    sizes = {}
    for name, each in {"both": program, "upper": program.upper}.items():
        each.save(tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
    upper, program.upper = program.upper, None
    program.save(tmp_path / "whole")
    assert sizes["both"] < (tmp_path / "whole").stat().st_size + 0.3 * sizes["upper"]
    assert len(upper.image) < len(program.image)


def test_grids_stand_for_the_float_model_at_both_widths():
    """One expert, so that nothing but rounding differs. An int8 tensor of normal values has a noise of
    -35 dB or so; a few of them, and weights of 8 or 4 bits (-40 and -20 dB), add up."""
    model = gated_model(14, experts=1, chosen=1)
    program = state_of(model, nested=True).program
    followed(model, program, 24)
    followed(model, program.upper, 16)
    followed(model, state_of(model, expert_bits=4).program, 16)


def layer_of(model) -> ExpertLayer:
    """The model's experts while their bits are open."""
    part, = partition(model, WITH).steps
    layer, = quantise(part.nodes, part.inputs, part.outputs,
                      calibrate(model, {"image": images(48)})).layers
    return layer


def lost(layer: ExpertLayer, made: q.Experts, expert: int) -> float:
    """`ExpertLayer.error` from the operation alone: real rows, rounded, through gate, factor, result."""
    def scaled(values, weight, affine, size):
        part = affine.part(expert)
        sums = values.astype(np.int64) @ weight[expert].astype(np.int64).T + part.bias
        return numerics.requantise(sums, part.multiplier.astype(np.int64), part.shift, size)

    rows, weight = (array[::-(-len(array) // MEASURED_ROWS)] for array in layer.rows[expert])
    w1, b1, w2, b2, w3, b3 = (array[expert].astype(np.float64) for array in layer.constants)
    value = rows @ w1.T + b1
    exact = (value / (1 + np.exp(-value)) * (rows @ w3.T + b3)) @ w2.T + b2
    gain = np.where(layer.source.gain, layer.source.gain, np.inf)
    entering = np.rint((rows - layer.source.shift) / gain / layer.source.step).clip(-128, 127)
    gate = made.table[scaled(entering, made.gate, made.gate_affine, 8) & 255]
    product = numerics.product(gate, scaled(entering, made.up, made.up_affine, 16))
    found = scaled(product, made.down, made.down_affine, 16) * layer.stream_step
    return (np.square(found - exact).sum(-1) * weight).mean()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_error_that_bits_are_priced_by_is_that_of_the_integers(bits):
    layer = layer_of(gated_model(15, width=13, hidden=11))
    experts = range(len(layer.tokens))
    made = layer.operation([bits] * len(experts))
    for expert in experts:
        # It computes the float expert in float32: 1e-6 of values whose error is 1e-2 or more of them.
        assert layer.error(expert, bits) == pytest.approx(lost(layer, made, expert), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 2])
def test_narrow_weights_know_what_they_meet(bits):
    """They lose less than weights that were made for inputs without any relations."""
    layer = layer_of(gated_model(16, width=24, hidden=32))
    draw, experts = np.random.default_rng(0), range(len(layer.tokens))
    unrelated = [(draw.normal(size=rows.shape).astype(np.float32), weight)
                 for rows, weight in layer.rows]
    made, blind = (each.operation([bits] * len(experts))
                   for each in (layer, dataclasses.replace(layer, rows=unrelated)))
    for expert in experts:
        assert lost(layer, made, expert) < 0.8 * lost(layer, blind, expert)
