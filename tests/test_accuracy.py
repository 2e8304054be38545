"""Programs against their float models, layer by layer."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import moeware
from moeware import cli
from moeware.accuracy import RouterAccuracy, TensorAccuracy
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from moeware.hw.arch.program import Program
from moeware.runtime.chosen import Chooser
from moeware.runtime.session import Session

from .compiler import exports
from .compiler.exports import (
    Block,
    Mlp,
    Moe,
    Odd,
    PackedAttention,
    Preprocessed,
    SeparateAttention,
    Tasks,
    Vit,
    example,
    export,
    randomise,
    vit,
)
from .compiler.test_soft_experts import SoftMoe
from .test_cli import CONFIG

IMAGES = example(40, seed=3)
# Of int8 tensors, each read by a few layers of int8 weights. One that is dequantised wrongly
# (channels in another order, a bias left out, a factor) has a noise as large as its signal: 3 dB
# or less. A token in another expert than in float is noise of that size, too, so models with
# experts are held to this up to the first of them.
LEAST_DB = 20.0


def compiled(model, folder, *, task=None, **options):
    path = export(model, folder / "m.onnx", opset=17, dynamo=False, task=task)
    # The program is read back: it must hold all that the comparison needs.
    moeware.compile(path, CONFIG, {"image": example(64, seed=1)}, **options).save(folder / "m.moe")
    return path, Program.load(folder / "m.moe")


def loud(model):
    """Biases of keys and values, and shifts of norms, far above all else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.k.bias", "attention.v.bias", "norm1.bias")):
                parameter += 30 * torch.randn_like(parameter)
            if name.endswith("attention.qkv.bias"):
                parameter[exports.DIM:] += 30 * torch.randn(2 * exports.DIM)
            if name.endswith("norm1.weight"):
                parameter[:2] = torch.tensor([0.0, 8.0])
    return model


class TokenFirst(Vit):
    """Takes one token, and normalises only that."""

    def forward(self, image):
        x = self.conv(image).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)[:, 3]))


def token_first():
    block = Block(PackedAttention(), Mlp(), lambda: nn.LayerNorm(exports.DIM))
    return randomise(TokenFirst(block, pool="mean"))


MODELS = {
    "class": lambda: vit(pool="class"),
    "mean": lambda: vit(pool="mean"),
    "registers": lambda: vit(pool="registers"),
    "token first": token_first,
    "soft experts": lambda: vit(mixer=SoftMoe("flat")),
    "grouped": lambda: vit(attention=SeparateAttention(grouped=True)),
    "grouped mean": lambda: vit(attention=SeparateAttention(grouped=True), pool="mean",
                                mixer=Mlp(nn.ReLU())),
    "layer scale": lambda: vit(layer_scale=True, embed="rearrange", mixer=Mlp(nn.SiLU()))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", [lambda model: model, loud], ids=["plain", "loud"])
def test_every_tensor_is_dequantised_as_it_was_quantised(tmp_path, name, change):
    path, program = compiled(change(MODELS[name]()), tmp_path)
    found = moeware.compare(path, program, {"image": IMAGES})
    worst = min(found.tensors, key=lambda tensor: tensor.snr_db)
    assert worst.snr_db > LEAST_DB, worst
    assert found.degraded is None and found.frames == len(IMAGES)
    operators = {layer.operator for layer in found.layers}
    assert {"LayerNorm", "Linear", "Attention", "Add"} <= operators
    # Every value but those that live only between two steps of one instruction.
    graph = fuse(load(path)).graph
    missing = {str(node.name) for node in graph} - {tensor.layer for tensor in found.tensors}
    assert {name.split("_")[0] for name in missing} <= {"PatchEmbed", "ClassToken", "AddConstant",
                                                        "Linear", "LayerNorm"}
    pointwise = sum(node.op_type == "Pointwise" for node in graph)
    assert sum(name.startswith("Linear") for name in missing) == pointwise


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    def norm():
        return nn.LayerNorm(exports.DIM)
    model = randomise(Vit(Block(PackedAttention(), Moe("gather"), norm),
                          Block(PackedAttention(), Moe("loop"), norm)))
    return compiled(model, tmp_path_factory.mktemp("moe"))


def test_numbers_are_those_of_a_direct_computation(moe):
    path, program = moe
    found = moeware.compare(path, program, {"image": IMAGES})
    real: dict[str, np.ndarray] = {}
    logits = evaluate(fuse(load(path)), {"image": IMAGES}, real.__setitem__)["logits"]
    chooser = Chooser()
    answer, = Session(program, chooser).run(None, {"image": IMAGES})
    head = found.tensors[-1]
    # The session rounds its answer to float32, of 24 bits.
    assert head.rms_error == pytest.approx(np.sqrt(np.mean(np.square(answer - logits))), rel=1e-4)
    assert head.rms == pytest.approx(np.sqrt(np.mean(np.square(logits))), rel=1e-6)
    assert head.snr_db == pytest.approx(20 * math.log10(head.rms / head.rms_error))
    chosen = {name: np.concatenate([choices[name] for _, choices in chooser.choices])
              for name in chooser.choices[0][1]}
    assert [router.layer for router in found.routers] == list(chosen) == ["Route_0", "Route_1"]
    for router in found.routers:
        wanted = real[f"{router.layer}.indices"].reshape(-1, exports.TOP_K)
        same = [set(a) == set(b) for a, b in zip(wanted.tolist(), chosen[router.layer].tolist())]
        each = [len(set(a) & set(b)) / exports.TOP_K
                for a, b in zip(wanted.tolist(), chosen[router.layer].tolist())]
        assert router.tokens == pytest.approx(np.mean(same)) and router.tokens > 0.9
        assert router.choices == pytest.approx(np.mean(each))


def test_layers_stand_in_order_of_computation(moe):
    layers = [layer.layer for layer in moeware.compare(*moe, {"image": IMAGES[:2]}).layers]
    assert layers.index("Route_0") < layers.index("Experts_0") < layers.index("Add_1")
    assert layers.index("Add_1") < layers.index("Route_1") < layers.index("Experts_1")
    assert len(layers) == len(set(layers))


def test_batches_do_not_matter(moe):
    path, program = moe
    done: list[tuple[int, int]] = []
    whole = moeware.compare(path, program, {"image": IMAGES[:35]},
                            progress=lambda *progress: done.append(progress))
    parts = [moeware.compare(path, program, {"image": each})
             for each in (IMAGES[:3], IMAGES[3:35])]
    assert done == [(32, 35), (35, 35)]
    for layer, *others in zip(whole.layers, *(part.layers for part in parts), strict=True):
        if isinstance(layer, TensorAccuracy):
            power = (3 * others[0].rms_error**2 + 32 * others[1].rms_error**2) / 35
            # A float32 sum in another order may move a value over a rounding.
            assert layer.rms_error**2 == pytest.approx(power, rel=1e-3)
        else:
            assert layer.tokens == pytest.approx((3 * others[0].tokens + 32 * others[1].tokens) / 35)


def test_the_first_degraded_layer(moe, tmp_path):
    path, _ = moe
    narrow = moeware.compile(path, CONFIG, {"image": example(64, seed=1)}, bits={"Experts_0": 2})
    found = moeware.compare(path, narrow, {"image": IMAGES})
    assert found.degraded is not None and found.degraded.layer == "Experts_0"
    assert found.degraded.source.startswith("/blocks/blocks.0/mixer/")
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["degraded"] == "Experts_0" and len(facts["layers"]) == len(found.layers)
    assert moeware.compare(path, narrow, {"image": IMAGES}, least_snr_db=-9,
                           least_agreement=0).degraded is None
    assert moeware.compare(*moe, {"image": IMAGES}, least_agreement=1.01).degraded == found.routers[0]
    first = moeware.compare(*moe, {"image": IMAGES}, least_snr_db=200).degraded
    assert first is not None and first.layer == "AddConstant_0"


def test_nested_and_mixed_bits(tmp_path):
    """Grids are those of the integers that a program holds, whatever bits its experts have."""
    path, program = compiled(vit(mixer=Moe("loop")), tmp_path, nested=True)
    mixed = moeware.compile(path, CONFIG, {"image": example(64, seed=1)}, expert_bits=4)
    found = {bits: moeware.compare(path, each, {"image": IMAGES}, least_agreement=0.8)
             for bits, each in ((8, program), (4, program.upper), ("mixed", mixed))}
    for bits, accuracy in found.items():
        assert accuracy.degraded is None, bits
        assert [layer.layer for layer in accuracy.layers] == [
            layer.layer for layer in found[8].layers]
    noise = {bits: next(tensor for tensor in accuracy.tensors if tensor.layer == "Experts_0")
             .rms_error for bits, accuracy in found.items()}
    assert noise[8] < noise[4] and noise[8] < noise["mixed"]


def test_parts_on_the_host(tmp_path):
    def norm():
        return nn.LayerNorm(exports.DIM)
    model = Vit(Block(PackedAttention(), Odd(), norm), Block(PackedAttention(), Mlp(), norm))
    path, program = compiled(Preprocessed(randomise(model)).eval(), tmp_path)
    found = moeware.compare(path, program, {"image": IMAGES})
    assert min(tensor.snr_db for tensor in found.tensors) > LEAST_DB
    last = found.tensors[-1]
    assert (last.operator, last.source) == ("Softmax", "/Softmax")
    assert len([tensor for tensor in found.tensors if tensor.operator == "Attention"]) == 2


def test_a_choice_is_compared_by_itself(tmp_path):
    path, program = compiled(Tasks().eval(), tmp_path, task=torch.tensor(0),
                             choices={"task": [0, 1]})
    both = [moeware.compare(path, program, {"image": IMAGES, "task": task}) for task in (0, 1)]
    assert all(found.routers[0].tokens > 0.9 for found in both)
    assert both[0].tensors[-1] != both[1].tensors[-1]
    with pytest.raises(ValueError, match="task"):
        moeware.compare(path, program, {"image": IMAGES})


def test_another_model_is_refused(moe, tmp_path):
    _, program = moe
    other, _ = compiled(vit(), tmp_path)
    with pytest.raises(ValueError, match="Program must be compiled from .*m.onnx, not from m.onnx"):
        moeware.compare(other, program, {"image": IMAGES})


def test_ratios_without_a_signal_or_an_error():
    place = ("Linear_0", "Linear", "node")
    assert TensorAccuracy(*place, rms=2.0, rms_error=0.2).snr_db == pytest.approx(20)
    assert TensorAccuracy(*place, rms=2.0, rms_error=0.0).snr_db == math.inf
    assert TensorAccuracy(*place, rms=0.0, rms_error=0.0).snr_db == math.inf
    assert TensorAccuracy(*place, rms=0.0, rms_error=1.0).snr_db == -math.inf
    assert RouterAccuracy(*place, tokens=0.5, choices=0.8).is_bad(0, 0.51)


def test_the_command(moe, tmp_path, capsys, monkeypatch):
    path, program = moe
    monkeypatch.chdir(tmp_path)
    program.save("m.moe")
    np.savez("images.npz", image=IMAGES)
    arguments = ["compare", str(path), "m.moe", "images.npz", "--frames", "7"]
    assert cli.main([*arguments, "--json", "-o", "plot.png"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["frames"] == 7 and facts["degraded"] is None
    with open("plot.png", "rb") as file:
        assert file.read().startswith(b"\x89PNG")
    assert cli.main([*arguments, "--least-snr", "60", "--strict"]) == 1
    out = capsys.readouterr().out
    assert "first layer below 60 dB or 90% of tokens: AddConstant_0" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "first below the limit" in rows["AddConstant_0"] and "dB" in rows["Experts_1"]
    assert rows["Route_1"].endswith("%")
    assert cli.main([*arguments, "-o", "nowhere/plot.png"]) == 1
    assert "moeware: error" in capsys.readouterr().err
