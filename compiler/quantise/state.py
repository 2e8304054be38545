"""A device step while it is quantised: its ends, its grids, what has been emitted."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import Calibration
from moeware.compiler.canonical import attributes, projection, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.kept import Kept
from moeware.compiler.kept_weights import kept_or_scaled
from moeware.compiler.precision import Precision
from moeware.compiler.quantise.expert_layer import ExpertLayer
from moeware.compiler.weights import Tensor, informed
from moeware.hw.arch import quantised as q
from moeware.hw.arch.grid import Grid
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.program import Port, Region

__all__ = ["MEETS", "Embedding", "QuantisedStep", "State", "without"]

HEADROOM = 1.5  # of the residual grid over the largest calibrated value
EPSILON_BITS = 48  # that the normalisation unit holds epsilon in
# Places of the weights that an operator's first input meets.
MEETS = {"Linear": (1,), "Route": (1,), "Experts": (3,), "GatedExperts": (3, 7)}


@dataclass
class QuantisedStep:
    """A device step before it has addresses (those of its ports' regions are 0).

    choice, grids : as of `DeviceStep`; layers : its experts while their bits are open, none after.
    """

    operations: list[q.Operation] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    choice: dict[str, int] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    layers: list[ExpertLayer] = field(default_factory=list)

    def settle(self, bits: Mapping[str, Sequence[int]]) -> None:
        """Give experts these bits, by the name of their layer, or leave them those they have."""
        self._exchange([layer.operation(bits[layer.name]) for layer in self.layers
                        if layer.name in bits])
        self.layers = []

    def settle_nested(self) -> "QuantisedStep":
        """Give experts nested weights of 8 bits; returns the step with the upper 4 of them."""
        pairs = [layer.nested() for layer in self.layers]
        self.layers = []
        upper = dataclasses.replace(self, operations=list(self.operations))
        self._exchange([whole for whole, _ in pairs])
        upper._exchange([half for _, half in pairs])
        return upper

    def _exchange(self, operations: Sequence[q.Experts]) -> None:
        """These operations in place of those that have their outputs."""
        known = {operation.output: operation for operation in operations}
        self.operations = [known.get(each.output, each) for each in self.operations]


@dataclass(frozen=True)
class Embedding:
    """The start of the stream, not emitted yet: a constant, and patches from `first_row` on."""

    constant: np.ndarray
    first_row: int
    patches: ir.Node


def without(samples: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Samples less their shift; zero where nothing but the rounding of float32 is left."""
    rest = samples - np.asarray(shift, np.float64)
    return np.where(np.abs(rest) > 2.0**-20 * np.abs(samples).max(), rest, 0.0)


class State:
    """What the rules for the canonical operators share: consumers, grids, the step so far.

    pending : nodes by the value that its consumer will emit; norms : all rows of a normalised
    stream; columns : of a value, the channel that each of its tensor's is, where they differ; added :
    the tensors of the stream after and before a value was added to it.
    """

    def __init__(self, nodes, inputs, outputs, calibration: Calibration, precision: Precision,
                 variants: Sequence[Sequence[ir.Node]], kept: Kept):
        named = {value.name: value for node in nodes for value in (*node.inputs, *node.outputs)}
        self.nodes = nodes
        self.variants = [{node.name: node for node in variant} for variant in variants]
        self.inputs, self.outputs = ([named[name] for name in names] for names in (inputs, outputs))
        self.calibration, self.precision, self.kept = calibration, precision, kept
        self.result = QuantisedStep()
        self.values: dict[str, Tensor | Embedding] = {}
        self.pending: dict[str, ir.Node] = {}  # what its consumer will emit
        self.norms: dict[str, tuple[q.Norm, Tensor]] = {}  # value of a norm -> all its rows
        self.columns: dict[str, np.ndarray] = {}
        self.added: dict[str, tuple[str, str]] = {}
        self._scaled_weights = partial(kept_or_scaled, kept)
        self.stream_step = self._stream_step()

    # Consumers, grids, weights

    def _consumers(self, value: ir.Value) -> list[ir.Node]:
        return [node for node in self.nodes if value in node.inputs]

    def _stream_step(self) -> float:
        """One grid for the whole residual stream, so that adding needs no rescaling."""
        stream = [value for node in self.nodes for value in node.outputs
                  if node.op_type in ("PatchEmbed", "ClassToken", "AddConstant", "Add")]
        stream += [value for value in self.inputs if len(shape(value)) == 3]
        largest = max((np.abs(self.calibration.rows(value.name)).max() for value in stream),
                      default=0.0)
        finest = max((self._finest(shape(node.outputs[0])[-1], attributes(node)["epsilon"])
                      for node in self.nodes if node.op_type in ("LayerNorm", "RMSNorm")
                      and projection(node.outputs[0])[0] is None), default=0.0)
        return max(float(HEADROOM * largest / 32767), finest) if largest else 1.0

    @staticmethod
    def _finest(channels: int, epsilon: float) -> float:
        """The finest grid on which so many channels are normalised: a finer one would resolve only
        what epsilon drowns."""
        return channels * math.sqrt(epsilon) / (1 << EPSILON_BITS // 2 - 1)

    @staticmethod
    def _epsilon(channels: int, epsilon: float, step: float) -> int:
        """Epsilon as `numerics.normalise` takes it, of rows on the grid `step`."""
        return round(epsilon * (channels / step) ** 2)

    def _tensor(self, value: ir.Value) -> Tensor:
        found = self.values[value.name]
        if isinstance(found, Embedding):
            found = self._emit_embedding(value.name, found)
        return found

    def _kept_grid(self, value: ir.Value, samples: np.ndarray, *places: str
                   ) -> tuple[float, float] | None:
        """Step and offset of the grid that a value came with, where this place in the graph has such;
        arguments as of `Grid.offset`."""
        grid = self.kept.grids.get(value.name)
        if grid is None:
            return None
        offset, reason = grid.offset(samples, places)
        self.kept.note(grid.names, reason)
        return None if offset is None else (grid.step, offset)

    def _keeps_weights(self, value: ir.Value) -> bool:
        """Whether a product with a value keeps the weights that it came with, in any variant."""
        for node in self._consumers(value):
            if node.op_type in ("TakeToken", "MeanTokens") and self._keeps_weights(node.outputs[0]):
                return True
            if self._has_integers(node, *MEETS.get(node.op_type, ())):
                return True
        return False

    def _has_integers(self, node: ir.Node, *places: int) -> bool:
        """Whether weights of a node came as integers, in any variant, and have 8 bits."""
        return not self._is_narrow(node) and any(
            self.kept.integers(variant[node.name].inputs[place].const_value.numpy()) is not None
            for variant in self.variants for place in places)

    def _is_narrow(self, node: ir.Node) -> bool:
        """Whether the user wants weights of a node to be others than any of 8 bits."""
        if node.op_type in ("Experts", "GatedExperts"):
            bits = (self.precision.of_expert(node.name, e) or 8 for e in range(shape(node.inputs[3])[0]))
            return self.precision.nested or all(each < 8 for each in bits)
        return node.op_type == "Linear" and self.precision.of(node.name, "linear") < 8

    def _add(self, operation: q.Operation) -> None:
        self.result.operations.append(operation)

    # Ends of the step

    def _input(self, value: ir.Value) -> None:
        dims = shape(value)
        consumers = self._consumers(value)
        patches = [node for node in consumers if node.op_type == "PatchEmbed"]
        if patches:
            node = patches[0]
            a = attributes(node)
            rows, columns = a["height"] // a["ph"], a["width"] // a["pw"]
            split = (a["channels"], rows, a["ph"], columns, a["pw"])
            order = (1, 3, 0, 2, 4)
            channels = a["channels"] * a["ph"] * a["pw"]
            samples = self.calibration.rows(value.name)
            low, high = float(samples.min(initial=0)), float(samples.max(initial=0))
            step = (high - low) / 255 or 1.0
            offset, mean = low + 128 * step, float(samples.mean())
            step, offset = self._kept_grid(value, samples, "any", "middle") or (step, offset)
            region = Region(memory=Memory.ACTIVATION, rows=rows * columns, channels=channels,
                            address=0)
        else:
            if len(dims) != 3:
                raise CompileError(f"Input {value.name!r} of a device step must be an image or a "
                                   f"residual stream, not of shape {dims}")
            split, order, step, offset = dims[1:], (0, 1), self.stream_step, 0.0
            mean = 0.0
            region = Region(memory=Memory.RESIDUAL, rows=dims[1], channels=dims[2], address=0)
        self.values[value.name] = Tensor(value.name, step, offset=offset, mean=mean, rows=region.rows)
        self.result.inputs.append(Port(name=value.name, tensor=value.name, shape=dims[1:],
                                       scale=step, offset=offset, split=split, order=order,
                                       region=region))

    def _output(self, value: ir.Value) -> None:
        dims = shape(value)
        if value.name in self.pending:
            self._wide(value)
        tensor = self._tensor(value)
        rows = dims[1] if len(dims) == 3 else 1
        region = Region(memory=Memory.RESIDUAL, rows=rows, channels=dims[-1], address=0)
        self.result.outputs.append(Port(
            name=value.name, tensor=tensor.tensor, shape=dims[1:], scale=tensor.step,
            split=(rows, dims[-1]), order=(0, 1), region=region))

    def _grids(self) -> dict[str, Grid]:
        """What became of each canonical value that the step computes and keeps as a tensor."""
        tensors = {name: found for name, found in self.values.items() if isinstance(found, Tensor)}
        grids = {name: Grid(tensor=found.tensor, step=found.step, offset=found.offset,
                            gain=found.gain, shift=found.shift, columns=self.columns.get(name),
                            first_row=found.first_row, rows=found.rows)
                 for name, found in tensors.items()
                 if name not in {value.name for value in self.inputs}}
        return grids | {name: Grid(tensor=after, base=before, step=self.stream_step,
                                   rows=tensors[after].rows)
                        for name, (after, before) in self.added.items()}

    def _wide(self, value: ir.Value, finest: float = 0.0) -> None:
        """A Linear of 16 bits, on a grid of its own: one that leaves the step or is normalised."""
        node = self.pending.pop(value.name)
        source = self._tensor(node.inputs[0])
        step = self._wide_step(value, finest)
        self._add_linear(node, value.name, step, residual=None)
        self.values[value.name] = Tensor(value.name, step, rows=source.rows)

    def _wide_step(self, value: ir.Value, finest: float = 0.0) -> float:
        """The grid of a value of 16 bits, no finer than `finest`."""
        largest = np.abs(self.calibration.rows(value.name)).max()
        return max(float(HEADROOM * largest / 32767) or 1.0, finest)

    def _linear_source(self, node: ir.Node, bits: int) -> Tensor:
        """What a Linear reads, as its weights want to know it."""
        source, value = self._tensor(node.inputs[0]), node.inputs[0]
        if bits == 8 or node.op_type == "PatchEmbed":  # samples of images are not of patches
            return source
        return informed(source, self.calibration.rows(value.name))

    def _add_linear(self, node: ir.Node, output: str, step: float, *,
                    residual: str | None, first_row: int = 0,
                    constants: Sequence[np.ndarray] | None = None) -> None:
        """constants : weight and bias in place of the node's own."""
        bits = self.precision.of(node.name, "linear")
        source = self._linear_source(node, bits)
        weight, affine = self._scaled_weights(*(constants or self._constants(node)), source, step, 16,
                                              bits)
        self._add(q.AddLinear(name=node.name, output=output, source=source.tensor,
                              residual=residual, first_row=first_row, weight=weight, affine=affine,
                              bits=bits))

    @staticmethod
    def _constants(node: ir.Node, first: int = 1) -> list[np.ndarray]:
        return [value.const_value.numpy() for value in node.inputs[first:]]
