"""Gated feed-forward networks become Linear, Pointwise and Multiply."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of

CASES = Path(__file__).parent / "cases"
TOKENS, FEATURES, HIDDEN = 3, 10, 6
GATED = "LayerNorm Linear Pointwise Linear Multiply Linear Add"

# Name: (how the products g and u meet, how they are projected, function).
FORMS = {
    "silu": (lambda g, u: F.silu(g) * u, "two", "silu"),
    "up first": (lambda g, u: u * F.silu(g), "two", "silu"),
    "sigmoid written out": (lambda g, u: g * torch.sigmoid(g) * u, "two", "silu"),
    "gelu": (lambda g, u: F.gelu(g) * u, "two", "gelu"),
    "gelu tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "two", "gelu_tanh"),
    "relu": (lambda g, u: F.relu(g) * u, "two", "relu"),
    "glu": (lambda g, u: u * torch.sigmoid(g), "chunk", "sigmoid"),
    "packed": (lambda g, u: F.silu(g) * u, "chunk", "silu"),
    "packed, up first": (lambda u, g: F.silu(g) * u, "chunk", "silu"),
    "packed by view": (lambda g, u: F.silu(g) * u, "view", "silu"),
    "packed in turns": (lambda g, u: F.silu(g) * u, "turns", "silu"),
}


class Gated(nn.Module):
    def __init__(self, meet, projection, bias=True):
        super().__init__()
        self.meet, self.projection = meet, projection
        self.norm = nn.LayerNorm(FEATURES)
        self.both = nn.Linear(FEATURES, 2 * HIDDEN, bias)
        self.gate, self.up = (nn.Linear(FEATURES, HIDDEN, bias) for _ in range(2))
        self.down = nn.Linear(HIDDEN, FEATURES, bias)

    def forward(self, x):
        y = self.norm(x)
        if self.projection == "two":
            g, u = self.gate(y), self.up(y)
        elif self.projection == "chunk":
            g, u = self.both(y).chunk(2, dim=-1)
        elif self.projection == "view":
            g, u = self.both(y).view(*y.shape[:-1], 2, HIDDEN).unbind(-2)
        else:
            g, u = self.both(y)[..., ::2], self.both(y)[..., 1::2]
        return x + self.down(self.meet(g, u))


def write(tmp_path, form, opset, dynamo, bias=True):
    torch.manual_seed(3)
    meet, projection, function = FORMS[form]
    path = export_module(Gated(meet, projection, bias), (torch.ones(1, TOKENS, FEATURES),),
                         tmp_path / "m.onnx", opset, dynamo)
    return path, function


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset,dynamo", [(17, False), (20, True)])
def test_form(tmp_path, form, opset, dynamo):
    path, function = write(tmp_path, form, opset, dynamo, bias=form != "silu")
    model = check(path, seeds=(1, 2), frames=1)
    assert sorted(operators_of(model)) == sorted(GATED.split())
    (pointwise,) = [node for node in model.graph if node.op_type == "Pointwise"]
    assert pointwise.attributes["function"].value == function


def test_packed_weights_are_cut_by_columns(tmp_path):
    path, _ = write(tmp_path, "packed in turns", 17, False)
    model = check(path, frames=1)
    shapes = [node.inputs[1].shape for node in model.graph if node.op_type == "Linear"]
    assert shapes == [(HIDDEN, FEATURES), (HIDDEN, FEATURES), (FEATURES, HIDDEN)]


def test_product_with_one_number_per_token_stays_plain(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, FEATURES)

        def forward(self, x):
            return torch.sigmoid(self.gate(x)) * self.up(x)

    path = export_module(Scaled(), (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx", 17, False)
    operators = [node.op_type for node in check(path, frames=1).graph]
    assert "Mul" in operators and "Multiply" not in operators


def test_swish_operator():
    check(CASES / "gated_swish.onnxtxt", ["Linear", "Pointwise", "Linear", "Multiply", "Linear"], frames=1)
