"""Scales that a quantised model brings along, and what becomes of each of them.

They travel in the metadata of the model, by the names that its values have at that stage. A grid of an
activation is the multiples of `step` from `least` to `most`: a zero point is nothing but a place in
that range. A weight's scale is not tied to a place in the graph, as rules transpose, cut and stack
weights: its integers are found again from the float weight and all scales of the file, and proven, as
integer times scale is the weight to the last bit.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

__all__ = ["Grid", "Kept"]

_KEY = "moeware.kept"
# Largest magnitude of a row of weights, in its steps: symmetric int8 first, then all others of 8 bits.
_LEVELS = (127, 128, *range(126, 0, -1), *range(129, 256))


@dataclass(frozen=True)
class Grid:
    """Multiples of `step` from `least` to `most`; names : of the tensors in the file that have it and
    that are one to the accelerator."""

    names: tuple[str, ...]
    step: float
    least: int
    most: int

    def joined(self, other: "Grid") -> "Grid":
        """An equal grid for the tensors of both."""
        return dataclasses.replace(self, names=tuple(dict.fromkeys((*self.names, *other.names))))

    def offset(self, samples: np.ndarray, places: Sequence[str]) -> tuple[float | None, str]:
        """Offset with which int8 integers are this grid, and why there is none.

        The integers must saturate where the file's do, or no sample may saturate in either. places :
        of 0 among the integers that the place in the graph takes, "middle" or "any", best first.
        """
        if self.most - self.least > 255:
            return None, "more than 8 bits, which activations have"
        steps = np.rint(np.asarray(samples, np.float64) / self.step)
        low, high = int(steps.min(initial=0)), int(steps.max(initial=0))
        for place in places:
            middle = self.least + 128 if place == "any" else 0
            least, most = middle - 128, middle + 127
            inside = max(least, self.least) <= low and high <= min(most, self.most)
            if (least, most) == (self.least, self.most) or inside:
                return middle * self.step, ""
        if "any" in places:
            return None, f"{self.most - self.least + 1} levels, at whose ends samples saturate"
        return None, (f"zero point {-128 - self.least} of int8 where the accelerator has none, and "
                      f"samples from {low} to {high} steps")


@dataclass
class Kept:
    """The scales of a model.

    grids : by the name of the value; weights : scales [channels] or [1] of each quantised weight, by its
    name in the file; lost : why a scale is not kept, by name in the file; places : of a grid in the
    file, the name of the node that makes the tensor; noted : what quantisation found out, the reason
    by name in the file, or "" for a scale that it kept.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model) -> "Kept":
        """Those of a model; of a float model there are none."""
        found = json.loads(model.metadata_props.get(_KEY, "{}"))
        grids = {name: Grid(**grid | {"names": tuple(grid["names"])})
                 for name, grid in found.pop("grids", {}).items()}
        return cls(grids=grids, **found)

    @classmethod
    def joined(cls, variants: Sequence["Kept"]) -> "Kept":
        """Those of a model with several choices, whose constants alone differ."""
        result = variants[0]
        for other in variants[1:]:
            for name, scales in other.weights.items():
                result.weights[name] = sorted({*result.weights.get(name, []), *scales})
        return result

    def write(self, model: ir.Model) -> None:
        """Into the metadata of `model`."""
        if self.grids or self.weights or self.lost:
            model.metadata_props[_KEY] = json.dumps(dataclasses.asdict(self))

    @property
    def _scales(self) -> np.ndarray:
        every = [scale for scales in self.weights.values() for scale in scales]
        return np.unique(np.array(every, np.float32))

    def integers(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """int16 [..., N, K] and float64 [..., N] with ``integer * step == weight`` (float32) to the last
        bit, each step a scale of the file; a channel of zeros has the step 0. None where there are
        no such."""
        scales = self._scales
        if not len(scales) or weight.dtype != np.float32:
            return None
        rows = weight.reshape(-1, weight.shape[-1])
        largest = np.abs(rows).max(-1).astype(np.float64)
        integers, steps = np.zeros(rows.shape, np.int16), np.zeros(len(rows))
        open_rows = np.flatnonzero(largest)
        for level in _LEVELS:
            # Rounding moves a quotient by 2**-23 of it at most.
            wanted = largest[open_rows] / level
            first = np.searchsorted(scales, wanted * (1 - 2.0**-22))
            for place in (first, first + 1):
                scale = scales[np.minimum(place, len(scales) - 1)]
                near = np.flatnonzero(np.abs(scale - wanted) <= wanted * 2.0**-22)
                chosen, scale = open_rows[near], scale[near, None]
                found = np.rint(rows[chosen] / scale)
                exact = (found * scale == rows[chosen]).all(-1)
                integers[chosen[exact]], steps[chosen[exact]] = found[exact], scale[exact, 0]
            open_rows = open_rows[steps[open_rows] == 0]
            if not len(open_rows):
                return integers.reshape(weight.shape), steps.reshape(weight.shape[:-1])
        return None

    def note(self, names: Iterable[str], reason: str = "") -> None:
        """That scales are kept, or why not; a reason stays."""
        for name in names:
            self.noted[name] = self.noted.get(name) or reason

    def note_weight(self, steps: np.ndarray, reason: str = "") -> None:
        """`note` for the weights that a layer's steps are of."""
        used = set(np.ravel(steps).tolist())
        self.note((name for name, scales in self.weights.items() if used & set(scales)), reason)

    def settle(self, steps: Iterable, unnoted: str = "no layer of the accelerator uses it") -> None:
        """Note what becomes of grids that no rule has looked at, by where their values are in the
        `partition.Step`s; `unnoted` of those for which the accelerator has a place."""
        for step in steps:
            for value in _values(step.nodes):
                grid = self.grids.get(str(value.name))
                if grid is not None and not set(grid.names) & set(self.noted):
                    place = _HOST if step.kind == "host" else _reason(value)
                    self.note(grid.names, unnoted if place is None else place)

    def report(self) -> dict:
        """scales, kept (their numbers), others (names in the file by reason)."""
        names = {*self.weights, *self.lost}.union(*(grid.names for grid in self.grids.values()))
        unseen = "no layer of the accelerator has it as it stands in the file"
        reasons = {name: self.noted.get(name, self.lost.get(name, unseen)) for name in sorted(names)}
        others: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if reason:
                others.setdefault(reason, []).append(name)
        return {"scales": len(names), "kept": list(reasons.values()).count(""), "others": others}


_HOST = "computed on the host, in float"
_NORMS = ("LayerNorm", "RMSNorm")


def _values(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    every = (value for node in nodes for value in (*node.inputs, *node.outputs))
    return [value for value in dict.fromkeys(every) if value is not None]


def _reason(value: ir.Value) -> str | None:
    """Why the accelerator has no int8 grid for a value, or None."""
    node, users = value.producer(), {user.op_type for user in value.consumers()}
    if node is None or users & {"PatchEmbed"}:
        return None
    first = node.inputs[0] and node.inputs[0].producer()
    on_row = node.op_type == "TakeToken" and (first is None or first.op_type not in _NORMS)
    if on_row or node.op_type in ("PatchEmbed", "ClassToken", "AddConstant", "Add"):
        return "the residual stream has 16 bits, on one grid"
    if "Add" in users:
        return "what is added to the residual stream has 16 bits, and is not rounded before"
    if users & {"RMSNorm", "Rotary"}:
        return "what is normalised or turned has 16 bits"
    if node.op_type == "Linear" and users == {"Multiply"}:
        return "a factor of a product has 16 bits"
    if node.op_type in _NORMS and users == {"SoftExperts"}:
        return "keys of soft experts have a grid of their own, without a zero point"
    if value.is_graph_output() or node.op_type == "Linear" and not users & {"Attention", "Pointwise"}:
        return "a result of a device step has 16 bits"
    return None
