"""Grids of hidden layers, ``f(W1 x + b1)``, and of gated ones, ``f(W1 x + b1) * (W3 x + b3)``: an int8
value times a 16-bit factor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeware.compiler.scales import FUNCTION, function_table, grid, shifted_grid
from moeware.compiler.weights import Tensor
from moeware.hw.arch.numerics import PRODUCT_BITS

__all__ = ["GATED_STAGES", "STAGES", "Hidden", "gated_hidden", "plain_hidden"]

STAGES = ("hidden", "activation")
GATED_STAGES = (*STAGES, "factor", "product")
REACH = 1 << (15 - PRODUCT_BITS)  # of the factor, in steps of the product over steps of the value

Samples = Mapping[str, Sequence[np.ndarray]]  # by stage, float [rows, hidden] of each expert


@dataclass(frozen=True)
class Hidden:
    """Grids of one expert's hidden layer, or of a dense one.

    before : (step, offset) of what the function takes; table : of the function, None where there is
    none; made : what the layer gives, without a name; factor : step of the factor, [hidden], None
    without a gate.
    """

    before: tuple[float, float]
    table: np.ndarray | None
    made: Tensor
    factor: np.ndarray | None = None


def plain_hidden(function: str, samples: Samples) -> list[Hidden]:
    """The grids of each expert, which are those of all of them. samples : a few may have no rows."""
    hidden, activation = (np.concatenate(samples[stage]) for stage in STAGES)
    before, after = shifted_grid(hidden, of=FUNCTION[function]), shifted_grid(activation)
    made = Tensor("", after[0], offset=after[1], mean=activation.mean(0))
    return [Hidden(before, function_table(function, before, after), made)] * len(samples["hidden"])


def gated_hidden(function: str | None, samples: Samples, demand: np.ndarray,
                 kept: Mapping[str, tuple[float, float] | None] | None = None, *,
                 whole: bool = False) -> list[Hidden]:
    """The grids of each expert.

    function : of the gate, or None; samples : a few may have no rows; demand : largest weight that
    each channel of the product meets, [experts, hidden]; kept : step and offset by stage, of grids
    that the model came with; whole : whether the weights behind are kept, so that nothing can be
    folded into them and all channels of the product have one scale.

    Else the factor has a scale for each channel, and so has the product: tensor and weights share the
    rounding error (SmoothQuant, Xiao et al. 2023, section 4, alpha = 1/2).
    """
    hidden, activation, _, product = (np.concatenate(samples[stage]) for stage in GATED_STAGES)
    kept = kept or {}
    value, _ = kept.get("activation") or (grid(activation), 0.0)
    before, table = (value, 0.0), None
    if function is not None:
        before = kept.get("hidden") or shifted_grid(hidden, of=FUNCTION[function])
        table = function_table(function, before, (value, 0.0))
    other = grid(product)  # of an expert that no row reached
    one = kept.get("product") or ((other, 0.0) if whole else None)
    scales = []
    for factor, own, weights in zip(samples["factor"], samples["product"], demand, strict=True):
        # The factor fits into 16 bits, with a bit to spare for what calibration has not seen.
        least = 2 * value * np.abs(factor).max(0, initial=0.0) / REACH
        scales.append(np.maximum(one[0] if one else _scale(own, weights, other), least))
    if one:
        scales = [np.full_like(scale, np.max(scales)) for scale in scales]
    found = []
    for own, scale in zip(samples["product"], scales, strict=True):
        mean = own.sum(0) / max(1, len(own))
        made = (Tensor("", float(scale[0]), mean=mean) if one
                else Tensor("", 1.0, gain=scale, mean=mean / scale))
        found.append(Hidden(before, table, made, scale / (value * (1 << PRODUCT_BITS))))
    return found


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
