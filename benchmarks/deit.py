"""DeiT-tiny on simulated gateware: latency efficiency of a dense model of 197 tokens.

Twelve layers of 192 channels, 3 heads, hidden 768, a 224 x 224 image, 1,000 classes. Weights and image
come from seeded generators: cycles depend on neither.
"""

import argparse
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from configs import TARGETS
from m3vit_model import export
from measure import Model, counter_table, measure
from record import ROOT, record
from torch import nn

DIM, HEADS, LAYERS, HIDDEN, PATCH, SIZE, CLASSES = 192, 3, 12, 768, 16, 224, 1000
TOKENS = (SIZE // PATCH) ** 2 + 1
# What 197 tokens need more than the 129 of the reference model: a row has 24 words of activations and
# 48 of the stream, and normalised rows live beside hidden rows of 96 words.
MEMORIES = {"activation_words": 7680, "residual_words": 19456}


class Layer(nn.Module):
    """Float [batch, tokens, DIM] to the same."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, -1)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, DIM))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):
    """Image [batch, 3, SIZE, SIZE] to logits [batch, CLASSES]."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, TOKENS, DIM))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM, eps=1e-6), nn.Linear(DIM, CLASSES)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def main(arguments: argparse.Namespace) -> None:
    base = TARGETS[arguments.target]
    config = dataclasses.replace(base.config, **{
        name: max(words, getattr(base.config, name)) for name, words in MEMORIES.items()
        if arguments.target == "ecp5-85f"})
    target = dataclasses.replace(base, name=f"deit-{base.name}", config=config)
    torch.manual_seed(0)
    image = np.random.default_rng(0).uniform(-2, 2, (1, 3, SIZE, SIZE)).astype(np.float32)
    path = export(DeiT().eval(), image, ROOT / "build" / "deit" / "deit_tiny.onnx")
    found = measure(Model(path, {"image": image}), target, {"image": image},
                    compared=not arguments.cycles_only)
    more = ", ".join(f"{name} {getattr(config, name):,} for {getattr(base.config, name):,}"
                     for name in MEMORIES if getattr(config, name) != getattr(base.config, name))
    record(f"deit-{base.name}", f"DeiT-tiny, {base.name} configuration",
           f"Cycle-accurate simulation of the whole accelerator's RTL; {target.text}; clock "
           f"{target.clock}, {target.clock_hz / 1e6:g} MHz. Weights and image from seeded generators. Int8. "
           + (f"Larger memories than M3ViT-tiny's: {more}." if more else "The memories of M3ViT-tiny."),
           found.figures(),
           tables={"Blocks: work, least cycles of each resource": found.block_table(),
                   "Engines, share of the cycles": counter_table({"DeiT-tiny": found})},
           config=config.to_dict(), dram=dataclasses.asdict(target.dram),
           runs={"DeiT-tiny": found.to_json()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="ecp5-85f", choices=list(TARGETS))
    parser.add_argument("--cycles-only", action="store_true", help="compare outputs, not all layers")
    main(parser.parse_args())
