"""Every node on the host stands once, under the cause that keeps it there."""

import json

import pytest
import torch
from torch import nn

from moeware.compiler.canonical import sources
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import report
from moeware.compiler.problems import problems
from tests.compiler import exports
from tests.compiler.exports import Block, Mlp, Moe, Odd, PackedAttention, Vit, export


class QuarticNorm(nn.Module):
    """A normalisation that is none of the usual: by the root of the mean of fourth powers."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(exports.DIM))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * self.gamma


class BiasedAttention(PackedAttention):
    """Scores with a learned bias for each pair of tokens."""

    def __init__(self):
        super().__init__()
        tokens = exports.PATCHES + 1
        self.bias = nn.Parameter(torch.randn(tokens, tokens))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, exports.HEADS, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, exports.DIM))


def found(tmp_path, *blocks, wrap=None):
    model = exports.randomise(Vit(*blocks))
    model = (wrap(model) if wrap else model).eval()
    return partition(fuse(load(export(model, tmp_path / "m.onnx", opset=17, dynamo=False))))


def norm():
    return nn.LayerNorm(exports.DIM)


def check_complete(parts) -> None:
    """Shares and counts of the problems are those of the host nodes."""
    facts, causes = report(parts), problems(parts)
    listed = [each.to_dict(facts["macs"]) for each in causes]
    assert json.loads(json.dumps(listed)) == listed
    share = sum(each["mac_share"] + each["follow_mac_share"] for each in listed)
    assert share == pytest.approx(1 - facts["fpga_mac_share"], abs=1e-12)
    host = [entry["node"] for entry in facts["host"]]
    follow = [node.name for each in causes for node in each.follow]
    assert len(follow) == len(set(follow)) and set(follow) <= set(host)
    names = {name for entry in facts["host"] for name in entry["sources"] or [entry["node"]]}
    assert {name for each in listed for name in each["nodes"] + each["follow"]} <= names


def test_a_model_on_the_accelerator_has_none(tmp_path):
    assert problems(found(tmp_path, Block(PackedAttention(), Moe("where"), norm))) == []


@pytest.mark.parametrize("layers", [1, 3])
def test_one_form_in_many_layers_is_one_problem(tmp_path, layers):
    parts = found(tmp_path, *(Block(PackedAttention(), Mlp(), QuarticNorm) for _ in range(layers)))
    check_complete(parts)
    problem, = problems(parts)
    assert "outside a recognised normalisation" in problem.reason
    assert {"Pow", "ReduceMean", "Sqrt", "Mul"} <= set(problem.operators)
    assert len(problem.nodes) == 2 * layers and problem.macs == 0
    assert all(name.startswith(f"/blocks/blocks.{number // 2}/norm{number % 2 + 1}/")
               for number, name in enumerate(problem.nodes))
    taken = {node.op_type for node in problem.follow}
    assert {"Linear", "Attention", "Add", "Pointwise"} <= taken


def test_different_problems_stand_side_by_side(tmp_path):
    parts = found(tmp_path, Block(PackedAttention(), Odd(), norm),
                  Block(BiasedAttention(), Moe("gather"), norm), wrap=exports.Preprocessed)
    check_complete(parts)
    by_operator = {problem.operators: problem for problem in problems(parts)}
    assert set(by_operator) == {("Einsum", "Sin"), ("Sub", "Clip", "Mul"), ("Softmax",),
                                ("MatMul", "Softmax")}
    plain = by_operator["Sub", "Clip", "Mul"]
    assert plain.reason.startswith("Sub, Clip, Mul have no form") and plain.follow == []
    odd = by_operator["Einsum", "Sin"]
    assert odd.nodes == ["/inner/blocks/blocks.0/mixer/Einsum"]
    assert {node.op_type for node in odd.follow} == {"LayerNorm", "Add"}
    attention = by_operator["MatMul", "Softmax"]
    assert "attention that no rule recognises" in attention.reason
    assert "scaled_dot_product_attention" in attention.remedy
    file_names = [name for node in attention.follow for name in sources(node)]
    assert "/inner/blocks/blocks.1/attention/qkv/MatMul" in file_names


def test_post_norm_names_its_additions(tmp_path):
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = PackedAttention(), Mlp()
            self.norm1, self.norm2 = norm(), norm()

        def forward(self, x):
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))

    texts = []
    for layers in (2, 4):
        parts = found(tmp_path, *(PostNorm() for _ in range(layers)))
        check_complete(parts)
        texts.append({(problem.reason, problem.remedy) for problem in problems(parts)})
    assert texts[0] == texts[1]
    assert ("Add of norm and linear is not a supported form, it joins the residual stream with a "
            "Linear or Experts", "use pre-norm residual blocks") in texts[0]
