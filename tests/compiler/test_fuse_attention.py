"""Causal masks and grouped queries, however they are written, become attributes of Attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeware.compiler.partition import partition
from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of

TOKENS, FEATURES, HEADS, KEYS, DIM = 5, 12, 4, 2, 3
SMALLEST = torch.finfo(torch.float32).min


def later(scores):
    """True for keys behind the query, by comparison of positions."""
    rows, columns = (torch.arange(n) for n in scores.shape[-2:])
    return columns[None, :] > rows[:, None]


def tri(scores):
    return torch.tril(torch.ones(scores.shape[-2:]))


MASKS = {
    "infinity added": lambda s: s + torch.triu(torch.full(s.shape[-2:], float("-inf")), 1),
    "smallest number added": lambda s: s + torch.triu(torch.full(s.shape[-2:], SMALLEST), 1),
    "where": lambda s: torch.where(tri(s).bool(), s, torch.tensor(SMALLEST)),
    "masked_fill": lambda s: s.masked_fill(later(s), float("-inf")),
    "comparison of positions": lambda s: s + later(s).float() * -1e9,
    "mask arithmetic": lambda s: s + (1 - tri(s)) * -10000.0,
    "subtraction": lambda s: s - 1e9 * (1 - tri(s)),
    "product and subtraction": lambda s: s * tri(s) - 1e10 * (1 - tri(s)),
}
OTHERS = {
    "sliding window": lambda s: s.masked_fill(later(s) | torch.tril(torch.ones(TOKENS, TOKENS), -2).bool(), -1e9),
    "bias by distance": lambda s: s + (torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]),
    "soft cap": lambda s: torch.tanh(s / 5) * 5,
    "mask by head": lambda s: s.masked_fill(later(s) & (torch.arange(HEADS) > 1)[:, None, None], -1e9),
}


class Attention(nn.Module):
    """``mask`` of scaled scores, ``kept`` of the weights; ``group`` says how keys are shared."""

    def __init__(self, mask=lambda s: s, group="repeat", kept=lambda w: w):
        super().__init__()
        self.mask, self.group, self.kept = mask, group, kept
        self.q, self.k, self.v = (nn.Linear(FEATURES, n * DIM) for n in (HEADS, KEYS, KEYS))
        self.o = nn.Linear(HEADS * DIM, FEATURES)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        share = HEADS // KEYS
        if self.group == "repeat":
            k, v = (each.repeat_interleave(share, dim=1) for each in (k, v))
        elif self.group == "expand":
            k, v = (each[:, :, None].expand(b, KEYS, share, n, DIM).reshape(b, HEADS, n, DIM)
                    for each in (k, v))
        elif self.group == "tile":
            k, v = (each.repeat(1, share, 1, 1) for each in (k, v))
        elif self.group == "broadcast":
            q, k, v = q.view(b, KEYS, share, n, DIM), k[:, :, None], v[:, :, None]
        elif self.group == "broadcast tile":
            q, k, v = q.view(b, share, KEYS, n, DIM), k[:, None], v[:, None]
        y = self.kept(self.mask(q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1)) @ v
        return self.o(y.reshape(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, -1))


class Operator(Attention):
    """PyTorch's own, which becomes ONNX's operator from opset 23 on."""

    def __init__(self, mask=None, causal=False):
        super().__init__()
        self.given, self.causal = mask, causal

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        zeros = torch.zeros(x.shape[1], x.shape[1])
        mask = None if self.given is None else self.given(zeros)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def attention(tmp_path, model, opset=17, dynamo=False, tokens=TOKENS):
    """Attributes of the one Attention that ``model`` becomes; None where it becomes none."""
    torch.manual_seed(4)
    path = export_module(model, (torch.ones(1, tokens, FEATURES),), tmp_path / "m.onnx", opset, dynamo)
    fused = check(path, seeds=(1, 2), frames=1)
    found = [node for node in fused.graph if node.op_type == "Attention" and node.domain]
    if not found:
        return None
    assert operators_of(fused) == ["Linear", "Linear", "Linear", "Attention", "Linear"]
    return {name: entry.value for name, entry in found[0].attributes.items()}


@pytest.mark.parametrize("mask", MASKS)
def test_causal_mask(tmp_path, mask):
    found = attention(tmp_path, Attention(MASKS[mask]))
    assert found == {"heads": HEADS, "kv_heads": KEYS, "scale": DIM**-0.5, "causal": 1}


@pytest.mark.parametrize("mask", OTHERS)
def test_other_scores_stay_plain(tmp_path, mask):
    assert attention(tmp_path, Attention(OTHERS[mask])) is None


def test_small_weights_that_are_dropped_are_seen(tmp_path):
    assert attention(tmp_path, Attention(kept=lambda w: w * (w > 1e-5))) is None


@pytest.mark.parametrize("bias", [0, 4e-4])
def test_a_small_bias_among_many_keys_is_seen(tmp_path, bias):
    def mask(scores):
        return scores * 0.1 + bias * (torch.arange(64) % 2)

    assert (attention(tmp_path, Attention(mask), tokens=64) is None) == bool(bias)


class Windows(Attention):
    """One head of attention among every fourth token, as within the mask units of Hiera."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(FEATURES, 3 * DIM)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n // 4, 4, 3, DIM).permute(3, 0, 2, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, DIM)


@pytest.mark.parametrize("opset,dynamo", [(17, False), (23, True)])
def test_attention_of_windows_is_none_of_all_tokens(tmp_path, opset, dynamo):
    path = export_module(Windows(), (torch.ones(1, 8, FEATURES),), tmp_path / "m.onnx", opset, dynamo)
    partition(check(path, seeds=(1, 2), frames=1))


class Learned(Attention):
    """A query of the model's own, as of attention pooling."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, KEYS, 1, DIM))

    def forward(self, x):
        k, v = (f(x).view(*x.shape[:2], -1, DIM).transpose(1, 2) for f in (self.k, self.v))
        return F.scaled_dot_product_attention(self.query, k, v)[:, :, 0].flatten(1)


@pytest.mark.parametrize("opset,dynamo", [(17, False), (23, True)])
def test_a_learned_query_stays_plain_with_the_reason(tmp_path, opset, dynamo):
    path = export_module(Learned(), (torch.ones(1, 8, FEATURES),), tmp_path / "m.onnx", opset, dynamo)
    parts = partition(check(path, seeds=(1, 2), frames=1))
    assert any("ttention that no rule recognises" in str(each) for each in parts.reasons.values())


@pytest.mark.parametrize("group,keys", [("repeat", KEYS), ("expand", KEYS), ("broadcast", KEYS),
                                        ("tile", HEADS), ("broadcast tile", HEADS)])
def test_grouped_queries(tmp_path, group, keys):
    found = attention(tmp_path, Attention(group=group))
    assert found is not None and (found["kv_heads"], found["causal"]) == (keys, 0)


@pytest.mark.parametrize("opset", [18, 23, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_attention(tmp_path, opset, causal):
    found = attention(tmp_path, Operator(causal=causal), opset, dynamo=True)
    assert found == {"heads": HEADS, "kv_heads": KEYS, "scale": DIM**-0.5, "causal": int(causal)}


@pytest.mark.parametrize("mask", [lambda s: ~later(s), MASKS["infinity added"],
                                  MASKS["mask arithmetic"]], ids=["boolean", "infinite", "finite"])
def test_mask_of_the_operator(tmp_path, mask):
    found = attention(tmp_path, Operator(mask), 23, dynamo=True)
    assert found is not None and found["causal"] == 1


def test_other_mask_of_the_operator(tmp_path):
    assert attention(tmp_path, Operator(OTHERS["bias by distance"]), 23, dynamo=True) is None


class Einsum(Attention):
    """Products as sums over names; ``equations``: of scores and of values, and of what axes q, k
    and v have."""

    def __init__(self, axes, scores, values):
        super().__init__()
        self.k, self.v = (nn.Linear(FEATURES, HEADS * DIM) for _ in range(2))
        self.axes, self.scores, self.values = axes, scores, values

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], HEADS, DIM).permute(self.axes)
                   for f in (self.q, self.k, self.v))
        weights = (torch.einsum(self.scores, q, k) * DIM**-0.5).softmax(-1)
        y = torch.einsum(self.values, weights, v)
        y = y.transpose(1, 2) if self.values.endswith("bhid") else y
        return self.o(y.flatten(2))


@pytest.mark.parametrize("axes,scores,values", [
    ((0, 2, 1, 3), "bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    ((0, 1, 2, 3), "bihd,bjhd->bhij", "bhij,bjhd->bihd"),
    ((0, 1, 2, 3), "bihd,bjhd->bhij", "bhij,bjhd->bhid"),
])
def test_einsum(tmp_path, axes, scores, values):
    found = attention(tmp_path, Einsum(axes, scores, values))
    assert found == {"heads": HEADS, "kv_heads": HEADS, "scale": DIM**-0.5, "causal": 0}
