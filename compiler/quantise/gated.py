"""Gated hidden layers, ``f(W1 x + b1) * (W3 x + b3)``: an int8 value times a 16-bit factor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeware.compiler.scales import FUNCTION, function_table, grid, shifted_grid
from moeware.compiler.weights import Tensor, scaled_weights
from moeware.hw.arch.numerics import PRODUCT_BITS
from moeware.hw.arch.quantised import Affine

__all__ = ["STAGES", "Gated", "gated_layers"]

STAGES = ("hidden", "activation", "factor", "product")
REACH = 1 << (15 - PRODUCT_BITS)  # of the factor, in steps of the product over steps of the value


@dataclass(frozen=True)
class Gated:
    """The two layers of each expert, as `quantised.Experts` has them, and what they make: a product
    of ``scale * integer``, whose integers have the `mean`; both [experts, hidden]."""

    gate: np.ndarray
    gate_affine: Affine
    up: np.ndarray
    up_affine: Affine
    table: np.ndarray | None
    scale: np.ndarray
    mean: np.ndarray


def gated_layers(gate: tuple[np.ndarray, np.ndarray], up: tuple[np.ndarray, np.ndarray],
                 source: Tensor, function: str | None,
                 samples: Sequence[Mapping[str, np.ndarray]], demand: np.ndarray,
                 limit: np.ndarray) -> Gated:
    """Quantise the layers of gate and factor.

    gate, up : weight [experts, hidden, depth] and bias [experts, hidden]; function : of the gate, or
    None; samples : by stage, float [rows, hidden] for each expert, of which a few may have no rows;
    demand : largest weight that each channel of the product meets, [experts, hidden]; limit : largest
    integer of each expert's weights.

    The factor has a scale for each channel, and so has the product: tensor and weights share the
    rounding error (SmoothQuant, Xiao et al. 2023, section 4, alpha = 1/2).
    """
    every = {stage: np.concatenate([each[stage] for each in samples]) for stage in STAGES}
    value = grid(every["activation"])
    before, table = (value, 0.0), None
    if function is not None:
        before = shifted_grid(every["hidden"], of=FUNCTION[function])
        table = function_table(function, before, (value, 0.0))
    other = grid(every["product"])  # of an expert that no row reached
    scale = np.stack([_scale(each["product"], weights, other)
                      for each, weights in zip(samples, demand, strict=True)])
    # The factor fits into 16 bits, with a bit to spare for what calibration has not seen.
    largest = np.stack([np.abs(each["factor"]).max(0, initial=0.0) for each in samples])
    scale = np.maximum(scale, 2 * value * largest / REACH)
    gate_weight, gate_affine = scaled_weights(gate[0], gate[1] - before[1], source, before[0],
                                              limit=limit)
    up_weight, up_affine = scaled_weights(*up, source, scale / (value * (1 << PRODUCT_BITS)), 16,
                                          limit=limit)
    mean = np.stack([each["product"].sum(0) / max(1, len(each["product"])) for each in samples])
    return Gated(gate_weight, gate_affine, up_weight, up_affine, table, scale, mean / scale)


def _scale(product: np.ndarray, demand: np.ndarray, other: float) -> np.ndarray:
    """The step of each channel of one expert's product."""
    largest = np.abs(product).max(0, initial=0.0)
    usable = (largest > 0) & (demand > 0)
    if not usable.any():
        return np.full(len(demand), other)
    balance = np.ones(len(demand))
    balance[usable] = np.sqrt(largest[usable] / demand[usable])
    balance = np.clip(balance / np.median(balance[usable]), 1 / 64, 64)
    return balance * grid(product / balance)
