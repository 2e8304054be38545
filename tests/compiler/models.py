"""Vision transformers as different users write them: timm, Hugging Face, torch.nn, lucidrains, …"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MODELS", "Example"]


class Mlp(nn.Module):
    """Two layers with a function between; dropout, which evaluation removes."""

    def __init__(self, dim, hidden, function=None, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias), nn.Linear(hidden, dim, bias)
        self.function, self.drop = function or nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.function(self.fc1(x)))))


class Moe(nn.Module):
    """A list of `Mlp` experts that are looped over; softmax over all (then renormalised) or over the
    chosen."""

    def __init__(self, dim, hidden, experts, k, over="chosen", function=None, bias=True):
        super().__init__()
        self.gate, self.k, self.over = nn.Linear(dim, experts, bias=False), k, over
        self.experts = nn.ModuleList(Mlp(dim, hidden, function, bias) for _ in range(experts))

    def forward(self, x):
        logits = self.gate(x)
        if self.over == "chosen":
            weights, indices = logits.topk(self.k, -1)
            weights = weights.softmax(-1)
        else:
            weights, indices = logits.softmax(-1).topk(self.k, -1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            factor = torch.where(indices == number, weights, 0.0).sum(-1, keepdim=True)
            result = result + factor * expert(x)
        return result


class Attention(nn.Module):
    """timm: packed query, key, value."""

    def __init__(self, dim, heads, bias=True):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim, bias)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        x = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class HuggingFaceAttention(nn.Module):
    """Three projections; scores divided by the root of the head's width."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dense = nn.Linear(dim, dim)

    def split(self, x):
        return x.view(*x.size()[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.size**0.5
        context = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.size()[:-2], self.heads * self.size))


class LucidrainsAttention(nn.Module):
    """No biases, packed projection cut by `chunk`."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, False), nn.Linear(dim, dim, False)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2)
                   for t in self.to_qkv(x).chunk(3, dim=-1))
        weights = (torch.matmul(q, k.transpose(-1, -2)) * (d // self.heads) ** -0.5).softmax(-1)
        return self.to_out(torch.matmul(weights, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """Pre-norm, with layer scale where `scale` is given."""

    def __init__(self, dim, attention, mlp, scale=None, epsilon=1e-6):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=epsilon) for _ in range(2))
        self.attn, self.mlp = attention, mlp
        self.gamma1 = self.gamma2 = None
        if scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(scale * torch.rand(dim)) for _ in range(2))

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + (y if self.gamma1 is None else y * self.gamma1)
        y = self.mlp(self.norm2(x))
        return x + (y if self.gamma2 is None else y * self.gamma2)


class Timm(nn.Module):
    """timm's VisionTransformer: convolution, class token, positions, `norm_pre`, `fc_norm`."""

    def __init__(self, size, patch, dim, blocks, *, channels=3, classes=5, pool="token",
                 norm_pre=False, token=True, bias=True):
        super().__init__()
        rows = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if token else None
        self.pos_embed = nn.Parameter(torch.randn(1, rows + token, dim) * 0.02)
        self.norm_pre = nn.LayerNorm(dim) if norm_pre else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head, self.pool = nn.Linear(dim, classes, bias), pool

    def features(self, image):
        x = self.proj(image).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(self.norm_pre(x + self.pos_embed)))
        return x[:, 0] if self.pool == "token" else x.mean(dim=1)

    def forward(self, image):
        return self.head(self.features(image))


class Lucidrains(nn.Module):
    """Patches cut by a rearrangement into (row, column, channel) features, mean pooling."""

    def __init__(self, size, patch, dim, blocks, *, channels=3, classes=5, patch_norm=True):
        super().__init__()
        self.patch, self.channels = patch, channels
        features = patch * patch * channels
        norms = [nn.LayerNorm(features), nn.LayerNorm(dim)] if patch_norm else [nn.Identity()] * 2
        self.embed = nn.Sequential(norms[0], nn.Linear(features, dim), norms[1])
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, dim) * 0.1)
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, image):
        b, c, h, w = image.shape
        p = self.patch
        x = image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
        x = self.embed(x.reshape(b, (h // p) * (w // p), p * p * c)) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class HuggingFace(nn.Module):
    """ViTForImageClassification: the class token's row of the normalised last state."""

    def __init__(self, size, patch, dim, blocks, classes=5):
        super().__init__()
        self.projection = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.layer, self.layernorm = nn.ModuleList(blocks), nn.LayerNorm(dim, eps=1e-12)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, pixel_values):
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(pixel_values.shape[0], -1, -1), x), dim=1)
        x = x + self.position_embeddings
        for layer in self.layer:
            x = layer(x)
        return self.classifier(self.layernorm(x)[:, 0, :])


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder between a convolution and a head."""

    def __init__(self, size, patch, dim, heads, hidden, activation="gelu", classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, hidden, activation=activation,
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim),
                                             enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, image):
        x = self.conv(image).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))


class Around(nn.Module):
    """Operators of the host before and behind a model."""

    def __init__(self, inner, *, normalise=False, softmax=False):
        super().__init__()
        self.inner, self.normalise, self.softmax = inner, normalise, softmax
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, image):
        if self.normalise:
            image = (image - self.mean) / self.std
        logits = self.inner(image)
        return logits.softmax(-1) if self.softmax else logits


class Both(nn.Module):
    """Logits and pooled features of a `Timm` model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        features = self.inner.features(image)
        return self.inner.head(features), features


class Features(nn.Module):
    """Pooled features of a `Timm` model, without a head."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        return self.inner.features(image)


class Hidden(nn.Module):
    """Logits of a `Timm` model, and the stream after each block."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        inner = self.inner
        x = inner.proj(image).flatten(2).transpose(1, 2)
        x = torch.cat((inner.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + inner.pos_embed
        states = []
        for block in inner.blocks:
            x = block(x)
            states.append(x)
        return inner.head(inner.norm(x)[:, 0]), *states


class Camera(nn.Module):
    """Bytes [batch, height, width, channels] before a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        return self.inner((image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25)


class Odd(nn.Module):
    """A token mixer that the accelerator has no form for."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, rows) / rows)

    def forward(self, x):
        return torch.sin(torch.einsum("bnd,nm->bmd", x, self.weight))


@dataclass(frozen=True)
class Example:
    """A model, the shape and type of its image, and whether a part of it runs on the host."""

    model: nn.Module
    shape: tuple[int, int, int]
    host: bool = False
    dtype: type = np.float32

    def images(self, frames: int, seed: int) -> np.ndarray:
        """Random images [frames, *shape]."""
        draw = np.random.default_rng(seed)
        shape = frames, *self.shape
        if self.dtype == np.uint8:
            return draw.integers(0, 256, shape).astype(np.uint8)
        return draw.normal(size=shape).astype(self.dtype)


def timm(size=8, patch=4, dim=24, heads=3, hidden=40, depth=2, *, mlp=None, scale=None, bias=True,
         attention=None, channels=3, **options) -> Timm:
    blocks = [Block(dim, (attention or (lambda: Attention(dim, heads, bias)))(),
                    (mlp or (lambda: Mlp(dim, hidden, bias=bias)))(), scale) for _ in range(depth)]
    return Timm(size, patch, dim, blocks, bias=bias, channels=channels, **options)


def _blocks(dim, attention, hidden, depth=2, **options):
    return [Block(dim, attention(), Mlp(dim, hidden), **options) for _ in range(depth)]


MODELS = {
    "timm": lambda: Example(timm(), (3, 8, 8)),
    "timm-norm-pre": lambda: Example(timm(norm_pre=True), (3, 8, 8), host=True),
    "hugging-face": lambda: Example(
        HuggingFace(8, 4, 24, _blocks(24, lambda: HuggingFaceAttention(24, 4), 48, epsilon=1e-12)),
        (3, 8, 8)),
    "torch-encoder": lambda: Example(TorchEncoder(8, 2, 24, 3, 50), (3, 8, 8)),
    "torch-encoder-relu": lambda: Example(TorchEncoder(8, 4, 16, 2, 20, "relu"), (3, 8, 8)),
    "lucidrains": lambda: Example(
        Lucidrains(8, 4, 24, _blocks(24, lambda: LucidrainsAttention(24, 3), 40), patch_norm=False),
        (3, 8, 8)),
    "lucidrains-patch-norm": lambda: Example(
        Lucidrains(8, 4, 24, _blocks(24, lambda: LucidrainsAttention(24, 3), 40)), (3, 8, 8),
        host=True),
    "deit": lambda: Example(timm(32, 4, 192, 3, 768, 1), (3, 32, 32)),
    "twelve-heads": lambda: Example(timm(8, 4, 96, 12, 100), (3, 8, 8)),
    "odd-sizes": lambda: Example(timm(9, 3, 15, 5, 29, channels=2), (2, 9, 9)),
    "one-token": lambda: Example(timm(4, 4, 24, 3, token=False, pool="mean"), (3, 4, 4),
                                 host=True),
    "one-head": lambda: Example(timm(heads=1), (3, 8, 8)),
    "grey": lambda: Example(timm(channels=1), (1, 8, 8)),
    "gelu-tanh": lambda: Example(timm(mlp=lambda: Mlp(24, 40, nn.GELU("tanh"))), (3, 8, 8)),
    "silu": lambda: Example(timm(mlp=lambda: Mlp(24, 40, nn.SiLU())), (3, 8, 8)),
    "relu": lambda: Example(timm(mlp=lambda: Mlp(24, 40, nn.ReLU())), (3, 8, 8)),
    "no-biases": lambda: Example(timm(bias=False), (3, 8, 8)),
    "layer-scale": lambda: Example(timm(scale=0.3), (3, 8, 8)),
    "layer-scale-tiny": lambda: Example(timm(scale=1e-5), (3, 8, 8)),
    "one-expert": lambda: Example(timm(mlp=lambda: Moe(24, 40, 1, 1)), (3, 8, 8)),
    "top-1": lambda: Example(timm(mlp=lambda: Moe(24, 40, 4, 1, "all")), (3, 8, 8)),
    "sixteen-experts": lambda: Example(timm(mlp=lambda: Moe(24, 30, 16, 4)), (3, 8, 8)),
    "moe-no-biases": lambda: Example(
        timm(mlp=lambda: Moe(24, 30, 4, 2, function=nn.SiLU(), bias=False), bias=False), (3, 8, 8)),
    "normalised-image": lambda: Example(Around(timm(), normalise=True), (3, 8, 8), host=True),
    "softmax": lambda: Example(Around(timm(), softmax=True), (3, 8, 8), host=True),
    "odd-block": lambda: Example(timm(attention=lambda: Odd(5)), (3, 8, 8), host=True),
    "two-outputs": lambda: Example(Both(timm()), (3, 8, 8), host=True),
    "no-head": lambda: Example(Features(timm()), (3, 8, 8), host=True),
    "hidden-states": lambda: Example(Hidden(timm()), (3, 8, 8)),
    "camera": lambda: Example(Camera(timm()), (8, 8, 3), host=True, dtype=np.uint8),
}

