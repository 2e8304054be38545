"""Live exports of language models become canonical operators, whatever opset and attention."""

from collections import Counter

import pytest
from transformers.models.phimoe import modeling_phimoe

from moeware.compiler.canonical import REASON
from tests.compiler import language_models
from tests.compiler.fused import check, operators_of

ATTENTION = "Linear Linear Linear Rotary Rotary Attention Linear Add"
GATED = "Linear Pointwise Linear Multiply Linear Add"
MLP = "Linear Pointwise Linear Add"
EXPERTS = "Route GatedExperts Add"
NORMS = "RMSNorm RMSNorm RMSNorm Linear"
LAYER_NORMS = "LayerNorm LayerNorm LayerNorm Linear"
HEAD_NORMS = "RMSNorm RMSNorm"
LOOKUP = "plain Gather"  # of the tokens' embeddings

# (model, attention, opset): canonical operators of a model of one layer, in any order.
EXPORTS = {
    ("llama", "sdpa", 18): f"{ATTENTION} {GATED} {NORMS}",
    ("llama", "eager", 23): f"{ATTENTION} {GATED} {NORMS}",
    ("qwen3", "sdpa", 24): f"{ATTENTION} {HEAD_NORMS} {GATED} {NORMS}",
    ("phi", "sdpa", 20): f"{ATTENTION} {MLP} LayerNorm LayerNorm Linear",
    ("phi3", "eager", 20): f"{ATTENTION} {GATED} {NORMS}",
    ("gemma", "sdpa", 23): f"{ATTENTION} {GATED} {NORMS}",
    ("gpt-neox", "eager", 18): f"{ATTENTION} {MLP} {LAYER_NORMS}",
    ("gpt-j", "eager", 20): f"{ATTENTION} {MLP} LayerNorm LayerNorm Linear",
    ("cohere", "sdpa", 23): f"{ATTENTION} {GATED} LayerNorm LayerNorm Linear",
    ("falcon", "eager", 20): f"{ATTENTION} {MLP} LayerNorm LayerNorm Linear",
    ("mixtral", "sdpa", 20): f"{ATTENTION} {EXPERTS} {NORMS}",
    ("olmoe", "eager", 20): f"{ATTENTION} {HEAD_NORMS} {EXPERTS} {NORMS}",
    ("qwen2-moe", "eager", 24): f"{ATTENTION} {EXPERTS} {EXPERTS} {NORMS}",
    ("qwen3-moe", "sdpa", 23): f"{ATTENTION} {HEAD_NORMS} {EXPERTS} {NORMS}",
    ("phi-moe", "eager", 20): f"{ATTENTION} {EXPERTS} {LAYER_NORMS}",
    ("phi-moe", "sdpa", 23): f"{ATTENTION} {EXPERTS} {LAYER_NORMS}",
    ("glm4-moe", "sdpa", 20): f"{ATTENTION} {EXPERTS} {GATED} {NORMS}",
    ("dots1", "eager", 18): f"{ATTENTION} {HEAD_NORMS} {EXPERTS} {GATED} {NORMS}",
    ("minimax-m2", "sdpa", 24): f"{ATTENTION} {HEAD_NORMS} {EXPERTS} {NORMS}",
}


@pytest.mark.parametrize("name,attention,opset", EXPORTS)
def test_export(tmp_path, name, attention, opset):
    model = language_models.build(name, attention=attention)
    path = language_models.export(model, tmp_path / "m.onnx", opset)
    fused = check(path, frames=1, seeds=(1, 2), ids=language_models.VOCABULARY)
    plain = [LOOKUP, "plain Mul"] if name == "gemma" else [LOOKUP]
    assert Counter(operators_of(fused)) == Counter([*plain, *EXPORTS[name, attention, opset].split()])
    (attention,) = [node for node in fused.graph if node.op_type == "Attention"]
    assert attention.attributes["causal"].value == 1
    heads = [attention.attributes[name].value for name in ("heads", "kv_heads")]
    assert heads == [4, {"gpt-neox": 4, "gpt-j": 4, "falcon": 1}.get(name, 2)]


# Model: sizes, score, groups, chosen groups, "chosen" or "all", whether there are corrections.
ROUTERS = {
    "glm4-moe": ({}, "sigmoid", 2, 1, "chosen", True),
    "dots1": ({"routed_scaling_factor": 1.7}, "sigmoid", 4, 2, "all", True),
    "minimax-m2": ({}, "sigmoid", 1, 1, "chosen", True),
    "deepseek-v3": ({"n_routed_experts": 6, "n_group": 3, "topk_group": 2}, "sigmoid", 3, 2, "chosen",
                    True),
    "qwen3-moe": ({}, "softmax", 1, 1, "chosen", False),
    "phi-moe": ({"num_local_experts": 7, "router_jitter_noise": 0.1}, "sparse", 1, 1, "all", False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router(tmp_path, name):
    sizes, *wanted = ROUTERS[name]
    path = language_models.export(language_models.build(name, seed=4, **sizes), tmp_path / "m.onnx")
    fused = check(path, frames=1, seeds=(1, 2), ids=language_models.VOCABULARY)
    (route,) = [node for node in fused.graph if node.op_type == "Route"]
    found = [route.attributes[name].value for name in ("score", "groups", "chosen_groups", "normalise")]
    assert [*found, bool(route.inputs[3].const_value.numpy().any())] == wanted


def test_other_routers_stay_plain(tmp_path, monkeypatch):
    """Here each weight is squared."""
    def squared(*arguments, mixer=modeling_phimoe.sparsemixer, **options):
        weights, experts = mixer(*arguments, **options)
        return weights.square(), experts

    monkeypatch.setattr(modeling_phimoe, "sparsemixer", squared)
    path = language_models.export(language_models.build("phi-moe"), tmp_path / "m.onnx")
    fused = check(path, frames=1, seeds=(1, 2), ids=language_models.VOCABULARY)
    operators = operators_of(fused)
    reasons = [node.metadata_props[REASON] for node in fused.graph if node.op_type == "ArgMax"]
    assert reasons and all("computes no weighted sum" in each for each in reasons)
    assert not {"Route", "GatedExperts"} & set(operators)
    assert operators.count("Rotary") == 2


@pytest.mark.parametrize("name,sizes", [
    ("llama", dict(num_hidden_layers=2, num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    ("qwen3-moe", dict(num_hidden_layers=2, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False,
                       tie_word_embeddings=True, head_dim=12)),
], ids=["llama", "qwen3-moe"])
def test_other_sizes(tmp_path, name, sizes):
    model = language_models.build(name, attention="sdpa", seed=3, keep=1, **sizes)
    path = language_models.export(model, tmp_path / "m.onnx", 20, tokens=13)
    fused = check(path, frames=1, seeds=(1, 2), ids=language_models.VOCABULARY)
    operators = Counter(operators_of(fused))
    assert operators["Attention"] == 2 and operators["TakeToken"] == 1
    assert {name for name in operators if name.startswith("plain")} <= {LOOKUP, "plain Reshape"}
