"""Routers as models write them, as modules from rows to (weights, indices), and their exports."""

import torch
import torch.nn.functional as F
from torch import nn

from .exports import export_module

TOKENS, FEATURES = 6, 12


class Gate(nn.Module):
    """The linear map of a router, with random weights."""

    def __init__(self, experts, k, groups=1, chosen_groups=1, factor=1.0, normalise=True, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(experts, FEATURES, generator=generator))
        self.experts, self.k, self.groups, self.chosen_groups = experts, k, groups, chosen_groups
        self.factor, self.normalise = factor, normalise

    def logits(self, x):
        x = x.view(-1, FEATURES)
        return F.linear(x.type(torch.float32), self.weight.type(torch.float32))

    def group_mask(self, group_scores):
        """Whether each expert is in one of the best groups."""
        group_idx = torch.topk(group_scores, k=self.chosen_groups, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(group_scores)
        group_mask.scatter_(1, group_idx, 1)
        size = self.experts // self.groups
        score_mask = group_mask.unsqueeze(-1).expand(-1, self.groups, size)
        return score_mask.reshape(-1, self.experts).bool()


class DeepseekV3(Gate):
    """Sigmoid scores, a correction and groups by two: `DeepseekV3TopkRouter` of transformers 5.23."""

    def __init__(self, *arguments, spread=0.1, **options):
        super().__init__(*arguments, **options)
        generator = torch.Generator().manual_seed(1)
        self.correction = nn.Buffer(torch.randn(self.experts, generator=generator) * spread)

    def forward(self, x):
        scores = self.logits(x).sigmoid()
        scores_for_choice = scores + self.correction
        size = self.experts // self.groups
        group_scores = scores_for_choice.view(-1, self.groups, size).topk(2, dim=-1)[0].sum(dim=-1)
        mask = self.group_mask(group_scores)
        scores_for_choice = scores_for_choice.masked_fill(~mask, float("-inf"))
        topk_indices = torch.topk(scores_for_choice, k=self.k, dim=-1, sorted=False)[1]
        topk_weights = scores.gather(1, topk_indices)
        if self.normalise:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights * self.factor, topk_indices


class DeepseekV2(Gate):
    """Softmax scores, and groups by their largest: `DeepseekV2TopkRouter` of transformers 5.23."""

    def forward(self, x):
        scores = self.logits(x).softmax(dim=-1, dtype=torch.float32)
        if self.groups > 1:
            group_scores = scores.view(-1, self.groups, self.experts // self.groups).max(dim=-1).values
            scores = scores.masked_fill(~self.group_mask(group_scores), 0.0)
        topk_weights, topk_indices = torch.topk(scores, k=self.k, dim=-1, sorted=False)
        return topk_weights * self.factor, topk_indices


class Sigmoid(DeepseekV3):
    """Without groups; the bias that balances is added for the choice alone (as LFM2-MoE)."""

    def forward(self, x):
        weights = self.logits(x).sigmoid()
        _, indices = torch.topk(weights + self.correction, k=self.k, dim=-1)
        weights = torch.gather(weights, 1, indices)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.factor, indices


class TopFirst(Gate):
    """Top-k of logits, and softmax of these (as GPT-OSS)."""

    def forward(self, x):
        weights, indices = torch.topk(self.logits(x), self.k, dim=-1)
        return torch.softmax(weights, dim=-1), indices


class Ernie(Sigmoid):
    """Softmax scores that are corrected for the choice (Ernie 4.5)."""

    def forward(self, x):
        weights = self.logits(x).softmax(-1)
        _, indices = torch.topk(weights + self.correction, self.k, dim=-1)
        weights = torch.gather(weights, -1, indices)
        return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12), indices


class SparseMixer(Gate):
    """One expert after another, each weighted among those that are near it: `sparsemixer` of
    transformers 5.23 without noise, which it has for two."""

    def __init__(self, *arguments, threshold=0.02, divisor="clamped", **options):
        super().__init__(*arguments, **options)
        self.threshold, self.divisor = threshold, divisor

    def forward(self, x):
        scores = self.logits(x)
        left, weights, indices = scores, [], []
        for _ in range(self.k):
            largest, chosen = left.max(dim=-1, keepdim=True)
            far = (largest - scores) / self.divide_by(scores, largest) > self.threshold
            gates = torch.softmax(left.masked_fill(far, float("-inf")), dim=-1)
            weights.append(gates.gather(dim=-1, index=chosen))
            indices.append(chosen)
            left = torch.scatter(left, -1, chosen, float("-inf"))
        return torch.concat(weights, dim=-1) * self.factor, torch.concat(indices, dim=-1)

    def divide_by(self, scores, largest):
        return {"clamped": scores.abs().clamp(min=largest), "own": scores.abs(),
                "largest": largest.abs(), "either": scores.abs().maximum(largest.abs())}[self.divisor]


class ArgTop(Gate):
    """The first of softmax scores, by argmax (as Switch Transformers)."""

    def forward(self, x):
        scores = torch.softmax(self.logits(x), dim=-1)
        return scores.max(dim=-1).values, torch.argmax(scores, dim=-1)


class Squared(Gate):
    """A form that Route has not: squares of sigmoids."""

    def forward(self, x):
        weights, indices = torch.topk(self.logits(x).sigmoid().square(), k=self.k, dim=-1)
        return weights, indices


def export_router(module, path, opset=20, dynamo=True):
    """Write the router to `path`: x [1, tokens, features] to weights and indices."""
    x = torch.randn(1, TOKENS, FEATURES, generator=torch.Generator().manual_seed(2))
    return export_module(module, (x,), path, opset, dynamo,
                         input_names=["x"], output_names=["weights", "indices"])
