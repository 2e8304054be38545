"""Exported models become the expected canonical operators and compute what they did before."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeware.compiler.canonical import REASON, sources
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from tests.compiler import exports
from tests.compiler.exports import Mlp, Moe, PackedAttention, SeparateAttention, export, vit
from tests.compiler.fused import check

CASES = Path(__file__).parent / "cases"

ATTENTION = "LayerNorm Linear Linear Linear Attention Linear Add"
DENSE = "LayerNorm Linear Pointwise Linear Add"
MOE = "LayerNorm Route Experts Add"
SHARED = "LayerNorm Linear Pointwise Linear Route Experts Add Add"
CLASS = ("PatchEmbed ClassToken AddConstant", "LayerNorm TakeToken Linear")
REGISTERS = (f"PatchEmbed{3 * ' ClassToken'} AddConstant", "LayerNorm TakeToken Linear")
MEAN = ("PatchEmbed AddConstant", "LayerNorm MeanTokens Linear")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def expected(*blocks, ends=CLASS):
    return " ".join([ends[0], *blocks, ends[1]]).split()


# Name: (model, canonical operators of its block, operators around it).
MODELS = {
    "sdpa": (lambda: vit(), (ATTENTION, DENSE), CLASS),
    "scale on scores": (lambda: vit(PackedAttention("manual")), (ATTENTION, DENSE), CLASS),
    "scale on q": (lambda: vit(PackedAttention("scale_q")), (ATTENTION, DENSE), CLASS),
    "scale on q and k": (lambda: vit(PackedAttention("scale_both")), (ATTENTION, DENSE), CLASS),
    "causal sdpa": (lambda: vit(PackedAttention("sdpa", True)), (ATTENTION, DENSE), CLASS),
    "causal mask": (lambda: vit(PackedAttention("manual", True)), (ATTENTION, DENSE), CLASS),
    "separate qkv": (lambda: vit(SeparateAttention()), (ATTENTION, DENSE), CLASS),
    "grouped queries": (lambda: vit(SeparateAttention(True)), (ATTENTION, DENSE), CLASS),
    "MultiheadAttention": (lambda: vit(exports.TorchAttention()), (ATTENTION, DENSE), CLASS),
    "TransformerEncoderLayer": (
        lambda: exports.randomise(exports.Vit(exports.EncoderLayer())),
        (ATTENTION, DENSE),
        CLASS,
    ),
    "written-out norm": (lambda: vit(norm=exports.PrimitiveNorm), (ATTENTION, DENSE), CLASS),
    "layer scale": (lambda: vit(layer_scale=True), (ATTENTION, DENSE), CLASS),
    "mean pool": (lambda: vit(pool="mean"), (ATTENTION, DENSE), MEAN),
    "rearranged patches": (lambda: vit(embed="rearrange"), (ATTENTION, DENSE), CLASS),
    "gelu tanh": (lambda: vit(mixer=Mlp(nn.GELU("tanh"))), (ATTENTION, DENSE), CLASS),
    "silu": (lambda: vit(mixer=Mlp(nn.SiLU())), (ATTENTION, DENSE), CLASS),
    "relu": (lambda: vit(mixer=Mlp(nn.ReLU())), (ATTENTION, DENSE), CLASS),
    "squared relu": (lambda: vit(mixer=Mlp(lambda x: F.relu(x) ** 2)), (ATTENTION, DENSE), CLASS),
    "hard swish": (lambda: vit(mixer=Mlp(nn.Hardswish())), (ATTENTION, DENSE), CLASS),
    "quick gelu": (lambda: vit(mixer=Mlp(quick_gelu)), (ATTENTION, DENSE), CLASS),
    "loop": (lambda: vit(mixer=Moe("loop")), (ATTENTION, MOE), CLASS),
    "where": (lambda: vit(mixer=Moe("where")), (ATTENTION, MOE), CLASS),
    "scatter": (lambda: vit(mixer=Moe("scatter")), (ATTENTION, MOE), CLASS),
    "onehot": (lambda: vit(mixer=Moe("onehot")), (ATTENTION, MOE), CLASS),
    "gather": (lambda: vit(mixer=Moe("gather")), (ATTENTION, MOE), CLASS),
    "gather einsum": (lambda: vit(mixer=Moe("gather_einsum")), (ATTENTION, MOE), CLASS),
    "choice by choice": (lambda: vit(mixer=Moe("slots")), (ATTENTION, MOE), CLASS),
    "stack": (lambda: vit(mixer=Moe("stack")), (ATTENTION, MOE), CLASS),
    "shared expert": (lambda: vit(mixer=Moe("shared")), (ATTENTION, SHARED), CLASS),
    "registers": (lambda: vit(pool="registers"), (ATTENTION, DENSE), REGISTERS),
    "all": (lambda: vit(mixer=Moe("loop", "all")), (ATTENTION, MOE), CLASS),
    "top first": (lambda: vit(mixer=Moe("scatter", "top_first")), (ATTENTION, MOE), CLASS),
    "top 1": (lambda: vit(mixer=Moe("gather", "all", k=1)), (ATTENTION, MOE), CLASS),
    "top 3": (lambda: vit(mixer=Moe("onehot", k=3)), (ATTENTION, MOE), CLASS),
    "quick gelu experts": (
        lambda: vit(mixer=Moe("scatter", function=quick_gelu)), (ATTENTION, MOE), CLASS),
    "silu experts": (lambda: vit(mixer=Moe("gather", function=nn.SiLU())), (ATTENTION, MOE), CLASS),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchscript_export(tmp_path, name):
    build, blocks, ends = MODELS[name]
    path = export(build(), tmp_path / "m.onnx", opset=17, dynamo=False)
    check(path, expected(*blocks, ends=ends))


# Opset: blocks (attention, mixer, causal, kv_heads, k, normalise) of one model for the exporter.
# Each form appears once: an export takes seconds.
DYNAMO = {
    18: [
        (PackedAttention, lambda: Moe("gather_einsum", "all", k=3), 0, 4, 3, "all"),
        (lambda: PackedAttention("manual"), lambda: Mlp(nn.GELU("tanh")), 0, 4, None, None),
    ],
    20: [
        (exports.TorchAttention, lambda: Moe("loop"), 0, 4, 2, "chosen"),
        (lambda: PackedAttention("sdpa", True), lambda: Moe("where", "all"), 1, 4, 2, "all"),
        (lambda: SeparateAttention(True), lambda: Moe("scatter"), 0, 2, 2, "chosen"),
    ],
    23: [
        (PackedAttention, lambda: Moe("onehot", "top_first"), 0, 4, 2, "chosen"),
        (lambda: SeparateAttention(True), lambda: Moe("gather", "all", k=2), 0, 2, 2, "all"),
        (lambda: PackedAttention("scale_both"), lambda: Mlp(nn.SiLU()), 0, 4, None, None),
    ],
}


@pytest.mark.parametrize("opset", DYNAMO)
def test_dynamo_export(tmp_path, opset):
    blocks = [
        exports.Block(attention(), mixer(), lambda: nn.LayerNorm(exports.DIM))
        for attention, mixer, *_ in DYNAMO[opset]
    ]
    model = exports.randomise(exports.Vit(*blocks))
    path = export(model, tmp_path / "m.onnx", opset=opset)
    each = [f"{ATTENTION} {DENSE if k is None else MOE}" for *_, k, _ in DYNAMO[opset]]
    fused = check(path, expected(*each))

    def values(operator, name):
        return [n.attributes[name].value for n in fused.graph if n.op_type == operator]

    _, _, causal, kv_heads, k, normalise = (list(column) for column in zip(*DYNAMO[opset]))
    assert values("Attention", "causal") == causal
    assert values("Attention", "kv_heads") == kv_heads
    assert values("Route", "k") == [value for value in k if value is not None]
    assert values("Route", "normalise") == [value for value in normalise if value is not None]


@pytest.mark.parametrize("name", ["rearranged patches", "loop"])
def test_dynamo_export_with_fixed_batch(tmp_path, name):
    build, blocks, ends = MODELS[name]
    path = export(build(), tmp_path / "m.onnx", opset=20, dynamic=False)
    check(path, expected(*blocks, ends=ends), frames=1)


# Attributes are float32 in the file.
@pytest.mark.parametrize(
    "case,operators,attributes",
    [
        ("layer_norm_rsqrt", ["LayerNorm"], {"epsilon": float(np.float32(1e-5))}),
        ("gelu_tanh", ["Pointwise"], {"function": "gelu_tanh"}),
        ("gelu_erf", ["Pointwise"], {"function": "gelu"}),
        (
            "attention_operator",
            ["Attention"],
            {"heads": 4, "kv_heads": 2, "causal": 1, "scale": float(np.float32(0.3))},
        ),
        (
            "masked_attention",
            ["plain Transpose", "plain MatMul", "Add", "plain Softmax", "plain MatMul"],
            {},
        ),
        ("three_operand_einsum", ["plain Einsum"], {}),
    ],
)
def test_text_model(case, operators, attributes):
    model = check(CASES / f"{case}.onnxtxt", operators)
    (first, *_) = model.graph
    assert {name: first.attributes[name].value for name in attributes} == attributes


def test_sources_name_the_original_nodes(tmp_path):
    path = export(vit(mixer=Moe("loop")), tmp_path / "m.onnx", opset=17, dynamo=False)
    names = {node.name for node in load(path).graph}
    fused = fuse(load(path))
    for node in fused.graph:
        assert sources(node) and set(sources(node)) <= names
    by_name = {node.name: sources(node) for node in fused.graph}
    assert any("TopK" in name for name in by_name["Route_0"])
    assert any("Equal" in name for name in by_name["Experts_0"])
    assert not set(by_name["Route_0"]) & set(by_name["Experts_0"])


def test_other_weights_between_softmax_and_experts_stay_plain(tmp_path):
    """A router whose weights are neither form must not be taken for one of them."""

    class Squared(Moe):
        def _loop(self, rows, weights, indices):
            return super()._loop(rows, weights * weights, indices)

    path = export(vit(mixer=Squared("loop")), tmp_path / "m.onnx", opset=17, dynamo=False)
    operators = {node.op_type for node in fuse(load(path)).graph}
    assert "TopK" in operators and not operators & {"Route", "Experts"}


def test_a_list_of_all_choices(tmp_path):
    path = export(vit(mixer=Moe("index_add")), tmp_path / "m.onnx", 18, dynamic=False)
    check(path, expected(ATTENTION, MOE), frames=1)
    # Each token keeps the result of its last expert: what the file says, not what the module does.
    path = export(vit(mixer=Moe("index_add")), tmp_path / "m.onnx", 17, False)
    (top_k,) = [node for node in check(path, frames=1).graph if node.op_type == "TopK"]
    assert "export with dynamo=True" in top_k.metadata_props[REASON]


@pytest.mark.parametrize("order", [(0, 1, 3, 2, 4, 5), (0, 1, 3, 5, 4, 2), (0, 1, 3, 4, 5, 2)])
def test_patches_of_an_image_with_channels_last(tmp_path, order):
    """In several orders of a patch's features."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * 4 * 3, 5)

        def forward(self, image):
            b, h, w, c = image.shape
            patches = image.view(b, h // 2, 2, w // 4, 4, c).permute(order)
            return self.linear(patches.reshape(b, -1, 24))

    path = exports.export_module(Last(), (torch.ones(1, 6, 8, 3),), tmp_path / "m.onnx", 17, False)
    check(path, ["plain Transpose", "PatchEmbed"], frames=1)
