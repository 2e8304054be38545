"""The quantised graph: what a program computes, layer by layer, in integers.

It is the reference that the instruction stream is lowered from, and what the PyTorch path executes.
Every operation reads and writes named tensors of one frame:

- *activation*: int8 [rows, channels];
- *residual*: int16 [rows, channels], the residual stream (and wide results such as logits);
- *route*: for each row the chosen experts, int64 [rows, chosen], and their gate weights 0..65535.

An operation never changes a tensor; `output` is a new name. Arithmetic is that of `numerics`;
"scaled by" an `Affine` means `numerics.requantise(value + bias, multiplier, shift)` per channel.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .isa import NormMode
from .nested import upper_half

__all__ = [
    "OPERATIONS",
    "AddLinear",
    "Affine",
    "Attention",
    "Constant",
    "Experts",
    "Linear",
    "Norm",
    "Operation",
    "Route",
    "array_key",
    "from_arrays",
    "halves",
    "keep",
    "to_arrays",
]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Per-channel bias and scale; each array has the channels as its last axis.

    bias : int32; multiplier : uint16; shift : uint8, 1..47.
    """

    bias: np.ndarray
    multiplier: np.ndarray
    shift: np.ndarray

    def part(self, index) -> "Affine":
        """That of an expert, or of some channels: each array at `index`."""
        return Affine(bias=self.bias[index], multiplier=self.multiplier[index],
                      shift=self.shift[index])


@dataclass(frozen=True, kw_only=True)
class Operation:
    """name : of the layer, as the user's ONNX file has it; output : the tensor it defines."""

    name: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Constant(Operation):
    """Residual tensor with a fixed value, int16 [rows, channels] (class token and positions)."""

    value: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Linear(Operation):
    """Activation ``table[source @ weight.T scaled by affine]``; with a gate `numerics.product` of
    ``table[source @ gate.T scaled by gate_affine]`` and ``source @ weight.T scaled by affine`` (int16).

    weight, gate : int8 [channels, depth]; bits : that hold them, 8, or 4 where all are between -7 and
    7, or 2 where all are between -1 and 1; table : int8 [256], indexed by the result as an unsigned
    byte, or None.
    """

    source: str
    weight: np.ndarray
    affine: Affine
    table: np.ndarray | None
    bits: int = 8
    gate: np.ndarray | None = None
    gate_affine: Affine | None = None

    @property
    def row_macs(self) -> int:
        """Multiply-accumulates of a row."""
        return self.weight.size * (1 if self.gate is None else 2)


@dataclass(frozen=True, kw_only=True)
class AddLinear(Operation):
    """Residual tensor with ``source @ weight.T scaled by affine`` (int16) added, saturating, to the
    rows of `residual` from `first_row` on; all by itself where `residual` is None."""

    source: str
    residual: str | None
    first_row: int
    weight: np.ndarray
    affine: Affine
    bits: int = 8

    @property
    def row_macs(self) -> int:
        """Multiply-accumulates of a row; channels of zeros, which another product makes, have none."""
        return int(self.weight.any(1).sum()) * self.weight.shape[1]


@dataclass(frozen=True, kw_only=True)
class Norm(Operation):
    """Activation: rows [first_row, first_row + rows) of a residual tensor, normalised and scaled.

    epsilon : as `numerics.normalise` takes it; mode SCALE takes the value itself. groups : equal
    parts of a row that are normalised each by itself. rotation : int16 [rows, width], or None; the
    results are then scaled to int16, and those of each head of `width` channels turned by a row of
    factors, as `numerics.rotate` takes them.
    """

    source: str
    first_row: int
    rows: int
    mode: NormMode
    epsilon: int
    affine: Affine
    groups: int = 1
    rotation: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Operation):
    """Activation: softmax(query @ key.T) @ value for each of `heads` heads, of one width in queries and
    keys, and of one in values and results.

    query : None stands for one row of zeros, so that the result is the mean of the value rows.
    heads of key and value are `key_heads`; query head h uses key head h * key_heads // heads.
    multiplier, shift : score difference to 1/256 octaves; out_multiplier, out_shift : weighted mean
    of values to int8 (see `numerics.row_scale`).
    """

    query: str | None
    key: str
    value: str
    heads: int
    key_heads: int
    causal: bool
    multiplier: int
    shift: int
    out_multiplier: int
    out_shift: int


@dataclass(frozen=True, kw_only=True)
class Route(Operation):
    """Route: `routing.route` of ``source @ weight.T + bias``.

    weight : int8 [experts, depth]; bias : int32 [experts]; sigmoid : scores are sigmoids, not
    softmax; correction : uint32 [experts], below 2**22, added to scores for the choice, or None
    where the choice is by logits; group : experts of a group, 0 where there are none; pair : a
    group is chosen by its two largest values; sparse, threshold : experts are chosen one after
    another, see `routing.sparse_weights`; capacity : rows that an expert takes of a frame, 0 for any
    number, in the order of `routing.within_capacity`: the weights of others are 0.
    """

    source: str
    weight: np.ndarray
    bias: np.ndarray
    chosen: int
    over_chosen: bool
    multiplier: int
    shift: int
    sigmoid: bool = False
    correction: np.ndarray | None = None
    group: int = 0
    chosen_groups: int = 0
    pair: bool = False
    sparse: bool = False
    threshold: int = 0
    capacity: int = 0
    by_rank: bool = False

    @property
    def form(self) -> dict[str, int]:
        """How the router decides, as fields of LINEAR and for `routing.route`."""
        return {"chosen": self.chosen, "over_chosen": int(self.over_chosen),
                "multiplier": self.multiplier, "shift": self.shift, "sigmoid": int(self.sigmoid),
                "by_score": int(self.correction is not None), "group": self.group,
                "chosen_groups": self.chosen_groups, "pair": int(self.pair),
                "sparse": int(self.sparse), "threshold": self.threshold}


@dataclass(frozen=True, kw_only=True)
class Experts(Operation):
    """Residual tensor with the chosen experts' results added.

    Expert by expert, 0 first: for each row routed to it ``h = table[source @ up[e].T scaled by
    up_affine[e]]`` and ``residual += gated(h @ down[e].T scaled by down_affine[e] to int16, weight)``,
    saturating at each expert. With a gate h is the product that `Linear` has, of `gate` and `up`.

    up, gate : int8 [experts, hidden, depth]; down : int8 [experts, channels, hidden]; affines have
    the experts as first axis; table : int8 [256] or None; bits : of each expert's weights, uint8
    [experts], or None where all are 8.
    """

    source: str
    residual: str
    route: str
    up: np.ndarray
    up_affine: Affine
    table: np.ndarray | None
    down: np.ndarray
    down_affine: Affine
    bits: np.ndarray | None = None
    gate: np.ndarray | None = None
    gate_affine: Affine | None = None

    @property
    def row_macs(self) -> int:
        """Multiply-accumulates of a row in one expert."""
        return self.up[0].size * (1 if self.gate is None else 2) + self.down[0].size


OPERATIONS = {kind.__name__: kind
              for kind in (Constant, Linear, AddLinear, Norm, Attention, Route, Experts)}


def array_key(array: np.ndarray) -> str:
    """What equal arrays are kept under."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).ravel())
    return f"array-{digest.hexdigest()}"


def keep(array: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    """Add an array to `arrays`, equal ones once; returns its key, which depends on nothing else."""
    key = array_key(array)
    arrays[key] = array
    return key


def halves(operations: list[Operation]) -> dict[str, str]:
    """Keys of the upper halves of experts' weights, and the keys of the weights."""
    return {array_key(upper_half(weight)): array_key(weight) for op in operations
            if isinstance(op, Experts) for weight in (op.gate, op.up, op.down) if weight is not None}


def to_arrays(operations: list[Operation], arrays: dict[str, np.ndarray],
              known: Mapping[str, str] | None = None) -> list[dict]:
    """JSON-able description of the operations; their arrays are added to `arrays` (see `keep`), but for
    those that are the upper `halves` of others there."""
    def store(value):
        if isinstance(value, np.ndarray):
            whole = (known or {}).get(array_key(value))
            return {"upper": whole} if whole else {"array": keep(value, arrays)}
        if isinstance(value, Affine):
            return {"affine": {f.name: store(getattr(value, f.name))
                               for f in dataclasses.fields(value)}}
        return int(value) if isinstance(value, (np.integer, NormMode)) else value

    return [{"kind": type(op).__name__}
            | {f.name: store(getattr(op, f.name)) for f in dataclasses.fields(op)}
            for op in operations]


def from_arrays(description: list[dict], arrays) -> list[Operation]:
    """Inverse of `to_arrays`."""
    def load(value):
        if isinstance(value, dict) and "array" in value:
            return arrays[value["array"]]
        if isinstance(value, dict) and "upper" in value:
            return upper_half(arrays[value["upper"]])
        if isinstance(value, dict):
            return Affine(**{name: load(part) for name, part in value["affine"].items()})
        return value

    operations = []
    for entry in description:
        fields = {name: load(value) for name, value in entry.items() if name != "kind"}
        if "mode" in fields:
            fields["mode"] = NormMode(fields["mode"])
        operations.append(OPERATIONS[entry["kind"]](**fields))
    return operations
