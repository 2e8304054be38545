"""The function of experts is read exactly, and nothing is taken for a mixture that is none."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeware.compiler.fuse import fuse
from moeware.compiler.fuse.moe_proof import TOLERANCE, nearest_form
from moeware.compiler.fuse.moe_samples import sample_rows, sample_scores
from moeware.compiler.fuse.moe_weights import ExpertWeights
from moeware.compiler.fuse.routers import plain_forms
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from tests.compiler import exports
from tests.compiler.exports import Block, Moe, Vit, export, export_module, randomise, vit
from tests.compiler.fused import operators_of
from tests.compiler.test_fuse_experts import FEATURES, Mixture

FORMS = ("loop", "where", "scatter", "onehot", "stack", "shared", "gather", "gather_einsum")
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def mixture(form, function, weight=0.3, bias=0.3):
    """A `Moe` whose first weights and last biases have the given size."""
    mixer = Moe(form, function=nn.GELU(GELU[function]))
    with torch.no_grad():
        mixer.w1.normal_(std=weight)
        mixer.b2.normal_(std=bias)
    return mixer


def model(*mixers):
    """A block for each of ``mixers``, without attention, as an export takes seconds."""
    torch.manual_seed(5)
    blocks = (Block(nn.Identity(), mixer, lambda: nn.LayerNorm(exports.DIM)) for mixer in mixers)
    return randomise(Vit(*blocks))


def functions(path):
    nodes = [node for node in fuse(load(path)).graph if node.op_type == "Experts"]
    return [node.attributes["function"].value for node in nodes]


@pytest.mark.parametrize("function", GELU)
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_gelu_are_told_apart(tmp_path, form, function):
    """Where hidden values are small, where they are large, and beside large biases."""
    sizes = ((0.003, 0.3), (10, 0.3), (0.3, 100))
    mixers = [mixture(form, function, *size) for size in sizes]
    path = export(model(*mixers), tmp_path / "m.onnx", opset=17, dynamo=False)
    assert functions(path) == [function] * len(mixers)


@pytest.mark.parametrize("opset", [18, 20])  # without and with the operator Gelu
def test_both_forms_of_gelu_by_the_newer_exporter(tmp_path, opset):
    """Each function in half of the forms, in the other half at the other opset."""
    wanted = [("gelu", "gelu_tanh")[(number + opset // 20) % 2] for number in range(len(FORMS))]
    mixers = [mixture(form, function) for form, function in zip(FORMS, wanted)]
    assert functions(export(model(*mixers), tmp_path / "m.onnx", opset=opset)) == wanted


class Between(nn.Module):
    """Half way between the two forms of GELU, and so neither."""

    def forward(self, x):
        return (F.gelu(x) + F.gelu(x, approximate="tanh")) / 2


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.6 * x)


class Limited(nn.Module):
    """SiLU up to a limit that ordinary values stay below."""

    def forward(self, x):
        return F.silu(x.clamp(max=50))


@pytest.mark.parametrize("function", [Between(), Swish(), nn.ReLU6(), Limited()],
                         ids=["between", "sigmoid", "relu6", "limited"])
@pytest.mark.parametrize("bias", [0.3, 10])
def test_a_function_that_is_near_stays_plain(tmp_path, function, bias):
    mixer = mixture("loop", "gelu", bias=bias)
    mixer.function = function
    path = export(model(mixer), tmp_path / "m.onnx", opset=17, dynamo=False)
    operators = {node.op_type for node in fuse(load(path)).graph}
    assert "TopK" in operators and not operators & {"Route", "Experts"}


class Bounded(Moe):
    """What is done to the gate's logits, and to the weights of the chosen."""

    def __init__(self, of_logits=lambda x: x, of_weights=lambda x: x):
        super().__init__("loop", "all")
        self.of_logits, self.of_weights = of_logits, of_weights

    def forward(self, x):
        weights, indices = self.of_logits(self.gate(x)).softmax(-1).topk(self.k, -1)
        return self._loop(x, self.of_weights(weights), indices)


@pytest.mark.parametrize("bounds", [
    {}, {"of_logits": lambda x: x.clamp(-40, 40)}, {"of_logits": lambda x: x.clamp(max=10)},
    {"of_weights": lambda x: x * (x > 0.002)}, {"of_weights": lambda x: x.clamp(min=1e-3)},
    {"of_weights": lambda x: x / x.sum(-1, keepdim=True).clamp(min=0.5)},
], ids=["none", "logits", "large logits", "small weights are 0", "least weight", "least sum"])
def test_a_bound_that_most_values_do_not_reach(tmp_path, bounds):
    path = export(model(Bounded(**bounds)), tmp_path / "m.onnx", opset=17, dynamo=False)
    assert functions(path) == ([] if bounds else ["gelu"])


class Cosine(nn.Module):
    """Similarity with a vector of each expert, as of Swin-MoE."""

    def __init__(self):
        super().__init__()
        self.inner, self.vectors = nn.Linear(exports.DIM, 8), nn.Parameter(torch.randn(8, exports.EXPERTS))

    def forward(self, x):
        return F.normalize(self.inner(x), dim=-1) @ F.normalize(self.vectors, dim=0)


@pytest.mark.parametrize("gate", [Cosine(), nn.Sequential(nn.Linear(exports.DIM, 8), nn.ReLU(),
                                                          nn.Linear(8, exports.EXPERTS))])
def test_a_router_of_other_tokens_is_named(tmp_path, gate):
    mixer = Moe("loop")
    mixer.gate = gate
    path = export(model(mixer), tmp_path / "m.onnx", opset=17, dynamo=False)
    reasons = [str(each) for each in partition(fuse(load(path))).reasons.values()]
    assert any("router of this choice reads what no experts read" in each for each in reasons)


@pytest.mark.parametrize("halved", [1, 0.5])
def test_the_last_of_many_tokens_has_a_say(tmp_path, halved):
    class Halved(Mixture):
        def _loop(self, rows, weights, indices):
            factors = torch.ones(len(rows), 1)
            factors[-1] = halved
            return super()._loop(rows, weights * factors, indices)

    path = export_module(Halved("loop"), (torch.ones(1, 20, FEATURES),), tmp_path / "m.onnx", 17, False)
    assert ("GatedExperts" in operators_of(fuse(load(path)))) == (halved == 1)


@pytest.mark.parametrize("swapped", [(0, 1), (10, 11)])
def test_more_experts_than_tokens_each_have_a_say(tmp_path, monkeypatch, swapped):
    """Two experts in each other's place are another model, however few tokens there are."""

    class Swapped(Moe):
        def _loop(self, rows, weights, indices):
            # The constants of expert e stand at place e and meet number e, but of another choice.
            renamed = torch.arange(exports.EXPERTS)
            renamed[list(swapped)] = torch.tensor(swapped[::-1])
            return super()._loop(rows, weights, renamed[indices])

    monkeypatch.setattr(exports, "EXPERTS", 12)
    plain = export(vit(mixer=Moe("loop", "all", k=1)), tmp_path / "plain.onnx", 17, dynamo=False)
    assert functions(plain) == ["gelu"]
    other = export(vit(mixer=Swapped("loop", "all", k=1)), tmp_path / "m.onnx", 17, dynamo=False)
    assert functions(other) == []


def weights(experts=3, hidden=8, features=6, size=0.3):
    draw = np.random.default_rng(2)
    shapes = (experts, hidden, features), (experts, hidden), (experts, features, hidden)
    arrays = [draw.normal(size=shape) * size for shape in (*shapes, (experts, features))]
    return ExpertWeights(*(array.astype(np.float32) for array in arrays))


@pytest.mark.parametrize("size", [1e-4, 0.3, 1e3])
def test_samples_reach_the_values_at_which_functions_differ(size):
    chosen, draw = weights(size=size), np.random.default_rng(3)
    rows = sample_rows(draw, 500, chosen)
    hidden = np.einsum("td,ehd->teh", rows, chosen.w1)
    assert 1.5 < np.sqrt(np.square(hidden).mean()) < 2.5
    assert np.isfinite(sample_rows(draw, 5, weights(size=0))).all()


@pytest.mark.parametrize("experts", [1, 5, 24])
def test_each_expert_comes_first_in_turn(experts):
    scores = sample_scores(np.random.default_rng(3), 24, plain_forms(experts, 1)[0])
    assert (scores.argmax(-1) == np.arange(24) % experts).all()


def test_a_result_that_is_no_number_is_far_from_all():
    chosen, draw = weights(), np.random.default_rng(3)
    routers = plain_forms(3, 2)
    rows, scores = sample_rows(draw, 7, chosen), sample_scores(draw, 7, routers[0])
    for value in (np.nan, np.inf):
        found = np.full((7, 6), value, np.float32)
        assert nearest_form(rows, scores, found, [chosen], routers).error > TOLERANCE
