"""The experts of one layer, each with integers of any width, and what these lose."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.reference import FUNCTIONS
from moeware.compiler.scales import function_table
from moeware.compiler.weights import Tensor, informed, nested_weights, scaled_weights
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q

__all__ = ["ExpertLayer"]

MEASURED_ROWS = 512  # of an expert's, spread over all

Half = tuple[np.ndarray, q.Affine]  # a product's weight and its scale


@dataclasses.dataclass
class ExpertLayer:
    """Experts before their weights have bits.

    name : of the node; constants : w1, b1, w2, b2, as `canonical` has them; source : what enters;
    hidden : what the function gives; before, after : (step, offset) of the function's two grids;
    rows : what enters each expert in calibration, float [rows, depth], and what the square of an error
    in its result counts for, [rows]; tokens : of each expert, in calibration; fixed : bits that the user gave an expert, or None;
    rest : the operation's other fields.
    """

    name: str
    function: str
    constants: Sequence[np.ndarray]
    source: Tensor
    hidden: Tensor
    before: tuple[float, float]
    after: tuple[float, float]
    stream_step: float
    rows: Sequence[tuple[np.ndarray, np.ndarray]]
    tokens: np.ndarray
    fixed: Sequence[int | None]
    rest: dict[str, str]

    def __post_init__(self):
        self.table = function_table(self.function, self.before, self.after)
        self._halves: dict[tuple[int, int], tuple[Half, Half]] = {}

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return self.constants[0][0].size + self.constants[2][0].size

    def operation(self, bits: Sequence[int]) -> q.Experts:
        """The quantised operation, with so many bits for each expert."""
        return self._operation([self._integers(e, b) for e, b in enumerate(bits)], bits)

    def nested(self) -> tuple[q.Experts, q.Experts]:
        """The quantised operation with experts of 8 bits, and with their upper 4."""
        halves = [list(zip(*self._products(e, nested_weights, True))) for e in range(len(self.tokens))]
        return tuple(self._operation([each[which] for each in halves], [bits] * len(halves))
                     for which, bits in enumerate((8, 4)))

    def _operation(self, halves: Sequence[tuple[Half, Half]], bits: Sequence[int]) -> q.Experts:
        ups, downs = zip(*halves)
        return q.Experts(name=self.name, table=self.table, up=np.stack([up for up, _ in ups]),
                         up_affine=_stacked([affine for _, affine in ups]),
                         down=np.stack([down for down, _ in downs]),
                         down_affine=_stacked([affine for _, affine in downs]),
                         bits=np.array(bits, np.uint8), **self.rest)

    def error(self, expert: int, bits: int) -> float:
        """Square of the outputs' relative error, as far as it is from a row that reaches an expert with
        integers of so many bits, on average over the rows in calibration."""
        rows, weight = self.rows[expert]
        stride = -(-len(rows) // MEASURED_ROWS)
        rows, weight = rows[::stride], weight[::stride]
        up, down = self._integers(expert, bits)
        hidden = self.table[_product(self._entering(rows), *up, 8).astype(np.int8).view(np.uint8)]
        found = _product(hidden, *down, 16) * self.stream_step
        w2, b2 = self.constants[2][expert], self.constants[3][expert]
        lost = found - (self._activation(rows, expert) @ w2.T + b2)
        return float((np.square(lost).sum(-1) * weight).mean())

    def _integers(self, expert: int, bits: int) -> tuple[Half, Half]:
        if (expert, bits) not in self._halves:
            def of_bits(*arguments):
                return scaled_weights(*arguments, limit=WEIGHT_BITS[bits])
            self._halves[expert, bits] = self._products(expert, of_bits, bits < 8)
        return self._halves[expert, bits]

    def _products(self, expert: int, quantiser: Callable, know: bool) -> tuple:
        """Both products by a function like `scaled_weights`; know : whether it wants to know what the
        weights meet."""
        w1, b1, w2, b2 = (array[expert] for array in self.constants)
        source, hidden = self.source, self.hidden
        if know:
            rows, weight = self.rows[expert]
            source = informed(source, rows, weight)
            hidden = informed(hidden, self._activation(rows, expert), weight)
        return (quantiser(w1, b1 - self.before[1], source, self.before[0], 8),
                quantiser(w2, b2, hidden, self.stream_step, 16))

    def _activation(self, rows: np.ndarray, expert: int) -> np.ndarray:
        w1, b1 = self.constants[0][expert], self.constants[1][expert]
        return FUNCTIONS[self.function](torch.from_numpy(rows @ w1.T + b1)).numpy()

    def _entering(self, rows: np.ndarray) -> np.ndarray:
        """Real rows as the integers of the source."""
        plain = rows - self.source.offset if self.source.shift is None else (
            rows - self.source.shift - self.source.offset)
        if self.source.gain is not None:
            plain = plain / np.where(self.source.gain, self.source.gain, np.inf)
        return np.clip(np.rint(plain / self.source.step), -128, 127)


def _product(rows: np.ndarray, weight: np.ndarray, affine: q.Affine, bits: int) -> np.ndarray:
    """Integers of a product, scaled; float64 sums int8 products exactly."""
    sums = rows.astype(np.float64) @ weight.T.astype(np.float64)
    return numerics.requantise(sums.astype(np.int64) + affine.bias, affine.multiplier.astype(np.int64),
                               affine.shift, bits)


def _stacked(affines: Sequence[q.Affine]) -> q.Affine:
    return q.Affine(**{field.name: np.stack([getattr(affine, field.name) for affine in affines])
                       for field in dataclasses.fields(q.Affine)})
