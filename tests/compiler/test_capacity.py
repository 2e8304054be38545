"""Experts of limited capacity, in every form, become a Route that drops the same tokens."""

import numpy as np
import pytest
import torch

from moeware.compiler.canonical import attributes
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from tests.compiler import exports
from tests.compiler.capacity_modules import (
    ArgMaxTwice,
    CapacityMoe,
    MaskTwice,
    Switch,
    TopOneTwice,
    vit,
)
from tests.compiler.exports import example, export, run_onnx

DYNAMO, TORCHSCRIPT = {"dynamo": True, "opset": 20}, {"dynamo": False, "opset": 17}
ORDERS = {"tokens": "token", "slots": "token", "triangle": "token", "turned": "choice",
          "ranks": "choice", "priority": "priority"}
FORMS = ("einsum", "list", "apart", "frames", "scatter", "weights")


def routes(path):
    return [attributes(node) for node in fuse(load(path)).graph if node.op_type == "Route"]


def check(path, wanted):
    """The Routes of the file have these attributes, and the graph computes what the file does."""
    model = fuse(load(path))
    found = [attributes(node) for node in model.graph if node.op_type == "Route"]
    assert [{name: each[name] for name in wanted[0]} for each in found] == wanted
    assert not any(node.op_type in ("CumSum", "TopK", "Einsum") for node in model.graph)
    for seed in range(3):
        image = example(seed=seed)
        (result,) = evaluate(model, {"image": image}).values()
        expected = run_onnx(path, image=image)[0]
        assert np.abs(result - expected).max() < 1e-4 * np.abs(expected).max()
    return model


@pytest.mark.parametrize("how", [DYNAMO, TORCHSCRIPT], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form, how):
    """Each way of counting places in one block."""
    mixers = [CapacityMoe(form, places, divide, capacity=1 + number % 3)
              for number, (places, divide) in enumerate(zip(ORDERS, ("all", "chosen", "kept") * 2))]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **how)
    check(path, [{"capacity": mixer.capacity, "order": ORDERS[mixer.places],
                  "normalise": mixer.divide, "k": 2} for mixer in mixers])


@pytest.mark.parametrize("capacity", [1, 3, exports.PATCHES - 1, exports.PATCHES])
@pytest.mark.parametrize("k", [1, 2, exports.EXPERTS])
def test_capacities(tmp_path, k, capacity):
    """One place, all but one, and one that never binds: of 6 patches and a class token."""
    mixers = [CapacityMoe("einsum", places, "all", k, capacity) for places in ("slots", "ranks")]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    check(path, [{"capacity": capacity, "order": order if k > 1 else "token", "k": k}
                 for order in ("token", "choice")])


@pytest.mark.parametrize("divide", ["chosen", "kept"])
def test_weights_before_and_after_tokens_are_dropped(tmp_path, divide):
    """Where the capacity rarely binds: no token is dropped in part but by a crowd."""
    mixers = [CapacityMoe("einsum", places, divide, k, exports.PATCHES - 1)
              for places, k in (("slots", 2), ("slots", 4), ("ranks", 4))]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    check(path, [{"order": ORDERS[mixer.places], "normalise": divide} for mixer in mixers])


def test_where_all_experts_are_chosen_there_is_one_way_to_divide(tmp_path):
    mixers = [CapacityMoe("einsum", "slots", divide, exports.EXPERTS) for divide in ("all", "chosen", "kept")]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    check(path, [{"order": "token", "normalise": "chosen"}] * 3)


@pytest.mark.parametrize("capacity", [exports.PATCHES + 1, 100])
def test_a_capacity_that_never_binds_is_none(tmp_path, capacity):
    mixers = [CapacityMoe("scatter", places, "chosen", capacity=capacity) for places in ("tokens", "turned")]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    check(path, [{"capacity": 0, "order": "token", "normalise": "chosen"}] * 2)


@pytest.mark.parametrize("how", [DYNAMO, TORCHSCRIPT], ids=["dynamo", "TorchScript"])
def test_one_choice_after_another(tmp_path, how):
    """With a capacity, and with one that never binds."""
    mixers = [TopOneTwice("einsum", "ranks", "chosen", capacity=2),
              TopOneTwice("scatter", "tokens", "all", capacity=7)]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **how)
    check(path, [{"capacity": 2, "order": "choice", "normalise": "chosen", "k": 2},
                 {"capacity": 0, "order": "token", "normalise": "all", "k": 2}])


@pytest.mark.parametrize("how", [DYNAMO, TORCHSCRIPT], ids=["dynamo", "TorchScript"])
def test_choices_by_arg_max(tmp_path, how):
    mixers = [Switch(capacity=2), ArgMaxTwice("einsum", "ranks", capacity=2), Switch(capacity=7),
              ArgMaxTwice("scatter", "tokens", capacity=7), MaskTwice(capacity=3),
              MaskTwice(capacity=2 * exports.PATCHES + 2)]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **how)
    check(path, [{"k": k, "capacity": capacity, "order": order, "normalise": normalise}
                 for k, capacity, order, normalise in (
                     (1, 2, "token", "all"), (2, 2, "choice", "chosen"), (1, 0, "token", "all"),
                     (2, 0, "token", "chosen"), (2, 3, "choice", "kept"), (2, 0, "token", "chosen"))])


class Groups(CapacityMoe):
    """Tokens in two groups, of which each has places of its own."""

    def _by_tokens(self, indices, weights):
        return torch.cat([CapacityMoe._by_tokens(self, part, weights) for part in indices.split(4)])


class Whims(CapacityMoe):
    """An expert takes its last tokens."""

    def _by_tokens(self, indices, weights):
        return CapacityMoe._by_tokens(self, indices.flip(0), weights).flip(0)


class Uneven(CapacityMoe):
    """Expert 0 takes one token more."""

    def _by_tokens(self, indices, weights):
        return CapacityMoe._by_tokens(self, indices, weights) - (indices == 0).long()


class Strict(CapacityMoe):
    """A token of which one choice is dropped is dropped by all."""

    def _by_tokens(self, indices, weights):
        place = CapacityMoe._by_tokens(self, indices, weights)
        return place.amax(-1, keepdim=True).expand_as(place)


@pytest.mark.parametrize("other", [Groups, Whims, Uneven, Strict])
def test_other_rules_stay_plain(tmp_path, other):
    path = export(vit(other("weights")), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    assert routes(path) == []


def test_functions_are_still_told_apart(tmp_path):
    """With one place each, where little of each expert is seen."""
    mixers = [CapacityMoe("einsum", "slots", capacity=1, function=torch.nn.GELU(form))
              for form in ("none", "tanh")]
    path = export(vit(*mixers), tmp_path / "m.onnx", dynamic=False, **TORCHSCRIPT)
    model = check(path, [{"capacity": 1}] * 2)
    assert [node.attributes["function"].value for node in model.graph if node.op_type == "Experts"] == [
        "gelu", "gelu_tanh"]
