"""Cycles of a small MoE-ViT against its tokens and against its experts, one gateware for all.

A thin embedding, then the halves of one layer: attention and experts, on 64 channels, 2 heads, experts
of 128 hidden channels, two to a token. Weights and pixels come from seeded generators.
"""

import argparse
import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from configs import TARGETS, Target
from m3vit_model import export
from matplotlib.figure import Figure
from measure import Model, Run, measure, say
from record import ROOT, record
from torch import nn

from moeware.hw.arch.isa import Engine

PIXEL, DIM, HEADS, HIDDEN, CHOSEN = 16, 64, 2, 128, 2
TOKENS, EXPERTS = (32, 64, 128, 256, 512, 1024), (4, 8, 16, 32, 64)
FIXED_TOKENS, FIXED_EXPERTS = 128, 8
PLOT = ROOT / "docs" / "scaling.png"


class Block(nn.Module):
    """Float [batch, PIXEL, height, width] to [batch, height * width, DIM]: a token to a pixel."""

    def __init__(self, experts: int):
        super().__init__()
        self.embedding = nn.Conv2d(PIXEL, DIM, 1)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.gate = nn.Linear(DIM, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(DIM, HIDDEN) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, DIM) for _ in range(experts))

    def forward(self, image):
        x = self.embedding(image).flatten(2).transpose(1, 2)
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, -1)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, DIM))
        rows = self.norm2(x)
        weights, chosen = torch.softmax(self.gate(rows), -1).topk(CHOSEN, -1)
        total = torch.zeros_like(rows)
        for e, (up, down) in enumerate(zip(self.up, self.down)):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            total = total + weight * down(F.gelu(up(rows)))
        return x + total


def target() -> Target:
    """The ECP5-85F configuration with memories for 1,024 tokens and queues for 64 experts."""
    base = TARGETS["ecp5-85f"]
    return dataclasses.replace(base, name="scaling", config=dataclasses.replace(
        base.config, activation_words=16384, max_rows=1024,
        residual_words=1024 * DIM // base.config.lanes, max_experts=64))


def point(where: Target, tokens: int, experts: int) -> Run:
    torch.manual_seed(0)
    shape = (1, PIXEL, tokens // 8, 8)
    image = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    path = ROOT / "build" / "scaling" / f"block_{tokens}_{experts}.onnx"
    say(f"{tokens} tokens, {experts} experts")
    model = Model(export(Block(experts).eval(), image, path), {"image": image})
    return measure(model, where, {"image": image}, compared=False)


def working(run: Run) -> dict[str, float]:
    """Share of the cycles in which each engine worked: executed, and made progress."""
    return {engine.name.lower(): (run.counters[f"{engine.name.lower()}_busy"]
                                  - run.counters[f"{engine.name.lower()}_stalled"]) / run.cycles
            for engine in (Engine.LOAD, Engine.LINEAR, Engine.ATTENTION, Engine.NORM)}


def bus(run: Run) -> float:
    """Share of the bus's peak that was used."""
    beats = run.counters["read_beats"] + run.counters["write_beats"]
    return beats * run.target.config.bus_bytes / run.bytes_per_cycle / run.cycles


def knees(runs: dict[int, Run], what: str) -> list[str]:
    """Sentences, from the counters, about where the busiest resource changes."""
    def shares(run: Run) -> dict[str, float]:
        found = working(run)
        del found["load"]  # it works when a word moves: the bus says more
        return found | {"bus": bus(run)}
    sentences, before = [], None
    for count, run in runs.items():
        share = shares(run)
        busiest = max(share, key=share.get)
        if before is None:
            sentences.append(f"With {count} {what} the busiest is the {busiest} ({share[busiest]:.0%} of "
                             "the cycles).")
        elif busiest != before[1]:
            slope = _slope(before[0], count, runs)
            sentences.append(
                f"Knee between {before[0]} and {count} {what}: the busiest was the {before[1]} "
                f"({shares(runs[before[0]])[before[1]]:.0%}) and becomes the {busiest} "
                f"({share[busiest]:.0%}); cycles grow with the power {slope:.2f} of the {what} there.")
        before = count, busiest
    counts = list(runs)
    sentences.append(f"At the end cycles grow with the power {_slope(*counts[-2:], runs):.2f} of the "
                     f"{what}; at the beginning with {_slope(*counts[:2], runs):.2f}.")
    return sentences


def _slope(low: int, high: int, runs: dict[int, Run]) -> float:
    return math.log(runs[high].cycles / runs[low].cycles) / math.log(high / low)


def rows(runs: dict[int, Run], what: str) -> list[list[object]]:
    table: list[list[object]] = [[what, "cycles", "latency efficiency", "linear works",
                                  "attention works", "norm works", "bus used", "MMAC", "MB read"]]
    for count, run in runs.items():
        share = working(run)
        table.append([count, run.cycles, f"{run.latency_efficiency:.1%}",
                      *(f"{share[name]:.1%}" for name in ("linear", "attention", "norm")),
                      f"{bus(run):.1%}", round(run.macs / 1e6, 2),
                      round(run.counters["read_beats"] * run.target.config.bus_bytes / 1e6, 3)])
    return table


def plot(sweeps: dict[str, dict[int, Run]]) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for column, (what, runs) in enumerate(sweeps.items()):
        counts = list(runs)
        above, below = figure.add_subplot(2, 2, column + 1), figure.add_subplot(2, 2, column + 3)
        above.loglog(counts, [run.cycles for run in runs.values()], "o-", label="measured")
        above.loglog(counts, [run.cycles * run.latency_efficiency for run in runs.values()], "--",
                     label="least, block by block")
        above.set_ylabel("cycles")
        for name in ("linear", "attention", "norm"):
            below.semilogx(counts, [working(run)[name] for run in runs.values()], "o-", label=name)
        below.semilogx(counts, [bus(run) for run in runs.values()], "o-", label="bus")
        below.set_ylabel("share of the cycles at work")
        below.set_xlabel(what)
        for axes in (above, below):
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(PLOT, dpi=100)


def main(arguments: argparse.Namespace) -> None:
    where = target()
    sweeps = {
        "tokens": {tokens: point(where, tokens, FIXED_EXPERTS) for tokens in TOKENS
                   if tokens <= arguments.most_tokens},
        "experts": {experts: point(where, FIXED_TOKENS, experts) for experts in EXPERTS
                    if experts <= arguments.most_experts}}
    plot(sweeps)
    figures = {f"{count} {what}, cycles": run.cycles for what, runs in sweeps.items()
               for count, run in runs.items()}
    record("scaling", "Cycles against tokens and experts",
           f"A thin embedding, one attention half, one half of routed experts: {DIM} channels, {HEADS} heads, "
           f"experts of {HIDDEN} hidden channels, {CHOSEN} to a token; weights and image from seeded "
           f"generators. Cycle-accurate simulation of the whole accelerator's RTL; {where.text}; "
           f"{where.clock_hz / 1e6:g} MHz. Tokens vary with {FIXED_EXPERTS} experts, experts with "
           f"{FIXED_TOKENS} tokens. One gateware for all points: the ECP5-85F configuration with "
           "memories for 1,024 tokens and queues for 64 experts.", figures,
           tables={f"{what.capitalize()}, and what limits": rows(runs, what)
                   for what, runs in sweeps.items()},
           notes=[sentence for what, runs in sweeps.items() for sentence in knees(runs, what)],
           plot=str(PLOT.relative_to(ROOT / "docs")), config=where.config.to_dict(),
           runs={what: {count: run.to_json() for count, run in runs.items()}
                 for what, runs in sweeps.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-tokens", type=int, default=TOKENS[-1])
    parser.add_argument("--most-experts", type=int, default=EXPERTS[-1])
    main(parser.parse_args())
