"""The experts of one layer, each with integers of any width, and what these lose."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moeware.compiler.kept import Kept
from moeware.compiler.kept_weights import NARROW, give_up, kept_or_scaled
from moeware.compiler.operators import FUNCTIONS
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.quantise.hidden import Hidden
from moeware.compiler.weights import Tensor, informed, nested_weights, scaled_weights
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q

__all__ = ["ExpertLayer"]

MEASURED_ROWS = 512  # of an expert's, spread over all

Product = tuple[np.ndarray, q.Affine]  # its weight and its scale


@dataclasses.dataclass
class ExpertLayer:
    """Experts before their weights have bits.

    name : of the node; constants : w1, b1, w2, b2 and, with a gate, w3, b3, as `canonical` has them;
    kept : scales that the model came with; source : what enters; hidden : grids of each expert's hidden
    layer; rows : what enters each expert in calibration, float [rows, depth], and what the square of an
    error in its result counts for, [rows]; tokens : of each expert, in calibration; fixed : bits that
    the user gave an expert, or None; rest : the operation's other fields.
    """

    name: str
    function: str
    constants: Sequence[np.ndarray]
    kept: Kept
    source: Tensor
    hidden: Sequence[Hidden]
    stream_step: float
    rows: Sequence[tuple[np.ndarray, np.ndarray]]
    tokens: np.ndarray
    fixed: Sequence[int | None]
    rest: dict[str, str]

    def __post_init__(self):
        self._known: dict[tuple[int, int], dict[str, Product]] = {}

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return sum(weight[0].size for weight in self.constants[::2])

    def operation(self, bits: Sequence[int]) -> q.Experts:
        """The quantised operation, with so many bits for each expert."""
        for e, each in enumerate(bits):
            if each < 8:
                self.give_up(e, NARROW.format(each))
        return self._operation([self._integers(e, b) for e, b in enumerate(bits)], bits)

    def give_up(self, expert: int, reason: str) -> None:
        """Note why an expert's weights are none that they came with."""
        for weight in self.constants[::2]:
            give_up(self.kept, weight[expert], reason)

    def nested(self) -> tuple[q.Experts, q.Experts]:
        """The quantised operation with experts of 8 bits, and with their upper 4."""
        pairs = [self._products(e, nested_weights, True) for e in range(len(self.tokens))]
        return tuple(self._operation([{name: pair[which] for name, pair in each.items()}
                                      for each in pairs], [bits] * len(pairs))
                     for which, bits in enumerate((8, 4)))

    def _operation(self, products: Sequence[dict[str, Product]], bits: Sequence[int]) -> q.Experts:
        fields: dict[str, Any] = {}
        for name in products[0]:
            weights, affines = zip(*(each[name] for each in products))
            fields |= {name: np.stack(weights), f"{name}_affine": _stacked(affines)}
        return q.Experts(name=self.name, table=self.hidden[0].table, bits=np.array(bits, np.uint8),
                         **fields, **self.rest)

    def error(self, expert: int, bits: int) -> float:
        """Square of the outputs' relative error, as far as it is from a row that reaches an expert with
        integers of so many bits, on average over the rows in calibration."""
        rows, weight = self.rows[expert]
        stride = -(-len(rows) // MEASURED_ROWS)
        rows, weight = rows[::stride], weight[::stride]
        found = self._result(rows, expert, self._integers(expert, bits))
        w2, b2 = self.constants[2][expert], self.constants[3][expert]
        lost = found - (self._made(rows, expert) @ w2.T + b2)
        return float((np.square(lost).sum(-1) * weight).mean())

    def _integers(self, expert: int, bits: int) -> dict[str, Product]:
        if (expert, bits) not in self._known:
            def of_bits(*arguments):
                if bits == 8:
                    return kept_or_scaled(self.kept, *arguments)
                return scaled_weights(*arguments, limit=WEIGHT_BITS[bits])
            self._known[expert, bits] = self._products(expert, of_bits, bits < 8)
        return self._known[expert, bits]

    def _products(self, expert: int, quantiser: Callable, know: bool) -> dict[str, Any]:
        """What a function like `scaled_weights` makes of each product, by the operation's field; know :
        whether it wants to know what the weights meet."""
        w1, b1, w2, b2, *third = (array[expert] for array in self.constants)
        source, hidden = self.source, self.hidden[expert]
        made = hidden.made
        if know:
            rows, weight = self.rows[expert]
            source = informed(source, rows, weight)
            made = informed(made, self._made(rows, expert), weight)
        step, offset = hidden.before
        first = quantiser(w1, b1 - offset, source, step, 8)
        down = quantiser(w2, b2, made, self.stream_step, 16)
        if not third:
            return {"up": first, "down": down}
        return {"gate": first, "up": quantiser(*third, source, hidden.factor, 16), "down": down}

    def _made(self, rows: np.ndarray, expert: int) -> np.ndarray:
        """The hidden values of real rows."""
        w1, b1, _, _, *third = (array[expert] for array in self.constants)
        value = FUNCTIONS[self.function](torch.from_numpy(rows @ w1.T + b1)).numpy()
        return value * (rows @ third[0].T + third[1]) if third else value

    def _result(self, rows: np.ndarray, expert: int, products: dict[str, Product]) -> np.ndarray:
        """What integers make of real rows."""
        entering = self._entering(rows)
        first = _product(entering, *products.get("gate", products["up"]), 8)
        value = self.hidden[expert].table[first.astype(np.int8).view(np.uint8)]
        if "gate" in products:
            value = numerics.product(value, _product(entering, *products["up"], 16))
        return _product(value, *products["down"], 16) * self.stream_step

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
