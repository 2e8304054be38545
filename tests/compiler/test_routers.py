"""Routers in the forms of their models are recognised, and what Route has no form for is not."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, PhimoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from moeware.compiler.fuse.routers import match_router
from moeware.compiler.load import load
from tests.compiler.router_modules import (
    FEATURES,
    TOKENS,
    ArgTop,
    DeepseekV2,
    DeepseekV3,
    Ernie,
    Sigmoid,
    SparseMixer,
    Squared,
    TopFirst,
    export_router,
)


def matches(module, tmp_path, **options):
    """What is found at every TopK and the first ArgMax of the router's export, and the file."""
    path = export_router(module, tmp_path / "router.onnx", **options)
    model = load(path)
    choices = [node for node in model.graph if node.op_type == "TopK"]
    choices += [node for node in model.graph if node.op_type == "ArgMax"][:1]
    found = [match_router(model, node) for node in choices]
    return [match for match in found if match is not None], path


PLAIN = {"groups": 1, "chosen_groups": 1, "group_score": "max"}
UNLIMITED = {"capacity": 0, "order": "token"}
CASES = {
    "V3": (DeepseekV3(16, 3, 4, 2, factor=2.5),
           {"score": "sigmoid", "normalise": "chosen", "groups": 4, "chosen_groups": 2,
            "group_score": "pair"}, True),
    "V3, faint correction": (DeepseekV3(16, 3, 4, 2, spread=1e-3),
                             {"score": "sigmoid", "normalise": "chosen", "groups": 4,
                              "chosen_groups": 2, "group_score": "pair"}, True),
    "V3, no correction": (DeepseekV3(16, 3, 4, 2, spread=0.0),
                          {"score": "sigmoid", "normalise": "chosen", "groups": 4,
                           "chosen_groups": 2, "group_score": "pair"}, False),
    "V3, one group": (DeepseekV3(8, 2, factor=0.5, normalise=False),
                      {"score": "sigmoid", "normalise": "all"} | PLAIN, True),
    "V3, all groups": (DeepseekV3(12, 2, 3, 3),
                       {"score": "sigmoid", "normalise": "chosen"} | PLAIN, True),
    "V2": (DeepseekV2(24, 6, 8, 3, factor=16.0),
           {"score": "softmax", "normalise": "all", "groups": 8, "chosen_groups": 3,
            "group_score": "max"}, False),
    "V2, greedy": (DeepseekV2(6, 2), {"score": "softmax", "normalise": "all"} | PLAIN, False),
    "sigmoid": (Sigmoid(6, 2, spread=0.0), {"score": "sigmoid", "normalise": "chosen"} | PLAIN, False),
    "sigmoid, corrected": (Sigmoid(6, 2, normalise=False, factor=1.5),
                           {"score": "sigmoid", "normalise": "all"} | PLAIN, True),
    "softmax of the chosen": (TopFirst(6, 2), {"score": "softmax", "normalise": "chosen"} | PLAIN, False),
    "softmax, corrected": (Ernie(6, 2, spread=0.05),
                           {"score": "softmax", "normalise": "chosen"} | PLAIN, True),
}


SPARSE = {"score": "sparse", "normalise": "all"} | PLAIN
CASES |= {
    "sparse": (SparseMixer(6, 2), SPARSE | {"threshold": 0.02}, False),
    "sparse, scaled": (SparseMixer(16, 2, threshold=0.3, factor=0.5), SPARSE | {"threshold": 0.3}, False),
    "sparse, three": (SparseMixer(5, 3, threshold=0.05), SPARSE | {"threshold": 0.05}, False),
    "sparse, one": (SparseMixer(4, 1, threshold=0.2), SPARSE | {"threshold": 0.2}, False),
    # Of rows that are not made for it, few have a weight below one.
    "sparse, one, seldom shared": (SparseMixer(3, 1), SPARSE | {"threshold": 0.02}, False),
    "sparse, two of two": (SparseMixer(2, 2), SPARSE | {"threshold": 0.02}, False),
    "sparse, in other words": (SparseMixer(6, 2, divisor="either"), SPARSE | {"threshold": 0.02}, False),
    "first": (ArgTop(6, 1), {"score": "softmax", "normalise": "all"} | PLAIN, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo, opset", [(True, 20), (False, 17)], ids=["dynamo", "TorchScript"])
def test_forms(tmp_path, case, dynamo, opset):
    module, attributes, corrected = CASES[case]
    (match,), path = matches(module, tmp_path, dynamo=dynamo, opset=opset)
    wanted = {"threshold": 0.0} | UNLIMITED | attributes | {"k": module.k}
    assert match.form.attributes == wanted | {"threshold": pytest.approx(wanted["threshold"], rel=1e-6)}
    assert match.form.factor == pytest.approx(module.factor, rel=1e-5)
    correction = module.correction.numpy() if corrected else np.zeros(module.experts)
    assert np.array_equal(match.form.correction, correction)
    # The whole router, on rows that the proof has not seen.
    x = np.random.default_rng(5).normal(size=(1, TOKENS, FEATURES)).astype(np.float32)
    weights, indices = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    logits = torch.from_numpy(x[0] @ match.layer.weight.T + match.layer.bias).numpy()
    expected = np.zeros((TOKENS, module.experts))
    np.put_along_axis(expected, indices.reshape(TOKENS, -1), weights.reshape(TOKENS, -1), -1)
    # float32 of the model's own order of sums.
    assert np.abs(match.form.dense(logits) - expected).max() < 1e-4 * module.factor


SIZES = {"hidden_size": FEATURES, "num_attention_heads": 2, "num_experts_per_tok": 3, "n_group": 4,
         "topk_group": 2, "n_routed_experts": 16, "routed_scaling_factor": 2.5}


@pytest.mark.parametrize("router, group_score", [
    (DeepseekV3TopkRouter(DeepseekV3Config(**SIZES)), "pair"),
    (DeepseekV2TopkRouter(DeepseekV2Config(**SIZES, topk_method="group_limited_greedy")), "max")],
    ids=["V3", "V2"])
def test_routers_of_transformers(tmp_path, router, group_score):
    """The classes themselves, of the installed version."""
    class Chosen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = router

        def forward(self, x):
            return self.router(x)[1:]

    torch.nn.init.normal_(router.weight)
    (match,), _ = matches(Chosen(), tmp_path)
    assert match.form.attributes == UNLIMITED | {
        "k": 3, "groups": 4, "chosen_groups": 2, "group_score": group_score, "threshold": 0.0,
        "score": "sigmoid" if group_score == "pair" else "softmax",
        "normalise": "chosen" if group_score == "pair" else "all"}
    assert match.form.factor == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("dynamo, opset", [(True, 20), (False, 17)], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("divisor", ["own", "largest"])
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_another_measure_of_what_is_near_is_no_router(tmp_path, divisor, threshold, dynamo, opset):
    """These differ where the largest is negative, or where the other is smaller than it."""
    module = SparseMixer(6, 2, threshold=threshold, divisor=divisor)
    found, _ = matches(module, tmp_path, dynamo=dynamo, opset=opset)
    assert not found


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_sparse_mixer_of_transformers(tmp_path, jitter):
    """The class itself, of the installed version."""
    class Chosen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = PhimoeTopKRouter(PhimoeConfig(
                hidden_size=FEATURES, num_local_experts=8, router_jitter_noise=jitter)).eval()

        def forward(self, x):
            return self.router(x.view(-1, FEATURES))[1:]

    module = Chosen()
    torch.nn.init.normal_(module.router.weight)
    (match,), _ = matches(module, tmp_path)
    assert match.form.attributes == UNLIMITED | SPARSE | {
        "k": 2, "threshold": pytest.approx(2 * jitter, rel=1e-6)}
    assert match.form.factor == pytest.approx(1, rel=1e-5)


def test_another_function_is_no_router(tmp_path):
    found, _ = matches(Squared(6, 2), tmp_path)
    assert not found


@pytest.mark.parametrize("limit", [10, 100])
def test_clamped_logits_are_no_router(tmp_path, limit):
    """However far from ordinary ones the limit is."""
    class Clamped(DeepseekV2):
        def logits(self, x):
            return super().logits(x).clamp(-limit, limit)

    found, _ = matches(Clamped(6, 2), tmp_path)
    assert not found


def test_a_correction_that_reaches_the_weights_is_no_router(tmp_path):
    class Added(DeepseekV3):
        def forward(self, x):
            weights, indices = torch.topk(self.logits(x).sigmoid() + self.correction, k=self.k)
            return weights, indices

    found, _ = matches(Added(6, 2), tmp_path)
    assert not found
