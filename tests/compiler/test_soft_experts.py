"""Soft MoE, as PyTorch modules write it, to the last integer."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.placement import describe
from moeware.compiler.reference import evaluate
from moeware.hw.arch.config import Config
from moeware.runtime.session import Session
from tests.compiler import exports

CONFIG = Config(tokens=2, outputs=4, depth=4, queries=2, lanes=2, bus_bytes=8, activation_banks=4,
                activation_words=256, residual_words=512, weight_words=256, param_words=128, tables=2,
                row_words=16, max_rows=32, max_experts=8, max_chosen=2, queue=4)


class SoftMoe(nn.Module):
    """``form``: "einsum" (slots [E, S, D]), "flat" (one matrix of slots), "loop" (an expert a time);
    ``change`` of the logits, but for "einsum"."""

    def __init__(self, form, experts=4, slots=2, function=None, change=lambda logits: logits):
        super().__init__()
        dim, hidden = exports.DIM, exports.HIDDEN
        self.form, self.experts, self.slots, self.change = form, experts, slots, change
        self.phi = nn.Parameter(torch.randn(dim, experts, slots) * 0.4)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * 0.3)
        self.b1 = nn.Parameter(torch.randn(experts, 1, hidden) * 0.3)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * 0.3)
        self.b2 = nn.Parameter(torch.randn(experts, 1, dim) * 0.3)
        self.function = function or nn.GELU()

    def forward(self, x):
        if self.form == "einsum":
            logits = torch.einsum("bnd,des->bnes", x, self.phi)
            dispatch = logits.softmax(dim=1)
            combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
            filled = torch.einsum("bnes,bnd->besd", dispatch, x)
        else:
            logits = self.change(x @ self.phi.flatten(1))
            dispatch, combine = logits.softmax(dim=1), logits.softmax(dim=-1)
            filled = (dispatch.transpose(1, 2) @ x).unflatten(1, (self.experts, self.slots))
        if self.form == "loop":
            results = torch.stack([
                self.function(filled[:, e] @ self.w1[e] + self.b1[e]) @ self.w2[e] + self.b2[e]
                for e in range(self.experts)], dim=1)
        else:
            results = self.function(filled @ self.w1 + self.b1) @ self.w2 + self.b2
        if self.form == "einsum":
            return torch.einsum("bnes,besd->bnd", combine, results)
        return combine @ results.flatten(1, 2)


CASES = {
    "einsum": (dict(form="einsum"), dict(opset=20, dynamo=True)),
    "flat": (dict(form="flat", function=nn.GELU("tanh")), dict(opset=23, dynamo=True)),
    "loop": (dict(form="loop", function=nn.SiLU()), dict(opset=18, dynamo=True)),
    "TorchScript": (dict(form="einsum", slots=1), dict(opset=17, dynamo=False)),
    "temperature": (dict(form="loop", change=lambda logits: logits / 0.5), dict(opset=17, dynamo=False)),
    "one expert": (dict(form="flat", experts=1, slots=3), dict(opset=20, dynamo=True)),
    "more slots than tokens": (dict(form="loop", experts=2, slots=9), dict(opset=20, dynamo=True)),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    how, options = CASES[request.param]
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("soft") / "model.onnx"
    return exports.export(exports.vit(mixer=SoftMoe(**how)), path, **options)


def test_is_one_operator_that_computes_the_same(exported):
    model = fuse(load(exported))
    (node,) = [node for node in model.graph if node.op_type == "SoftExperts"]
    assert describe(partition(model)).endswith("100.0 % of MACs")
    assert node.inputs[1].shape[0] % node.inputs[2].shape[0] == 0
    image = exports.example(5)
    expected = onnxruntime.InferenceSession(exported).run(None, {"image": image})[0]
    found = evaluate(model, {"image": image})["logits"]
    # float32 through a few blocks: issue's bound for a float graph.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("how", [
    {"function": nn.ReLU6()}, {"change": lambda logits: logits.clamp(-20, 20)},
    {"change": lambda logits: logits + torch.arange(8) * 0.1},
], ids=["bounded function", "bounded logits", "bias"])
def test_others_stay_plain_with_the_reason(tmp_path, how):
    torch.manual_seed(4)
    model = exports.vit(mixer=SoftMoe("flat", **how))
    path = exports.export(model, tmp_path / "m.onnx", 17, dynamo=False)
    reasons = partition(fuse(load(path))).reasons
    assert sum("as of Soft MoE" in str(each) for each in reasons.values()) == 2


@pytest.mark.parametrize("frames", [1, 2])
def test_integers_are_the_same_on_every_device(exported, frames):
    samples = {"image": exports.example(32)}
    program = compile_model(exported, CONFIG, samples, frames=frames, trace=True)
    image = {"image": exports.example(5)}
    results = {device: Session(program, device).run(None, image)[0] for device in ("golden", "torch")}
    assert (results["golden"] == results["torch"]).all()
    expected = onnxruntime.InferenceSession(exported).run(None, image)[0]
    noise = np.square(results["torch"] - expected).mean() / np.square(expected).mean()
    # int8 tensors: some tens of rounding errors of 1/400 of a value's range each.
    assert 10 * np.log10(noise) < -20


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    torch.manual_seed(4)
    return exports.export(exports.vit(mixer=SoftMoe("flat")),
                          tmp_path_factory.mktemp("flat") / "model.onnx")


@pytest.mark.parametrize("options, message", [
    ({"nested": True}, r"Soft experts \(SoftExperts_0\) must not be nested"),
    ({"expert_bits": 4}, r"Soft experts \(SoftExperts_0\) must have bits of their own .*--bits"),
    ({"expert_bits": 4, "bits": {"SoftExperts_0": 4}}, "must be given for a model with experts that a "
                                                       "router chooses"),
])
def test_bits_that_a_router_has_to_be_there_for(flat, options, message):
    with pytest.raises(CompileError, match=message):
        compile_model(flat, CONFIG, {"image": exports.example(8)}, **options)


@pytest.mark.parametrize("bits", [4, 2])
def test_narrow_experts(flat, bits):
    program = compile_model(flat, CONFIG, {"image": exports.example(32)}, bits={
        "experts": bits, "SoftExperts_0/expert1": 8})
    found = {op.name: op.bits for op in program.steps[0].operations if "/expert" in op.name
             and op.name.endswith(("/up", "/down"))}
    assert found == {f"SoftExperts_0/expert{e}/{layer}": 8 if e == 1 else bits
                     for e in range(4) for layer in ("up", "down")}
    image = {"image": exports.example(3)}
    golden, pytorch = (Session(program, device).run(None, image)[0] for device in ("golden", "torch"))
    assert (golden == pytorch).all()


def test_slots_see_every_token(exported):
    """Another last patch changes what every slot holds."""
    model, image, held = fuse(load(exported)), exports.example(1), []
    for _ in range(2):
        record = {}
        evaluate(model, {"image": image}, record.__setitem__)
        held.append(record["SoftExperts_0/filled"][0])
        image[..., -exports.PATCH:, -exports.PATCH:] += 1
    assert (held[0] != held[1]).any(-1).all()
