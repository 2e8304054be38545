"""Bits for each expert under a budget of bytes: an integer program.

For each expert of 8, 4 and 2 bits one is chosen such that all of them keep to the budget and the sum
of what they lose is least: measured error times how often the expert is chosen (MC-MoE, Huang et al.
2024, pre-loading mixed-precision quantisation). The error is that of the expert's integers, made as they will be used, weighted by
its gate weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from moeware.compiler.errors import CompileError
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.quantise.expert_layer import ExpertLayer
from moeware.hw.arch.config import Config

__all__ = ["Allocation", "allocate_bits", "stored_bits"]

WIDTHS = tuple(sorted(WEIGHT_BITS, reverse=True))


@dataclass(frozen=True)
class Allocation:
    """Bits of all experts.

    wanted : average bits that were asked for; average, bytes : as stored; bits : of each expert, by
    layer; error : root of the outputs' expected relative square error that is from experts, and
    `uniform_errors` those with 8, 4 or 2 bits for each.
    """

    wanted: float
    average: float
    bytes: int
    bits: dict[str, list[int]]
    error: float
    uniform_errors: dict[int, float]

    def to_dict(self) -> dict:
        return {"wanted": self.wanted, "average": self.average, "bytes": self.bytes,
                "layers": self.bits, "error": self.error,
                "uniform_errors": {str(bits): error for bits, error in self.uniform_errors.items()}}


def stored_bits(bits: int, config: Config) -> int:
    """Bits that a weight takes in DRAM: with `Config.narrow` ternary weights stay two to a byte."""
    return max(bits, 4) if config.narrow else bits


def allocate_bits(layers: Sequence[ExpertLayer], average: float, config: Config,
                  frames: int) -> Allocation:
    """The bits that lose least.

    layers : of all device steps; those of one name are variants of one layer, and get the same bits.
    average : of the weights of all experts, as stored for `config`; frames : whose tokens the layers
    count.

    Raises
    ------
    CompileError
        There are no experts, or no choice of bits has this average.
    """
    by_name: dict[str, list[ExpertLayer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    experts = [(name, expert) for name, alike in by_name.items()
               for expert in range(len(alike[0].tokens))]
    if not experts:
        raise CompileError("Average bits of experts must be given for a model with experts that a router "
                           "chooses, on the accelerator: this one has none (`moeware check` says why)")
    cost = np.array([stored_bits(bits, config) for bits in WIDTHS])
    sizes = np.array([by_name[name][0].expert_weights for name, _ in experts], np.float64)
    # An expert that nothing reached may be reached tomorrow: one token more for each.
    lost = np.array([[np.mean([layer.error(expert, bits) * (layer.tokens[expert] + 1) / frames
                               for layer in by_name[name]]) for bits in WIDTHS]
                     for name, expert in experts])
    allowed = np.array([[by_name[name][0].fixed[expert] in (None, bits) for bits in WIDTHS]
                        for name, expert in experts])
    _check(average, cost, sizes, allowed, config)
    chosen = _solved(lost, sizes[:, None] * cost, average * sizes.sum(), allowed)
    bits: dict[str, list[int]] = {name: [] for name in by_name}
    for (name, _), place in zip(experts, chosen, strict=True):
        bits[name].append(WIDTHS[place])
    stored = float(sizes @ cost[chosen])
    return Allocation(
        wanted=float(average), average=stored / sizes.sum(), bytes=int(stored / 8), bits=bits,
        error=float(np.sqrt(lost[np.arange(len(lost)), chosen].sum())),
        uniform_errors={width: float(np.sqrt(total))
                        for width, total in zip(WIDTHS, lost.sum(0))})


def _check(average: float, cost: np.ndarray, sizes: np.ndarray, allowed: np.ndarray,
           config: Config) -> None:
    """Refuse a budget that cannot be met, or not be spent."""
    if not cost.min() <= average <= cost.max():
        why = (", as Config.narrow stores ternary weights like those of 4 bits" if config.narrow
               else "")
        raise CompileError(f"Average bits of experts must be between {cost.min()} and {cost.max()}"
                           f"{why}, not {average:g}")
    least = sizes @ np.where(allowed, cost, cost.max()).min(1) / sizes.sum()
    if average < least:
        raise CompileError(f"Average bits of experts must be {least:g} or more beside the bits that "
                           f"are given to single experts, not {average:g}: give fewer of them bits")


def _solved(lost: np.ndarray, size: np.ndarray, budget: float, allowed: np.ndarray) -> np.ndarray:
    """Column of each row, such that the sum of `lost` is least and that of `size` within budget."""
    rows, columns = lost.shape
    one = csr_array((np.ones(lost.size), (np.arange(lost.size) // columns, np.arange(lost.size))))
    unit = size.max()  # numbers near 1 are what the solver's tolerances are made for
    found = milp(lost.ravel() / max(lost.max(), 1e-300), integrality=np.ones(lost.size),
                 bounds=Bounds(0, allowed.ravel().astype(float)),
                 constraints=[LinearConstraint(one, 1, 1),
                              LinearConstraint(size.reshape(1, -1) / unit, -np.inf,
                                               budget / unit * (1 + 1e-9))])
    if found.x is None:
        raise CompileError(f"Bits of experts must be found by the integer program, which says: "
                           f"{found.message}")
    return found.x.reshape(rows, columns).argmax(1)
