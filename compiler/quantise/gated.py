"""Gated hidden layers, ``f(W1 x + b1) * (W3 x + b3)``: an int8 value times a 16-bit factor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeware.compiler.scales import FUNCTION, function_table, grid, shifted_grid
from moeware.compiler.weights import Tensor
from moeware.hw.arch.numerics import PRODUCT_BITS
from moeware.hw.arch.quantised import Affine

__all__ = ["STAGES", "Gated", "gated_layers"]

STAGES = ("hidden", "activation", "factor", "product")
REACH = 1 << (15 - PRODUCT_BITS)  # of the factor, in steps of the product over steps of the value


@dataclass(frozen=True)
class Gated:
    """The two layers of each expert, as `quantised.Experts` has them, and what they make: a product
    of ``gain * step * integer``, and its `mean` over the gain; both [experts, hidden], gain None for
    1."""

    gate: np.ndarray
    gate_affine: Affine
    up: np.ndarray
    up_affine: Affine
    table: np.ndarray | None
    step: float
    gain: np.ndarray | None
    mean: np.ndarray


def gated_layers(gate: tuple[np.ndarray, np.ndarray], up: tuple[np.ndarray, np.ndarray],
                 source: Tensor, function: str | None,
                 samples: Sequence[Mapping[str, np.ndarray]], demand: np.ndarray,
                 quantiser: Callable, kept: Mapping[str, tuple[float, float] | None] | None = None, *,
                 whole: bool = False) -> Gated:
    """Quantise the layers of gate and factor.

    gate, up : weight [experts, hidden, depth] and bias [experts, hidden]; function : of the gate, or
    None; samples : by stage, float [rows, hidden] for each expert, of which a few may have no rows;
    demand : largest weight that each channel of the product meets, [experts, hidden]; quantiser :
    a function like `scaled_weights`; kept : step and offset by stage, of grids that the model came
    with; whole : whether the weights behind are kept, so that nothing can be folded into them and all
    channels of the product have one scale.

    Else the factor has a scale for each channel, and so has the product: tensor and weights share the
    rounding error (SmoothQuant, Xiao et al. 2023, section 4, alpha = 1/2).
    """
    every = {stage: np.concatenate([each[stage] for each in samples]) for stage in STAGES}
    kept = kept or {}
    value, _ = kept.get("activation") or (grid(every["activation"]), 0.0)
    before, table = (value, 0.0), None
    if function is not None:
        before = kept.get("hidden") or shifted_grid(every["hidden"], of=FUNCTION[function])
        table = function_table(function, before, (value, 0.0))
    other = grid(every["product"])  # of an expert that no row reached
    product = kept.get("product") or (other, 0.0)
    one = whole or kept.get("product") is not None
    scale = np.stack([np.full(len(weights), product[0]) if one
                      else _scale(each["product"], weights, other)
                      for each, weights in zip(samples, demand, strict=True)])
    # The factor fits into 16 bits, with a bit to spare for what calibration has not seen.
    largest = np.stack([np.abs(each["factor"]).max(0, initial=0.0) for each in samples])
    scale = np.maximum(scale, 2 * value * largest / REACH)
    scale = np.full(scale.shape, scale.max()) if one else scale
    gate_weight, gate_affine = quantiser(gate[0], gate[1] - before[1], source, before[0])
    up_weight, up_affine = quantiser(*up, source, scale / (value * (1 << PRODUCT_BITS)), 16)
    mean = np.stack([each["product"].sum(0) / max(1, len(each["product"])) for each in samples])
    step, gain = (float(scale.max()), None) if one else (1.0, scale)
    return Gated(gate_weight, gate_affine, up_weight, up_affine, table, step, gain, mean / scale * step)


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
