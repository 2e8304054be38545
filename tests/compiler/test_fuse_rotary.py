"""Rotary embeddings become Rotary, and attention takes their order of channels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of

CASES = Path(__file__).parent / "cases"
TOKENS, FEATURES, HEADS, KEYS, DIM = 5, 12, 4, 2, 8
PLAIN = "Linear Linear Linear Rotary Rotary Attention Linear"


def angles(tokens, length, first=0):
    rates = 1.0 / 100 ** (torch.arange(0, length, 2) / length)
    return torch.outer(torch.arange(first, first + tokens).float(), rates)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def half(x, length=DIM, first=0, scale=1.0):
    """Hugging Face: pairs (c, c + length/2); channels beyond ``length`` pass."""
    angle = torch.cat([angles(x.shape[-2], length, first)] * 2, -1)
    turned = x[..., :length] * angle.cos() * scale + rotate_half(x[..., :length]) * angle.sin() * scale
    return torch.cat([turned, x[..., length:]], -1) if length < x.shape[-1] else turned


def chunks(x):
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles(x.shape[-2], DIM).cos(), angles(x.shape[-2], DIM).sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def every_two(x, length=DIM):
    """GPT-J: pairs of neighbours, by strided slices."""
    angle = torch.stack([angles(x.shape[-2], length)] * 2, -1).flatten(-2)
    turning = x[..., :length]
    swapped = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    turned = turning * angle.cos() + swapped * angle.sin()
    return torch.cat([turned, x[..., length:]], -1) if length < x.shape[-1] else turned


def complex_pairs(x):
    """Llama: neighbours as complex numbers."""
    turn = torch.polar(torch.ones(x.shape[-2], DIM // 2), angles(x.shape[-2], DIM))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def real_pairs(x):
    """Complex numbers written out."""
    cos, sin = angles(x.shape[-2], DIM).cos(), angles(x.shape[-2], DIM).sin()
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    parts = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return torch.stack(parts, -1).flatten(-2)


def sorted_pairs(x):
    """DeepSeek: neighbours in, halves out."""
    return half(x.view(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(x.shape))


FORMS = {
    "halves": half,
    "chunks": chunks,
    "neighbours": every_two,
    "written-out complex": real_pairs,
    "neighbours to halves": sorted_pairs,
    "part of a head": lambda x: half(x, 4),
    "part of a head, neighbours": lambda x: every_two(x, 4),
    "from another position": lambda x: half(x, first=3),
    "backwards": lambda x: half(x, first=-7),
    "all tokens but two": lambda x: torch.cat([x[..., :2, :], half(x[..., 2:, :])], -2),
    "scaled": lambda x: half(x, scale=1.25),
}


def heads_of(x):
    return torch.arange(x.shape[1]).float()[:, None, None]


class Attention(nn.Module):
    """Grouped-query attention; ``norm``: "", "head", "row" (before) or "after" the rotation."""

    def __init__(self, rotate, norm=""):
        super().__init__()
        self.rotate, self.norm = rotate, norm
        self.q, self.k, self.v = (nn.Linear(FEATURES, n * DIM) for n in (HEADS, KEYS, KEYS))
        self.o = nn.Linear(HEADS * DIM, FEATURES)
        row = norm == "row"
        self.gq = nn.Parameter(torch.randn(HEADS * DIM if row else DIM))
        self.gk = nn.Parameter(torch.randn(KEYS * DIM if row else DIM))

    def heads(self, x, gamma):
        if self.norm == "row":
            x = rms(x) * gamma
        x = x.view(*x.shape[:2], -1, DIM)
        if self.norm == "head":
            x = rms(x) * gamma
        x = self.rotate(x.transpose(1, 2))
        return rms(x) * gamma if self.norm == "after" else x

    def forward(self, x):
        q, k = self.heads(self.q(x), self.gq), self.heads(self.k(x), self.gk)
        v = self.v(x).view(*x.shape[:2], KEYS, DIM).transpose(1, 2)
        k, v = (each.repeat_interleave(HEADS // KEYS, dim=1) for each in (k, v))
        y = (q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def write(tmp_path, model, opset=17, dynamo=False, tokens=TOKENS):
    return export_module(model, (torch.ones(1, tokens, FEATURES),), tmp_path / "m.onnx", opset, dynamo)


def fused(tmp_path, operators, *args, **options):
    torch.manual_seed(4)
    model = check(write(tmp_path, Attention(*args), **options), seeds=(1, 2), frames=1)
    assert sorted(operators_of(model)) == sorted(operators.split())
    return model


@pytest.mark.parametrize("form", FORMS)
def test_form(tmp_path, form):
    model = fused(tmp_path, PLAIN, FORMS[form])
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    assert attention.attributes["kv_heads"].value == KEYS
    scale = DIM**-0.5 * (1.25**2 if form == "scaled" else 1)
    assert abs(attention.attributes["scale"].value - scale) < 1e-6
    for node in model.graph:
        if node.op_type == "Rotary":
            cos, sin = (value.const_value.numpy() for value in node.inputs[1:])
            assert np.abs(np.hypot(cos, sin) - 1).max() < 1e-6


@pytest.mark.parametrize("form", ["halves", "neighbours", "complex", "part of a head"])
def test_form_of_dynamo(tmp_path, form):
    fused(tmp_path, PLAIN, FORMS.get(form, complex_pairs), dynamo=True, opset=20)


@pytest.mark.parametrize("form", ["halves", "neighbours", "part of a head"])
@pytest.mark.parametrize("norm", ["head", "row", "after"])
def test_behind_or_before_a_norm(tmp_path, form, norm):
    model = fused(tmp_path, PLAIN + " RMSNorm RMSNorm", FORMS[form], norm)
    norms = [node.attributes["groups"].value for node in model.graph if node.op_type == "RMSNorm"]
    assert norms == ([1, 1] if norm == "row" else [HEADS, KEYS])


@pytest.mark.parametrize("form", ["halves", "neighbours"])
def test_one_token(tmp_path, form):
    torch.manual_seed(4)
    model = check(write(tmp_path, Attention(FORMS[form]), tokens=1), seeds=(1, 2), frames=1)
    assert "Attention" in operators_of(model)


@pytest.mark.parametrize("case", ["rows", "heads", "neighbours", "part", "contrib", "contrib_offset"])
def test_operator(case):
    model = check(CASES / f"rotary_{case}.onnxtxt", seeds=(1, 2), frames=1)
    operators = operators_of(model)
    assert "Rotary" in operators and "plain RotaryEmbedding" not in operators


@pytest.mark.parametrize("turn", [
    lambda x: x * angles(TOKENS, 2 * DIM).cos() + rotate_half(x).abs() * angles(TOKENS, 2 * DIM).sin(),
    lambda x: x * angles(TOKENS, 2 * DIM).cos() + rotate_half(x) * angles(TOKENS, 2 * DIM).sin(),
    lambda x: x * heads_of(x).cos() + rotate_half(x) * heads_of(x).sin(),
    lambda x: torch.cat([x[..., :4], x[..., :4]], -1),
], ids=["absolute value", "angles that differ in a pair", "angles that differ by head", "repeated"])
def test_other_sums_stay_plain(tmp_path, turn):
    torch.manual_seed(4)
    model = check(write(tmp_path, Attention(turn)), seeds=(1, 2), frames=1)
    assert "Rotary" not in operators_of(model)
