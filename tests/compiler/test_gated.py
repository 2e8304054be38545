"""Gated linear units from the canonical graph to a program."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from moeware.compiler.canonical import attributes
from moeware.compiler.errors import CompileError
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import STAGES, State, compile_model, model_ports
from moeware.compiler.placement import describe, report
from moeware.compiler.reference import evaluate as in_float
from moeware.compiler.verify import verify_quantised
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.dram import SDRAM_16BIT
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

from ..hw.arch.configs import CONFIGS
from ..runtime.reference import evaluate
from ..sim.test_rtl import shaped
from .canonical_models import CHANNELS, SIDE, Canonical, gated_model

WITH = dataclasses.replace(CONFIGS[0], products=1)
# Of the logits' spread: three values of int8 make a product, each rounded to 1/2 in about 50; and where
# experts are chosen, a few tokens go to another one that is about as good.
NOISE, CHOSEN_NOISE = 0.05, 0.12


def images(frames: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, CHANNELS, SIDE, SIDE)).astype(np.float32)


def state_of(model, config=WITH, frames=48, **options) -> State:
    """The model after all stages."""
    state = State(Path("gated.onnx"), config, {"image": images(frames)}, models=[model], **options)
    state.inputs, state.outputs = model_ports(model)
    for name, stage in itertools.dropwhile(lambda item: item[0] != "partition", STAGES.items()):
        stage(state)
    return state


def compiled(model, config=WITH, **options):
    return state_of(model, config, **options).program


@pytest.mark.parametrize("config", [None, WITH])
@pytest.mark.parametrize("options", [{}, {"swapped": True}, {"function": None},
                                     {"function": "gelu", "experts": 1, "chosen": 1}])
def test_gated_units_run_on_the_accelerator(config, options):
    model = gated_model(**options)
    count = len(model.graph)
    assert describe(partition(model, config)) == f"fpga {count}/{count} nodes, 100.0 % of MACs"


def test_without_gateware_they_run_on_the_host_and_say_why():
    parts = partition(gated_model(), CONFIGS[0])
    reasons = {node.op_type: parts.reasons.get(node.name) for step in parts.steps
               for node in step.nodes}
    for operator in ("Multiply", "GatedExperts"):
        assert f"{operator} needs gateware that this configuration does not have; use one with " \
            "Config.products = 1" in str(reasons[operator])
    assert "(GatedExperts needs gateware" in describe(parts)
    assert reasons["PatchEmbed"] is None and reasons["Linear"] is None
    assert report(parts)["fpga_mac_share"] > 0


def block(change):
    """A model whose one block has what `change` of (builder, normalised) returns as its branch."""
    made = Canonical(3)
    x = made.start(8)
    branch = change(made, made.norm(x))
    return made.model(made.residual(x, branch))


def of_one_linear(made, y):
    gate = made.linear(y, 6)
    return made.linear(made.multiply(made.pointwise(gate, "sigmoid"), gate), 8)


def of_itself(made, y):
    gate = made.linear(y, 6)
    return made.linear(made.multiply(gate, gate), 8)


def of_two_sources(made, y):
    return made.linear(made.multiply(made.pointwise(made.linear(y, 6), "silu"),
                                     made.linear(made.pointwise(made.linear(y, 8), "relu"), 6)), 8)


def of_two_functions(made, y):
    return made.linear(made.multiply(made.pointwise(made.linear(y, 6), "silu"),
                                     made.pointwise(made.linear(y, 6), "tanh")), 8)


def of_a_product(made, y):
    return made.linear(made.multiply(made.multiply(made.linear(y, 6), made.linear(y, 6)),
                                     made.linear(y, 6)), 8)


def of_the_norm(made, y):
    return made.linear(made.multiply(y, made.linear(y, 8)), 8)


def read_twice(made, y):
    factor = made.linear(y, 8)
    product = made.linear(made.multiply(made.pointwise(made.linear(y, 8), "silu"), factor), 8)
    return made.add("Attention", [product, factor, made.linear(y, 8)], (1, 4, 8), heads=2,
                    kv_heads=2, scale=0.5, causal=0)


@pytest.mark.parametrize("change, reason", [
    (of_one_linear, "two Linears without other readers; repeat the Linear"),
    (of_itself, "two Linears without other readers; repeat the Linear"),
    (read_twice, "two Linears without other readers; repeat the Linear"),
    (of_two_sources, "Linears of one value; write a gated linear unit"),
    (of_two_functions, "Multiply of function and function is not a supported form"),
    (of_a_product, "Multiply of a product value is not a supported form, it reads linear or function"),
    (of_the_norm, "Multiply of a norm value is not a supported form"),
])
def test_other_products_run_on_the_host(change, reason):
    model = block(change)
    parts = partition(model)
    assert any(reason in str(each) for each in parts.reasons.values())
    program = compiled(model)  # and the rest compiles
    assert "host" in program.placement


@pytest.mark.parametrize("options", [
    {}, {"function": "gelu_tanh", "swapped": True}, {"function": None, "hidden": 8},
    {"experts": 1, "chosen": 1, "width": 7}, {"function": "sigmoid", "experts": 16, "chosen": 1}])
@pytest.mark.parametrize("seed", [0, 1])
def test_integers_follow_the_float_model(options, seed):
    model = gated_model(seed, **options)
    program = compiled(model)
    step, = program.steps
    port, = step.inputs
    feeds = images(24, seed=9)
    integers = {port.tensor: port.quantise(feeds)}
    expected = evaluate(step.operations, integers)
    for device in (GoldenDevice(), TorchDevice()):
        found = device.run(program, step, integers)
        for output in step.outputs:
            np.testing.assert_array_equal(found[output.tensor], expected[output.tensor])
    output, = step.outputs
    real, = in_float(model, {"image": feeds}).values()
    wrong = output.dequantise(expected[output.tensor]) - real
    noise = NOISE if options.get("experts") == 1 else CHOSEN_NOISE
    assert np.sqrt(np.square(wrong).mean()) < noise * real.std()
    pooling = sum(2 * math.prod(node.inputs[0].shape) for node in model.graph
                  if node.op_type == "MeanTokens")  # by the attention unit
    assert step.macs == program.metadata["partition"]["macs"] + pooling


def test_every_layer_of_a_traced_program():
    for config in CONFIGS:
        program = compiled(gated_model(2), dataclasses.replace(config, products=1), trace=True,
                           bits={"experts": 4})
        step, = program.steps
        integers = {step.inputs[0].tensor: step.inputs[0].quantise(images(3))}
        expected = evaluate(step.operations, integers)
        found = GoldenDevice().run(program, step, integers, probes=True)
        assert len(found) == len(step.operations) - 1  # all but the route
        for tensor, values in found.items():
            np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


def test_gateware_equals_golden_equals_pytorch():
    """Frames back to back, memory that stalls, all tokens on two of the experts."""
    config, model = shaped("odd words"), gated_model(7, width=13, hidden=11, experts=5)
    route = next(node for node in model.graph if node.op_type == "Route")
    bias = route.inputs[2].const_value.numpy().copy()
    bias[[1, 4]] += 100
    route.inputs[2].const_value = type(route.inputs[2].const_value)(bias)
    program = compiled(model, config, trace=True)
    step, = program.steps
    devices = {"golden": GoldenDevice(), "PyTorch": TorchDevice(),
               "RTL": RtlDevice(config, fast=False, dram=SDRAM_16BIT, stall_seed=3)}
    found = compare(program, step, devices, {step.inputs[0].tensor: step.inputs[0].quantise(images(3))})
    assert found.equal, str(found)
    assert {tensor for _, tensor, *_ in found.tensors} == {probe.tensor for probe in step.probes}


def quantised(model) -> list[q.Operation]:
    step, = state_of(model).quantised
    verify_quantised(step)
    return step.operations


def test_factors_fit_16_bits_and_products_use_8():
    """Whatever the scales of gate, factor and what follows: these are free."""
    for loud in (1.0, 1e-3, 300.0):
        model = gated_model(4)
        multiply = next(node for node in model.graph if node.op_type == "Multiply")
        factor = multiply.inputs[1].producer()
        for place in (1, 2):
            array = factor.inputs[place].const_value.numpy() * np.float32(loud)
            array[3] *= 40  # a channel far above the others
            factor.inputs[place].const_value = type(factor.inputs[place].const_value)(array)
        operations = quantised(model)
        gated = next(op for op in operations if isinstance(op, q.Linear) and op.gate is not None)
        step, = compiled(model).steps
        integers = {step.inputs[0].tensor: step.inputs[0].quantise(images(48))}
        values = evaluate(step.operations, integers)
        source = values[gated.source].reshape(-1, gated.weight.shape[1])
        factors = numerics.requantise(source @ gated.weight.astype(np.int64).T
                                      + gated.affine.bias, gated.affine.multiplier.astype(np.int64),
                                      gated.affine.shift.astype(np.int64), 16)
        assert abs(factors).max() < 32767
        products = abs(values[gated.output]).max((0, 1))
        # The weights that follow take half of the ratio of 40 upon them.
        assert np.median(products) > 127 / 40 ** 0.5 / 2 and products.max() > 100


def test_experts_without_calibration_tokens_still_compile():
    model = gated_model(5, experts=8, chosen=1)
    route = next(node for node in model.graph if node.op_type == "Route")
    bias = route.inputs[2].const_value.numpy().copy()
    bias[2:] -= 100
    route.inputs[2].const_value = type(route.inputs[2].const_value)(bias)
    program = compiled(model)
    assert any("expert7: 0 tokens" in line for line in program.metadata["starved_experts"])


def test_a_dump_of_other_gateware_is_not_resumed(tmp_path):
    from .models import MODELS
    from .test_models import export
    example = MODELS["timm"]()
    path, samples = export(example, tmp_path / "m.onnx"), {"image": example.images(4, 0)}
    compile_model(path, CONFIGS[0], samples, dump=tmp_path / "dump", stop="quantise")
    with pytest.raises(CompileError, match="configuration with products = 1, not 0: start at part"):
        compile_model(path, WITH, samples, dump=tmp_path / "dump", start="tile")
    assert compile_model(path, WITH, samples, dump=tmp_path / "dump", start="partition")


def test_gates_and_factors_have_the_precision_that_was_asked_for():
    model = gated_model(6)
    multiply = next(node for node in model.graph if node.op_type == "Multiply")
    name = multiply.inputs[1].producer().name
    experts = next(node for node in model.graph if node.op_type == "GatedExperts")
    assert attributes(experts)["function"] == "silu"
    state = state_of(model, bits={name: 4, f"{experts.name}/expert1": 2})
    step, = state.quantised
    dense = next(op for op in step.operations if isinstance(op, q.Linear) and op.gate is not None)
    assert dense.bits == 4 and abs(dense.weight).max() == abs(dense.gate).max() == 7
    routed = next(op for op in step.operations if isinstance(op, q.Experts))
    assert routed.bits.tolist() == [8, 2, 8, 8]
    for weights in (routed.gate, routed.up, routed.down):
        assert abs(weights[1]).max() == 1 and abs(weights[0]).max() == 127
