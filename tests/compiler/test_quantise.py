"""The identities that are used before anything is rounded, and the grids."""

import numpy as np
import pytest
import torch
from torch import nn

from moeware.compiler.calibrate import Calibration, calibrate
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.quantise import QuantisedStep, quantise
from moeware.compiler.verify import verify_quantised
from moeware.hw.arch import quantised as q
from moeware.hw.arch.numerics import NORM_FRACTION_BITS

from .models import Block, Example, Mlp, Moe, timm
from .test_models import EVEN, export

DIM, EPSILON = 24, 1e-3


class Branch(nn.Module):
    """Patches, one block, and the residual stream itself as the output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        x = self.inner.proj(image).flatten(2).transpose(1, 2) + self.inner.pos_embed
        return self.inner.blocks(x)


def model(mlp=None) -> nn.Module:
    torch.manual_seed(2)
    mlp = mlp or (lambda: Mlp(DIM, 40))
    made = timm(depth=1, token=False, pool="mean", mlp=mlp)
    for module in made.modules():
        if isinstance(module, Block):
            module.norm1.eps = module.norm2.eps = EPSILON
    return made


def quantised(made: nn.Module, path, change=None) -> tuple[QuantisedStep, Calibration]:
    example = Example(made, (3, 8, 8))
    canonical = fuse(load(export(example, path / "model.onnx", change=change)))
    statistics = calibrate(canonical, {"image": example.images(32, 1)})
    part, = partition(canonical).steps
    step = quantise(part.nodes, part.inputs, part.outputs, statistics)
    verify_quantised(step)
    return step, statistics


def one(step: QuantisedStep, kind: type, **wanted):
    found = [op for op in step.operations if isinstance(op, kind)
             and all(getattr(op, name) == value for name, value in wanted.items())]
    assert len(found) == 1
    return found[0]


def factor(affine: q.Affine) -> np.ndarray:
    """Real value of ``multiplier / 2**shift``."""
    return affine.multiplier / np.exp2(affine.shift.astype(float))


def array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().double().numpy()


def loud_biases(made):
    """Biases of keys and values far above everything else."""
    made.inner.blocks[0].attn.qkv.bias.data[DIM:] += 50 * torch.randn(2 * DIM)


def test_key_and_value_biases_are_not_rounded(tmp_path):
    made = Branch(model())
    step, statistics = quantised(made, tmp_path, loud_biases)
    attention = one(step, q.Attention)
    query, key, value = (one(step, q.Linear, output=name) for name in
                         (attention.query, attention.key, attention.value))
    assert query.affine.bias.any()
    assert not key.affine.bias.any() and not value.affine.bias.any()
    # The grids are those of the unbiased tensors: a bias of 50 would leave few steps for the rest.
    size = np.abs(statistics.rows(attention.key) - statistics.rows(attention.key).mean(0)).max()
    block = made.inner.blocks[0]
    weight = array(block.attn.qkv.weight)[DIM:2 * DIM] * array(block.norm1.weight)
    norm = one(step, q.Norm, output=key.source)
    gain = key.weight * factor(norm.affine) * factor(key.affine)[:, None] * (1 << NORM_FRACTION_BITS)
    grid = np.median(weight[np.abs(gain) > 1] / gain[np.abs(gain) > 1])
    assert grid * 127 < 1.5 * size


def test_the_value_bias_reaches_the_projection(tmp_path):
    made = Branch(model())
    step, _ = quantised(made, tmp_path, loud_biases)
    projection = one(step, q.AddLinear, source=one(step, q.Attention).output)
    block = made.inner.blocks[0]
    matrix, bias = array(block.attn.qkv.weight)[2 * DIM:], array(block.attn.qkv.bias)[2 * DIM:]
    constant = matrix @ array(block.norm1.bias) + bias
    expected = array(block.attn.proj.weight) @ constant + array(block.attn.proj.bias)
    found = projection.affine.bias * factor(projection.affine) * step.outputs[0].scale
    np.testing.assert_allclose(found, expected, rtol=2.0**-14, atol=2e-3)
    assert np.abs(expected).max() > 20


def test_scale_and_shift_of_a_normalisation_move_into_the_weights(tmp_path):
    made = model()
    step, _ = quantised(made, tmp_path)
    head = one(step, q.AddLinear, output=step.outputs[0].tensor)
    mean = one(step, q.Attention, query=None)
    norm = one(step, q.Norm, output=mean.value)
    assert not norm.affine.bias.any()
    # From normalised values to the head: integer weights times all scales on the way.
    way = factor(norm.affine) * (1 << NORM_FRACTION_BITS)
    scale = (mean.out_multiplier / 2.0**mean.out_shift) * factor(head.affine) * step.outputs[0].scale
    wanted = array(made.head.weight) * array(made.norm.weight)
    rounding = 0.51 * way * scale[:, None]
    assert (np.abs(head.weight * way * scale[:, None] - wanted) < rounding + 1e-4 * np.abs(wanted)).all()
    bias = head.affine.bias * factor(head.affine) * step.outputs[0].scale
    np.testing.assert_allclose(bias, array(made.head.bias) + array(made.head.weight)
                               @ array(made.norm.bias), atol=1e-3)


def test_loud_channels_share_their_range_with_the_weights(tmp_path):
    """Smoothing: a channel whose weights are 30 times the others gets finer steps."""
    def change(made):
        made.inner.blocks[0].mlp.fc1.weight.data[:, 3] *= 30
    step, _ = quantised(Branch(model()), tmp_path, change)
    table = next(op for op in step.operations if isinstance(op, q.Linear) and op.table is not None)
    scales = factor(one(step, q.Norm, output=table.source).affine)
    assert scales[3] > 3 * np.median(scales)


def experts(made):
    """Experts of very different sizes, and a gate whose rows are too."""
    moe = made.inner.blocks[0].mlp
    for number, expert in enumerate(moe.experts):
        expert.fc1.weight.data *= 4.0**number
        expert.fc2.weight.data *= 4.0**-number
        moe.gate.weight.data[number] *= 4.0**-number


def test_every_expert_and_channel_has_its_own_scale(tmp_path):
    step, _ = quantised(Branch(model(lambda: Moe(DIM, 30, 4, 2))), tmp_path, experts)
    operation = one(step, q.Experts)
    for weight in (operation.up, operation.down):
        assert (np.abs(weight).max(-1) >= 112).all()  # steps may be an eighth coarser
    assert np.ptp(np.log2(factor(operation.up_affine)).mean(-1)) > 4


def test_route_weights_share_one_grid(tmp_path):
    made = Branch(model(lambda: Moe(DIM, 30, 4, 2)))
    step, _ = quantised(made, tmp_path, experts)
    route = one(step, q.Route)
    assert np.abs(route.weight).max() == 127
    norm = one(step, q.Norm, output=route.source)
    block = made.inner.blocks[0]
    wanted = array(block.mlp.gate.weight) * array(block.norm2.weight) / factor(norm.affine)
    wanted *= 127 / np.abs(wanted).max()
    assert np.abs(route.weight - wanted).max() < 0.51


def test_starved_experts_are_in_the_metadata(tmp_path):
    """The gate's first row is the opposite of its second, and expert 0 never wins."""
    def change(made):
        gate, norm = made.blocks[0].mlp.gate.weight.data, made.blocks[0].norm2
        norm.bias.data.fill_(10.0)
        gate[0], gate[1:] = -1.0, gate[1:].abs()
    example = Example(model(lambda: Moe(DIM, 30, 4, 2)), (3, 8, 8))
    path = export(example, tmp_path / "model.onnx", change=change)
    program = compile_model(path, EVEN, {"image": example.images(16, 1)})
    assert "Experts_0/expert0: 0 tokens" in program.metadata["starved_experts"]
    assert "Experts_0/expert1" not in str(program.metadata["starved_experts"])


def test_epsilon_is_in_units_of_the_stream(tmp_path):
    step, _ = quantised(Branch(model()), tmp_path)
    for norm in (op for op in step.operations if isinstance(op, q.Norm)):
        assert norm.epsilon == round(float(np.float32(EPSILON)) * (DIM / step.outputs[0].scale) ** 2)


def test_epsilon_of_a_faint_stream_still_fits(tmp_path):
    def faint(made):
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.data *= 1e-6
    step, _ = quantised(Branch(model()), tmp_path, faint)
    norms = [op.epsilon for op in step.operations if isinstance(op, q.Norm)]
    assert all(1 << 40 < epsilon < 1 << 48 for epsilon in norms)


def test_the_stream_has_headroom(tmp_path):
    step, statistics = quantised(Branch(model()), tmp_path)
    largest = max(np.abs(statistics.rows(op.output)).max() for op in step.operations
                  if isinstance(op, q.AddLinear))
    room = step.outputs[0].scale * 32767 / largest
    assert room == pytest.approx(1.5, rel=0.01)


def test_channels_of_zeros_stay_zero(tmp_path):
    def prune(made):
        block = made.inner.blocks[0]
        block.mlp.fc2.weight.data[5], block.mlp.fc2.bias.data[5] = 0, 0
    step, _ = quantised(Branch(model()), tmp_path, prune)
    last = one(step, q.AddLinear, output=step.outputs[0].tensor)
    assert not last.weight[5].any() and not last.affine.bias[5] and not last.affine.multiplier[5]
