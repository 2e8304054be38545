"""Damaged ONNX files, seeded: each is a valid model with one thing broken.

A kind of damage is a function that breaks a copy of a model in place, or returns the bytes of its
file. ``weights.bin`` (64 bytes), ``sparse.bin`` (3 GB of nothing) and ``../outside.bin`` are
expected beside a file: external data refers to them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from . import constants, demands, file, nodes  # noqa: F401 - each registers its kinds
from .kinds import KINDS, Unfit

__all__ = ["KINDS", "Case", "case"]


@dataclass(frozen=True)
class Case:
    """A file ``name`` (its suffix says its format) with the bytes ``data``, and what was done."""

    seed: int
    kind: str
    model: str
    name: str
    data: bytes


def case(seed: int, models: Mapping[str, onnx.ModelProto]) -> Case:
    """The damaged file of ``seed``: the kinds take turns, all else is drawn."""
    kind = list(KINDS)[seed % len(KINDS)]
    draw = random.Random(seed)
    for name in draw.sample(sorted(models), len(models)):
        model = onnx.ModelProto()
        model.CopyFrom(models[name])
        try:
            data = KINDS[kind](model, draw)
        except Unfit:
            continue
        suffix = "onnxtxt" if kind == "text" else "onnx"
        return Case(seed, kind, name, f"damaged.{suffix}", data or model.SerializeToString())
    raise AssertionError(f"no model has anything for {kind!r}")
