"""Norms, in every form that exporters write, become RMSNorm and LayerNorm."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of

CASES = Path(__file__).parent / "cases"
TOKENS, FEATURES, HEADS = 3, 12, 2
EPSILON = 1e-3  # large enough that a wrong place for it shows

FORMS = {
    "rsqrt": lambda x, g, e: g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)),
    "division": lambda x, g, e: x / torch.sqrt((x * x).mean(-1, keepdim=True) + e) * g,
    "gamma first": lambda x, g, e: (x * g) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e),
    "gamma on the root": lambda x, g, e: x * (torch.rsqrt((x * x).mean(-1, keepdim=True) + e) * g),
    "power": lambda x, g, e: x * (x.pow(2).mean(-1, keepdim=True) + e) ** -0.5 * g,
    "power of a half": lambda x, g, e: x / (x.pow(2).mean(-1, keepdim=True) + e) ** 0.5 * g,
    "reciprocal": lambda x, g, e: x * (1 / (x.pow(2).mean(-1, keepdim=True) + e).sqrt()) * g,
    "sum": lambda x, g, e: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + e) * g,
    "in double": lambda x, g, e: (
        g * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + e)).float()),
    "one more than gamma": lambda x, g, e: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * (1 + g)),
}


class Norm(nn.Module):
    """``form`` over rows, or over each head where ``layout`` says how heads lie."""

    def __init__(self, form, layout="rows", features=FEATURES):
        super().__init__()
        self.form, self.layout = form, layout
        length = features if layout == "rows" else features // HEADS
        self.gamma = nn.Parameter(torch.randn(length, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        b, n, d = x.shape
        if self.layout == "rows":
            return self.form(x, self.gamma, EPSILON)
        x = x.view(b, n, HEADS, -1)
        if self.layout == "tokens first":
            return self.form(x, self.gamma, EPSILON).flatten(2)
        x = self.form(x.transpose(1, 2), self.gamma, EPSILON)
        return x.transpose(1, 2).reshape(b, n, d)


def write(tmp_path, model, opset=17, dynamo=False):
    return export_module(model, (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx", opset, dynamo)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["rows", "tokens first", "heads first"])
def test_primitive_form(tmp_path, form, layout):
    model = check(write(tmp_path, Norm(FORMS[form], layout)), ["RMSNorm"], seeds=(1, 2), frames=1)
    (node,) = model.graph
    assert node.attributes["groups"].value == (1 if layout == "rows" else HEADS)
    assert abs(node.attributes["epsilon"].value - EPSILON) < 1e-9


@pytest.mark.parametrize("opset", [18, 23, 24])
@pytest.mark.parametrize("layout", ["rows", "tokens first", "heads first"])
def test_operator_of_torch(tmp_path, opset, layout):
    def form(x, gamma, epsilon):
        return nn.functional.rms_norm(x, gamma.shape, gamma, epsilon)

    check(write(tmp_path, Norm(form, layout), opset, dynamo=True), ["RMSNorm"], frames=1)


@pytest.mark.parametrize("epsilon,dynamo", [(0.0, False), (1e-8, True)])
def test_without_epsilon(tmp_path, epsilon, dynamo):
    """The newer exporter takes small ones for 0 and drops them."""
    norm = Norm(lambda x, g, e: FORMS["rsqrt"](x, g, epsilon))
    check(write(tmp_path, norm, 20 if dynamo else 17, dynamo), ["RMSNorm"], frames=1)


@pytest.mark.parametrize("form", [
    lambda x, g, e: FORMS["rsqrt"](x, g, e).clamp(-3.4 * float(g.abs().max()), 1e6),
    lambda x, g, e: FORMS["rsqrt"](x, g, e).clamp(min=-3.4 * float(g.abs().max())),
    lambda x, g, e: FORMS["rsqrt"](x.clamp(-50, 50), g, e),
    lambda x, g, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e).clamp(max=20) * g,
    lambda x, g, e: nn.functional.normalize(x, dim=-1).mul(5).clamp(min=-4.5) * g,
], ids=["both ends", "below", "input", "small rows", "length"])
def test_bounds_that_usual_rows_do_not_reach_stay(tmp_path, form):
    """Of 12 features none is more than 3.46 root mean squares."""
    model = fuse(load(write(tmp_path, Norm(form))))
    assert any(name in ("plain Clip", "plain Min", "plain Max") for name in operators_of(model))


def test_without_gamma(tmp_path):
    form = FORMS["rsqrt"]
    check(write(tmp_path, Norm(lambda x, g, e: form(x, 1.0, e))), ["RMSNorm"], frames=1)


def test_a_constant_added_behind_is_not_lost(tmp_path):
    form = FORMS["rsqrt"]
    model = check(write(tmp_path, Norm(lambda x, g, e: form(x, g, e) + g.flip(0))), frames=1)
    assert operators_of(model) == ["RMSNorm", "AddConstant"]


@pytest.mark.parametrize("form", [
    lambda x, g, e: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + e) * g,
    lambda x, g, e: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + e) * g,
    lambda x, g, e: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + e) * g,
    lambda x, g, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * g[:TOKENS, None],
    lambda x, g, e: nn.functional.normalize(x, dim=-1, eps=e) * g,
    lambda x, g, e: nn.functional.normalize(x, dim=1) * g,
], ids=["epsilon beside the root", "over tokens", "of cubes", "gamma of tokens", "least length",
        "length of columns"])
def test_other_norms_stay_plain(tmp_path, form):
    model = check(write(tmp_path, Norm(form)), frames=1)
    assert all(node.op_type != "RMSNorm" or (node.inputs[1].const_value.numpy() == 1).all()
               for node in model.graph)


LENGTHS = {
    "normalize": lambda x, g, e: nn.functional.normalize(x, dim=-1) * x.shape[-1]**0.5 * g,
    "one more than gamma": lambda x, g, e: nn.functional.normalize(x, dim=-1) * 3 * (g + 1),
    "division": lambda x, g, e: x / x.norm(dim=-1, keepdim=True) * g,
    "without gamma": lambda x, g, e: nn.functional.normalize(x, dim=-1),
}


@pytest.mark.parametrize("layout,opset,dynamo", [
    ("rows", 17, False), ("tokens first", 23, True), ("heads first", 17, False)])
@pytest.mark.parametrize("form", LENGTHS)
def test_division_by_the_length(tmp_path, form, layout, opset, dynamo):
    path = write(tmp_path, Norm(LENGTHS[form], layout), opset, dynamo)
    check(path, ["RMSNorm"], seeds=(1, 2), frames=1)


@pytest.mark.parametrize("layout,shape", [("tokens first", (HEADS, -1)), ("heads first", (HEADS, 1, -1))])
def test_gamma_of_each_head(tmp_path, layout, shape):
    gamma = torch.linspace(-1, 2, FEATURES).view(shape)
    path = write(tmp_path, Norm(lambda x, g, e: nn.functional.normalize(x, dim=-1) * gamma, layout))
    check(path, ["RMSNorm"], seeds=(1, 2), frames=1)


@pytest.mark.parametrize("form", [
    lambda x, g, e: nn.functional.normalize(x, dim=1), lambda x, g, e: nn.functional.normalize(x, 1.0, -1),
    lambda x, g, e: nn.functional.normalize(x, dim=-1, eps=0.1),
    lambda x, g, e: x / x.norm(dim=-1, keepdim=True).clamp(1e-12, 100.0),
], ids=["over tokens", "of magnitudes", "bounded below", "bounded above"])
def test_other_lengths_stay_plain(tmp_path, form):
    assert "RMSNorm" not in operators_of(check(write(tmp_path, Norm(form)), frames=1))


def test_layer_norm_is_not_taken_for_one(tmp_path):
    def form(x, gamma, epsilon):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon) * gamma

    check(write(tmp_path, Norm(form)), ["LayerNorm"], frames=1)


@pytest.mark.parametrize("case", ["simplified_norm", "simplified_norm_18"])
def test_operator_of_onnx_runtime(case):
    model = check(CASES / f"{case}.onnxtxt", seeds=(1, 2), frames=1)
    assert operators_of(model).count("RMSNorm") == 1


def by_moments(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean * mean + EPSILON).sqrt()


LAYER_FORMS = {
    "deviation": lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPSILON),
    "variance": lambda x: (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, unbiased=False) + EPSILON).sqrt(),
    "moments": by_moments,
    "operator": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPSILON),
}


class LayerNorm(nn.Module):
    def __init__(self, form, affine):
        super().__init__()
        self.form, self.affine = form, affine
        self.gamma, self.beta = (nn.Parameter(torch.randn(FEATURES)) for _ in range(2))

    def forward(self, x):
        y = self.form(x)
        return {"gamma and beta": y * self.gamma + self.beta, "gamma": self.gamma * y, "": y}[self.affine]


@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize("affine", ["gamma and beta", "gamma", ""])
@pytest.mark.parametrize("opset,dynamo", [(17, False), (20, True), (23, True)])
def test_layer_norm(tmp_path, form, affine, opset, dynamo):
    torch.manual_seed(1)
    path = write(tmp_path, LayerNorm(LAYER_FORMS[form], affine), opset, dynamo)
    check(path, ["LayerNorm"], seeds=(1, 2), frames=1)
