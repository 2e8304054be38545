"""The experts of model.py in two other forms that PyTorch models use: einsum and gather.

Both compute the function of `model.LoopExperts` and save and load its `state_dict`, so one trained
model exports in each form. Their own parameters are stacked, one tensor for all experts.
"""
import torch
from torch import nn
from torch.nn import functional as F

PARTS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


class StackedExperts(nn.Module):
    """w1 [experts, hidden, dim], b1 [experts, hidden], w2 [experts, dim, hidden], b2 [experts, dim].

    In the `state_dict` they are the parameters of the single experts, named as in PARTS.
    """

    def __init__(self, experts, dim, hidden):
        super().__init__()
        fc1, fc2 = zip(*[(nn.Linear(dim, hidden), nn.Linear(hidden, dim)) for _ in range(experts)])
        self.w1 = nn.Parameter(torch.stack([layer.weight.detach() for layer in fc1]))
        self.b1 = nn.Parameter(torch.stack([layer.bias.detach() for layer in fc1]))
        self.w2 = nn.Parameter(torch.stack([layer.weight.detach() for layer in fc2]))
        self.b2 = nn.Parameter(torch.stack([layer.bias.detach() for layer in fc2]))
        self.register_state_dict_post_hook(self._unstack)
        self.register_load_state_dict_pre_hook(self._stack)

    @staticmethod
    def _unstack(module, state, prefix, metadata):
        for name, part in PARTS.items():
            for e, value in enumerate(state.pop(prefix + name)):
                state[f"{prefix}{e}.{part}"] = value

    @staticmethod
    def _stack(module, state, prefix, *_):
        for name, part in PARTS.items():
            parts = [state.pop(f"{prefix}{e}.{part}") for e in range(len(module.w1))]
            state[prefix + name] = torch.stack(parts)


class EinsumExperts(StackedExperts):
    """A one-hot combine matrix and einsum over the stacked experts."""

    def forward(self, x, indices, weights):
        one_hot = F.one_hot(indices, len(self.w1)).to(x.dtype)
        combine = (one_hot * weights.unsqueeze(-1)).sum(dim=1)
        hidden = F.gelu(torch.einsum("td,efd->tef", x, self.w1) + self.b1)
        out = torch.einsum("tef,edf->ted", hidden, self.w2) + self.b2
        return torch.einsum("ted,te->td", out, combine)


class GatherExperts(StackedExperts):
    """The weights of each token's chosen experts, gathered by index; one batched product."""

    def forward(self, x, indices, weights):
        hidden = self.w1[indices] @ x[:, None, :, None] + self.b1[indices].unsqueeze(-1)
        out = self.w2[indices] @ F.gelu(hidden) + self.b2[indices].unsqueeze(-1)
        return (out.squeeze(-1) * weights.unsqueeze(-1)).sum(dim=1)
