"""M3ViT-tiny as the open Edge-MoE and UbiMoE designs ship it, with their trained weights.

Twelve layers of 192 channels and 3 heads on 129 tokens of a 128 x 256 image; odd layers have 16
experts, of which a token takes two by one gate matrix per task. The trained expert matrices are not
part of the data: experts are filled from a seeded generator, with the standard deviations of the dense
layer before.
"""

import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from record import ROOT
from torch import nn

__all__ = ["DATA", "DIM", "EXPERTS_NOTE", "TOKENS", "M3ViT", "export", "load"]

DATA = Path("..", "shared", "m3vit", "m3vit_tiny_cityscapes.npz")  # below the repository's root
EXPERTS_NOTE = ("Trained weights but for the expert matrices, which come from a seeded generator "
                "scaled like the dense layers; so no accuracy is claimed behind layer 1's gate.")
DIM, HEADS, TOKENS, LAYERS, EXPERTS, HIDDEN, CHOSEN = 192, 3, 129, 12, 16, 384, 2


class Attention(nn.Module):
    """Float [batch, tokens, DIM] to the same."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, DIM))


class FeedForward(nn.Module):
    """The dense half of an even layer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Experts(nn.Module):
    """The half of an odd layer: softmax over all experts, the two largest, not renormalised."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, DIM))
        self.b1 = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        self.w2 = nn.Parameter(torch.zeros(EXPERTS, DIM, HIDDEN))
        self.b2 = nn.Parameter(torch.zeros(EXPERTS, DIM))

    def forward(self, x):
        batch, tokens, _ = x.shape
        rows = x.reshape(-1, DIM)
        weights, chosen = torch.softmax(self.gate(rows), -1).topk(CHOSEN, -1)
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            hidden = F.gelu(F.linear(rows, self.w1[e], self.b1[e]))
            out = out + weight * F.linear(hidden, self.w2[e], self.b2[e])
        return out.reshape(batch, tokens, DIM)


class Layer(nn.Module):
    def __init__(self, experts: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attention = Attention()
        self.feed_forward = Experts() if experts else FeedForward()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class M3ViT(nn.Module):
    """Image [batch, 3, 128, 256] to tokens [batch, 129, 192], the class token first."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.positions = nn.Parameter(torch.zeros(1, TOKENS, DIM))
        self.layers = nn.ModuleList([Layer(experts=index % 2 == 1) for index in range(LAYERS)])

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return x


def load(path: Path, task: int, seed: int = 0) -> tuple[M3ViT, np.ndarray]:
    """The model of a task (0 or 1) and the image float32 [1, 3, 128, 256].

    Exits with a line that says so where the file is missing.
    """
    path = path if path.is_absolute() else ROOT / path
    if not path.is_file():
        sys.exit(f"M3ViT needs {path.name}, which is not at {path}: name it with --data")
    with np.load(path) as archive:
        arrays = dict(archive)
    model, generator = M3ViT(), np.random.default_rng(seed)

    def fill(parameter: torch.Tensor, values: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(np.asarray(values, np.float32)).reshape(parameter.shape))

    with torch.no_grad():
        fill(model.positions, arrays["pos_embed"])
        _fill_linear(model.patch, arrays, "patch_embed")
        for index, layer in enumerate(model.layers):
            def name(part: str) -> str:
                return f"l{index}_{part}"
            for module, part in ((layer.norm1, "norm1"), (layer.norm2, "norm2"),
                                 (layer.attention.qkv, "qkv"), (layer.attention.proj, "attn_proj")):
                _fill_linear(module, arrays, name(part))
            half = layer.feed_forward
            if isinstance(half, FeedForward):
                _fill_linear(half.fc1, arrays, name("fc1"))
                _fill_linear(half.fc2, arrays, name("fc2"))
                deviations = half.fc1.weight.std().item(), half.fc2.weight.std().item()
                continue
            fill(half.gate.weight, arrays[name(f"w_gate_T_task{task}")])
            for weight, deviation in zip((half.w1, half.w2), deviations):
                fill(weight, generator.normal(0, deviation, tuple(weight.shape)))
            fill(half.b1, arrays[name("htoh4_bias")])
            fill(half.b2, arrays[name("h4toh_bias")])
    return model.eval(), arrays["image"][None].astype(np.float32)


def _fill_linear(module: nn.Module, arrays: dict[str, np.ndarray], name: str) -> None:
    module.weight.copy_(torch.from_numpy(arrays[f"{name}_weight"]))
    module.bias.copy_(torch.from_numpy(arrays[f"{name}_bias"]))


def export(model: nn.Module, image: np.ndarray, path: Path) -> Path:
    """Write the model as ONNX, as PyTorch exports it, with the input "image"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it names what is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.from_numpy(image),), str(path), dynamo=True,
                          external_data=False, input_names=["image"], output_names=["tokens"],
                          verbose=False)
    return path
