"""A small mixture-of-experts vision transformer for 8x8 digits, in plain PyTorch."""
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class FFN(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LoopExperts(nn.ModuleList):
    """Every expert runs on every token; a mask weight keeps the chosen ones."""

    def __init__(self, experts, dim, hidden):
        super().__init__(FFN(dim, hidden) for _ in range(experts))

    def forward(self, x, indices, weights):
        """x [tokens, dim], indices and weights [tokens, k] -> [tokens, dim]."""
        out = torch.zeros_like(x)
        for e, expert in enumerate(self):
            weight = ((indices == e) * weights).sum(dim=-1, keepdim=True)
            out = out + weight * expert(x)
        return out


class MoE(nn.Module):
    """Top-k of a softmax gate, renormalised over the chosen experts."""

    def __init__(self, dim, hidden, experts, top_k, experts_type):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = experts_type(experts, dim, hidden)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(tokens).softmax(dim=-1)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(tokens, indices, weights).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ffn

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class DigitsMoEViT(nn.Module):
    """image [batch, 1, 8, 8] float32 in 0..1 -> logits [batch, 10].

    `pool` is "class" (a class token) or "mean" (mean of the tokens). `experts_type` is the module
    that holds and runs the experts: `LoopExperts`, or one of forms.py with the same function.
    """

    def __init__(self, pool="class", experts_type=LoopExperts, dim=64, heads=4, depth=4,
                 ffn_hidden=128, experts=8, expert_hidden=64, top_k=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "class" else None
        tokens = 16 + (pool == "class")
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, MoE(dim, expert_hidden, experts, top_k, experts_type)
                  if i % 2 else FFN(dim, ffn_hidden))
            for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image):
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(dim=1))
