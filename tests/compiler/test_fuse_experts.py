"""Gated experts, in every form that mixtures are written in, become Route and GatedExperts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeware.compiler.canonical import sources
from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of

TOKENS, FEATURES, HIDDEN, EXPERTS, CHOSEN = 4, 8, 6, 5, 2


class Mixture(nn.Module):
    """x plus a mixture of gated experts of its norm.

    layout: how the gate g and the factor u lie: "two" weights, or "halves" or "turns" of one;
    meet: how they meet; scale: of the chosen weights; normalise: "chosen" or "all".
    """

    def __init__(self, form, layout="two", meet=None, *, scale=1.0, normalise="chosen", bias=True,
                 experts=EXPERTS, chosen=CHOSEN, hidden=HIDDEN):
        super().__init__()
        self.form, self.layout, self.scale, self.normalise = form, layout, scale, normalise
        self.meet = meet or (lambda g, u: F.silu(g) * u)
        self.experts, self.chosen, self.hidden = experts, chosen, hidden
        self.norm, self.gate = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, experts, bias=False)

        def weight(*shape):
            return nn.Parameter(torch.randn(experts, *shape) * 0.4)

        first = 2 * hidden if layout != "two" else hidden
        self.wg, self.bg = weight(first, FEATURES), weight(first) if bias else 0
        self.wu, self.bu = weight(hidden, FEATURES), weight(hidden) if bias else 0
        self.wd, self.bd = weight(FEATURES, hidden), weight(FEATURES) if bias else 0

    def product(self, g, u):
        """g and, with two weights, u: [.., hidden]; otherwise g holds both."""
        if self.layout == "halves":
            g, u = g.chunk(2, dim=-1)
        elif self.layout == "turns":
            g, u = g[..., ::2], g[..., 1::2]
        return self.meet(g, u)

    def forward(self, x):
        rows = self.norm(x).reshape(-1, FEATURES)
        logits = self.gate(rows)
        weights, indices = logits.softmax(-1).topk(self.chosen, -1)
        if self.normalise == "chosen":
            weights = weights / weights.sum(-1, keepdim=True)
        y = getattr(self, f"_{self.form}")(rows, weights * self.scale, indices)
        return x + y.reshape(x.shape)

    def _expert(self, e, rows):
        def bias(b):
            return b[e] if torch.is_tensor(b) else None

        g = F.linear(rows, self.wg[e], bias(self.bg))
        u = F.linear(rows, self.wu[e], bias(self.bu)) if self.layout == "two" else None
        return F.linear(self.product(g, u), self.wd[e], bias(self.bd))

    def _loop(self, rows, weights, indices):
        result = torch.zeros_like(rows)
        for e in range(self.experts):
            factor = (weights * (indices == e)).sum(-1, keepdim=True)
            result = result + factor * self._expert(e, rows)
        return result

    def _where(self, rows, weights, indices):
        result = torch.zeros_like(rows)
        for e in range(self.experts):
            token, slot = torch.where(indices == e)
            value = self._expert(e, rows[token]) * weights[token, slot][:, None]
            result = result.index_add(0, token, value)
        return result

    def _einsum(self, rows, weights, indices):
        dense = torch.zeros(rows.shape[0], self.experts).scatter(1, indices, weights)
        g = torch.einsum("td,efd->tef", rows, self.wg) + self.bg
        u = torch.einsum("td,efd->tef", rows, self.wu) + self.bu if self.layout == "two" else None
        output = torch.einsum("tef,edf->ted", self.product(g, u), self.wd) + self.bd
        return torch.einsum("ted,te->td", output, dense)

    def _gather(self, rows, weights, indices):
        def layer(weight, bias, x):
            y = (weight[indices] @ x[..., None]).squeeze(-1)
            return y + bias[indices] if torch.is_tensor(bias) else y

        x = rows[:, None].expand(-1, self.chosen, -1)
        u = layer(self.wu, self.bu, x) if self.layout == "two" else None
        output = layer(self.wd, self.bd, self.product(layer(self.wg, self.bg, x), u))
        return (output * weights[..., None]).sum(1)

    def _batched(self, rows, weights, indices):
        """Hugging Face's batched_mm, with weights as [in, out]."""
        ids, x = indices.reshape(-1), rows.repeat_interleave(self.chosen, dim=0)[:, None]
        g = torch.bmm(x, self.wg.transpose(1, 2)[ids])[:, 0]
        u = torch.bmm(x, self.wu.transpose(1, 2)[ids])[:, 0] if self.layout == "two" else None
        output = torch.bmm(self.product(g, u)[:, None], self.wd.transpose(1, 2)[ids])[:, 0]
        output = output * weights.reshape(-1, 1)
        return output.reshape(-1, self.chosen, FEATURES).sum(1)


def fused(tmp_path, model, opset=17, dynamo=False):
    path = export_module(model, (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx", opset, dynamo)
    found = check(path, seeds=(1, 2), frames=1)
    assert operators_of(found) == ["LayerNorm", "Route", "GatedExperts", "Add"]
    return {name: entry.value for node in found.graph for name, entry in node.attributes.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(8)


@pytest.mark.parametrize("form", ["loop", "where", "einsum", "gather", "batched"])
@pytest.mark.parametrize("layout", ["two", "halves", "turns"])
def test_form(tmp_path, form, layout):
    found = fused(tmp_path, Mixture(form, layout, bias=form != "batched"))
    assert (found["function"], found["k"], found["normalise"]) == ("silu", CHOSEN, "chosen")


@pytest.mark.parametrize("form,layout", [("loop", "two"), ("batched", "halves"), ("gather", "turns")])
def test_form_of_dynamo(tmp_path, form, layout):
    fused(tmp_path, Mixture(form, layout, bias=form != "batched", normalise="all"), 20, dynamo=True)


@pytest.mark.parametrize("meet,function", [
    (lambda g, u: u * F.silu(g), "silu"), (lambda g, u: F.silu(u) * g, "silu"),
    (lambda g, u: F.gelu(g) * u, "gelu"), (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
    (lambda g, u: torch.sigmoid(u) * g, "sigmoid"),
], ids=["up first", "the other is gated", "gelu", "gelu tanh", "glu"])
@pytest.mark.parametrize("layout", ["two", "halves"])
def test_function_and_order(tmp_path, meet, function, layout):
    assert fused(tmp_path, Mixture("einsum", layout, meet))["function"] == function


@pytest.mark.parametrize("form", ["loop", "batched"])
def test_scale_of_chosen_weights_enters_the_last_layer(tmp_path, form):
    model = Mixture(form, "halves", scale=2.5, bias=form == "loop")
    fused(tmp_path, model)


@pytest.mark.parametrize("form", ["loop", "gather"])
@pytest.mark.parametrize("experts,chosen,hidden", [(1, 1, 6), (2, 1, 6), (2, 2, 6), (5, 5, 6), (4, 2, 8)],
                         ids=["one", "two", "two of two", "all", "square"])
@pytest.mark.parametrize("layout", ["two", "halves"])
def test_counts(tmp_path, form, layout, experts, chosen, hidden):
    fused(tmp_path, Mixture(form, layout, experts=experts, chosen=chosen, hidden=hidden))


class Unequal(Mixture):
    """Experts of one more hidden value each than the one before; of two layers without a gate."""

    def _expert(self, e, rows):
        own = slice(1 + e)
        g = F.linear(rows, self.wg[e, own], self.bg[e, own])
        u = F.linear(rows, self.wu[e, own], self.bu[e, own])
        return F.linear(self.meet(g, u), self.wd[e, :, own], self.bd[e])


@pytest.mark.parametrize("form", ["loop", "where"])
@pytest.mark.parametrize("meet,operator", [(lambda g, u: F.silu(g) * u, "GatedExperts"),
                                           (lambda g, u: torch.sigmoid(g), "Experts")])
def test_experts_of_unequal_size(tmp_path, form, meet, operator):
    path = export_module(Unequal(form, meet=meet, experts=8, hidden=8),
                         (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx", 17, False)
    check(path, ["LayerNorm", "Route", operator, "Add"], seeds=(1, 2), frames=1)


def test_every_expert_is_held_against_its_weights(tmp_path):
    """The last of many experts, which few tokens choose, is not what the canonical form has."""

    class Odd(Mixture):
        def _expert(self, e, rows):
            y = super()._expert(e, rows)
            return y.abs() if e == self.experts - 1 else y

    path = export_module(Odd("loop", experts=16, chosen=1), (torch.ones(1, TOKENS, FEATURES),),
                         tmp_path / "m.onnx", 17, False)
    assert "GatedExperts" not in operators_of(check(path, frames=1))


@pytest.mark.parametrize("change", [
    lambda g, u: F.silu(g * 1.7) * u, lambda g, u: F.silu(g.clamp(max=0.5)) * (u + 1)])
def test_other_products_stay_plain(tmp_path, change):
    path = export_module(Mixture("loop", "two", change), (torch.ones(1, TOKENS, FEATURES),),
                         tmp_path / "m.onnx", 17, False)
    model = check(path, frames=1)
    assert "GatedExperts" not in operators_of(model)
    assert np.isin(["plain TopK"], operators_of(model)).all()


class Shared(nn.Module):
    """x plus a feed-forward network times a sigmoid of ``gate``; ``meet`` as of `Mixture`."""

    def __init__(self, meet, gate):
        super().__init__()
        self.meet, self.gate = meet, gate
        self.norm, self.g = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, HIDDEN)
        self.u, self.d = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)
        self.z = nn.Linear(FEATURES, 1)

    def forward(self, x):
        y = self.norm(x)
        return x + self.gate(self, x, y) * self.d(self.meet(self.g(y), self.u(y)))


def sigmoid(m, x, y):
    return torch.sigmoid(m.z(y))


@pytest.mark.parametrize("meet,operator", [(lambda g, u: F.silu(g) * u, "GatedExperts"),
                                           (lambda g, u: F.gelu(g), "Experts")])
def test_shared_expert_under_a_sigmoid(tmp_path, meet, operator):
    path = export_module(Shared(meet, sigmoid), (torch.ones(1, TOKENS, FEATURES),),
                         tmp_path / "m.onnx", 17, False)
    model = check(path, ["LayerNorm", "Route", operator, "Add"], seeds=(1, 2), frames=1)
    assert all(sources(node) for node in model.graph)


@pytest.mark.parametrize("gate", [
    lambda m, x, y: torch.sigmoid(m.z(x)), lambda m, x, y: torch.tanh(m.z(y)),
    lambda m, x, y: torch.sigmoid(m.z(y)) * 2, lambda m, x, y: torch.sigmoid(m.z(y)[:, :1]),
], ids=["another input", "another function", "twice", "one for all tokens"])
def test_other_gates_of_a_shared_expert_stay_plain(tmp_path, gate):
    path = export_module(Shared(lambda g, u: F.silu(g) * u, gate), (torch.ones(1, TOKENS, FEATURES),),
                         tmp_path / "m.onnx", 17, False)
    assert "Route" not in operators_of(check(path, frames=1))
