"""A small mixture-of-experts language model in the style of OLMoE (Muennighoff et al. 2024), in
plain PyTorch: RMSNorm, rotary positions, normalised queries and keys, experts with SwiGLU."""
import torch
from torch import nn
from torch.nn import functional as F


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim, heads, context):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        half = dim // heads // 2
        angles = torch.arange(context)[:, None] * 1e4 ** (-torch.arange(half) / half)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x):
        def split(rows):
            return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turn(heads):
            return heads * self.cos + rotate_half(heads) * self.sin

        q, k = turn(split(self.q_norm(self.q(x)))), turn(split(self.k_norm(self.k(x))))
        mixed = F.scaled_dot_product_attention(q, k, split(self.v(x)), is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """SwiGLU experts, the weights of all in one tensor; each token's result is that of the chosen
    ones, weighted by the softmax of the router."""

    def __init__(self, dim, hidden, experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.randn(experts, hidden, dim) * dim ** -0.5)
                            for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden) * hidden ** -0.5)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        probabilities = self.gate(tokens).softmax(dim=-1)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        chosen = F.one_hot(indices, len(self.w1)).to(x.dtype) * weights.unsqueeze(-1)
        hidden = F.silu(torch.einsum("td,efd->tef", tokens, self.w1))
        hidden = hidden * torch.einsum("td,efd->tef", tokens, self.w3)
        each = torch.einsum("tef,edf->ted", hidden, self.w2)
        return torch.einsum("ted,te->td", each, chosen.sum(dim=1)).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, dim, heads, context, **experts):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads, context)
        self.experts = Experts(dim, **experts)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.experts(self.norm2(x))


class PydocMoE(nn.Module):
    """ids [batch, context] int64 -> logits [batch, context, characters] of the next character."""

    def __init__(self, characters, context, dim=64, heads=4, depth=3, hidden=64, experts=8, top_k=2):
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, context, hidden=hidden, experts=experts, top_k=top_k)
            for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, characters, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
