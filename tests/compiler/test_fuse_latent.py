"""Multi-head latent attention, as people write and export it, becomes canonical operators."""

import pytest
import torch
from torch import nn

import moeware
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import report
from tests import hugging_face
from tests.compiler import language_models
from tests.compiler.exports import export_module
from tests.compiler.fused import check, operators_of
from tests.compiler.test_fuse_rotary import DIM as TURNED
from tests.compiler.test_fuse_rotary import FORMS, rms

TOKENS, FEATURES, HEADS, PLAIN, VALUE, RANK = 5, 12, 3, 4, 6, 7
KEYS = "Linear RMSNorm Linear Linear Join Rotary"
PLAIN_QUERIES = "Linear Rotary"
REST = "Linear Attention Linear"
ROTATIONS = [form for form in FORMS if not form.startswith("part")]


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, -1)


def copied(parts: list[torch.Tensor]) -> torch.Tensor:
    """Into new memory, part after part."""
    result = parts[0].new_empty(*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    first = 0
    for part in parts:
        result[..., first:first + part.shape[-1]].copy_(part)
        first += part.shape[-1]
    return result


def assigned(parts: list[torch.Tensor]) -> torch.Tensor:
    result = torch.zeros(*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    result[..., -parts[-1].shape[-1]:] = parts[-1]
    result[..., :parts[0].shape[-1]] = parts[0]
    return result


class Latent(nn.Module):
    """DeepSeek-V2's attention (DeepSeek-AI 2024, section 2.1).

    query_rank : of the queries' latent, or 0; put : how the parts of a head are put together; value :
    size of a head of values; turned_first : order of the parts; apart : whether there is a projection
    for each part; factor : of the latents; heads : of queries.
    """

    def __init__(self, rotate=FORMS["halves"], put=joined, query_rank=0, value=VALUE, turned_first=False,
                 apart=False, factor=1.0, heads=HEADS, plain=PLAIN):
        super().__init__()
        self.rotate, self.put, self.sizes = rotate, put, (heads, plain, value)
        self.turned_first, self.apart, self.factor = turned_first, apart, factor
        self.down_q = nn.Linear(FEATURES, query_rank) if query_rank else None
        width = query_rank or FEATURES
        self.q = nn.Linear(width, heads * (plain + TURNED))
        self.q_turned = nn.Linear(width, heads * TURNED)
        self.down = nn.Linear(FEATURES, RANK + TURNED)
        self.k_turned = nn.Linear(FEATURES, TURNED)
        self.gamma, self.gamma_q = (nn.Parameter(torch.randn(size)) for size in (RANK, max(1, query_rank)))
        self.up = nn.Linear(RANK, heads * (plain + value))
        self.o = nn.Linear(heads * value, FEATURES)

    def forward(self, x):
        b, n, _ = x.shape
        heads, plain, value = self.sizes
        split = lambda y: y.view(b, n, heads, -1).transpose(1, 2)
        of_query = x if self.down_q is None else rms(self.down_q(x)) * self.gamma_q * self.factor
        q, q_turned = split(self.q(of_query)).split([plain, TURNED], -1)
        latent, k_turned = self.down(x).split([RANK, TURNED], -1)
        if self.apart:
            q_turned, k_turned = split(self.q_turned(of_query)), self.k_turned(x)
        kv = split(self.up(rms(latent) * self.gamma * self.factor))
        k, v = kv.split([plain, value], -1)
        q_turned, k_turned = self.rotate(q_turned), self.rotate(k_turned.view(b, 1, n, TURNED))
        parts = [q, q_turned], [k, k_turned.expand(-1, heads, -1, -1)]
        q, k = (self.put(part[::-1] if self.turned_first else part) for part in parts)
        y = (q @ k.transpose(-1, -2) * (plain + TURNED)**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def fused(tmp_path, operators, opset=17, dynamo=False, tokens=TOKENS, **options):
    torch.manual_seed(4)
    path = export_module(Latent(**options), (torch.ones(1, tokens, FEATURES),), tmp_path / "m.onnx",
                         opset, dynamo)
    model = check(path, seeds=(1, 2), frames=1)
    assert sorted(operators_of(model)) == sorted(operators.split())
    return model


@pytest.mark.parametrize("form", ROTATIONS)
def test_rotation(tmp_path, form):
    model = fused(tmp_path, f"{KEYS} {PLAIN_QUERIES} {REST}", rotate=FORMS[form])
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    assert [attention.attributes[name].value for name in ("heads", "kv_heads")] == [HEADS, HEADS]
    (join,) = [node for node in model.graph if node.op_type == "Join"]
    linears = [value.producer() for value in join.inputs[:2]]
    # Not repeated: heads share what is turned.
    assert sorted(linear.inputs[1].shape[0] for linear in linears) == [TURNED, HEADS * PLAIN]


@pytest.mark.parametrize("turned_first", [False, True])
@pytest.mark.parametrize("put", [joined, copied, assigned])
def test_parts_of_a_head(tmp_path, put, turned_first):
    for opset, dynamo in ((17, False), (20, True)):
        fused(tmp_path, f"{KEYS} {PLAIN_QUERIES} {REST}", opset, dynamo, put=put,
              rotate=FORMS["neighbours"], turned_first=turned_first)


@pytest.mark.parametrize("value", [1, PLAIN + TURNED, 17])
@pytest.mark.parametrize("query_rank", [0, 5])
def test_sizes(tmp_path, query_rank, value):
    queries = f"{PLAIN_QUERIES} Linear RMSNorm" if query_rank else PLAIN_QUERIES
    for heads, plain, tokens in ((HEADS, PLAIN, TOKENS), (1, 2, TOKENS), (HEADS, 10, 1)):
        model = fused(tmp_path, f"{KEYS} {queries} {REST}", query_rank=query_rank, value=value,
                      heads=heads, plain=plain, tokens=tokens)
        (attention,) = [node for node in model.graph if node.op_type == "Attention"]
        assert [each.shape[-1] for each in (*attention.inputs, *attention.outputs)] == [
            heads * (plain + TURNED)] * 2 + [heads * value] * 2


def test_a_projection_for_each_part(tmp_path):
    fused(tmp_path, f"{KEYS} Linear Linear Join Rotary {REST}", apart=True)
    fused(tmp_path, f"{KEYS} Linear RMSNorm Linear Linear Join Rotary {REST}", apart=True, query_rank=5)


def test_a_factor_behind_the_norms(tmp_path):
    fused(tmp_path, f"{KEYS} {PLAIN_QUERIES} Linear RMSNorm {REST}", query_rank=5, factor=1.7)


@pytest.mark.parametrize("put", [
    lambda parts: joined(parts) + joined(parts[::-1]),
    lambda parts: joined([parts[0], parts[1] * parts[0].abs().mean(-1, keepdim=True)]),
], ids=["sums", "a factor of the row"])
def test_other_heads_are_right(tmp_path, put):
    """Whatever they become."""
    torch.manual_seed(4)
    path = export_module(Latent(put=put), (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx", 17, False)
    check(path, seeds=(1, 2), frames=1)


def unfilled(parts: list[torch.Tensor]) -> torch.Tensor:
    """Room for more than the parts, which holds ones."""
    result = torch.ones(*parts[0].shape[:-1], sum(part.shape[-1] for part in parts) + 2)
    result[..., :parts[0].shape[-1]] = parts[0]
    result[..., parts[0].shape[-1] + 2:] = parts[1]
    return result


def test_room_that_is_not_filled_stays_plain(tmp_path):
    torch.manual_seed(4)
    path = export_module(Latent(put=unfilled), (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx",
                         17, False)
    assert {"plain ScatterND"} <= set(operators_of(check(path, seeds=(1, 2), frames=1)))


ATTENTION = "Linear Linear RMSNorm Linear Linear Linear Linear RMSNorm Join Rotary Rotary Attention Linear Add"
DENSE = "Linear Pointwise Linear Multiply Linear Add"
ENDS = "RMSNorm RMSNorm RMSNorm Linear"
EXPORTS = {
    ("deepseek-v3", "eager", 20): {},
    ("deepseek-v3", "sdpa", 23): {"v_head_dim": 20},
    ("deepseek-v3", "sdpa", 18): {"rope_interleave": False, "attention_bias": True},
    ("deepseek-v3", "eager", 24): {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 30,
                                   "v_head_dim": 5, "qk_nope_head_dim": 6},
    ("deepseek-v3", "sdpa", 20): {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32,
        "original_max_position_embeddings": 16, "beta_slow": 1, "rope_theta": 10000.0}},
    ("youtu", "sdpa", 20): {},
    ("minicpm3", "sdpa", 20): {},
}


@pytest.mark.parametrize("name, attention, opset", EXPORTS)
def test_models_of_transformers(tmp_path, name, attention, opset):
    sizes = EXPORTS[name, attention, opset]
    model = language_models.build(name, attention=attention, first_k_dense_replace=1, **sizes)
    path = language_models.export(model, tmp_path / "m.onnx", opset)
    found = check(path, frames=1, seeds=(1, 2), ids=language_models.VOCABULARY)
    operators = sorted(each for each in operators_of(found) if not each.startswith("plain"))
    assert operators == sorted(f"{ATTENTION} {DENSE} {ENDS}".split())
    assert report(partition(found))["fpga_mac_share"] == 1


@pytest.mark.parametrize("query_rank", [None, 16])
def test_deepseek_v2(tmp_path, query_rank):
    model = hugging_face.language_model("deepseek-v2", q_lora_rank=query_rank, first_k_dense_replace=1,
                                        v_head_dim=6)
    ids = torch.zeros(1, hugging_face.TOKENS, dtype=torch.int64)
    exported = moeware.export(model, ids, tmp_path / "m.onnx")
    found = fuse(load(exported.path))
    operators = operators_of(found)
    assert [operators.count(each) for each in ("Join", "Rotary", "Attention", "RMSNorm")] == [
        1, 2, 1, 4 if query_rank is None else 5]
    assert report(partition(found))["fpga_mac_share"] == 1
