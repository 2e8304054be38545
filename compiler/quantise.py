"""Float canonical nodes to the quantised graph.

Weights are int8, or narrower where `Precision` says so, per output channel (experts: per expert and
channel), activations int8 per tensor, the residual stream int16 on one grid. Three exact identities are used before anything is rounded:

- a key's bias adds one number to all scores of a row, which softmax does not see: it is dropped;
- a value's bias passes through attention unchanged, as weights sum to one: it moves into the bias of
  what follows;
- LayerNorm's scale and shift move into the weights that follow. In exchange each channel of the
  normalised tensor is scaled so that tensor and weights share the rounding error (SmoothQuant,
  Xiao et al. 2023, section 4, with alpha = 1/2).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import Calibration
from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.precision import WEIGHT_BITS, Precision
from moeware.compiler.scales import (
    FUNCTION,
    encode_scale,
    encode_scales,
    function_table,
    grid,
    shifted_grid,
)
from moeware.compiler.weights import Tensor, quantise_weights, scaled_weights, smoothed_norm
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.program import Port, Region

__all__ = ["QuantisedStep", "quantise"]

HEADROOM = 1.5  # of the residual grid over the largest calibrated value


@dataclass
class QuantisedStep:
    """A device step before it has addresses (those of its ports' regions are 0). choice : as of
    `DeviceStep`."""

    operations: list[q.Operation] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    choice: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedding:
    """The start of the stream, not emitted yet: a constant, and patches from `first_row` on."""

    constant: np.ndarray
    first_row: int
    patches: ir.Node


def quantise(nodes: Sequence[ir.Node], inputs: Sequence[str], outputs: Sequence[str],
             calibration: Calibration, precision: Precision | None = None,
             variants: Sequence[Sequence[ir.Node]] | None = None) -> QuantisedStep:
    """Quantise the nodes of one device step.

    nodes : canonical, in topological order, as `partition` leaves them; inputs, outputs : names of
    the values that enter and leave the step; variants : the same nodes with each choice's constants
    (None: `nodes` alone), which are to have equal integers wherever their constants are equal.

    Raises
    ------
    CompileError
        A tensor without calibration samples, or nodes in an order that no device step may have.
    """
    return _Quantiser(nodes, inputs, outputs, calibration, precision or Precision(),
                      variants or [nodes]).run()


def _without(samples: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Samples less their shift; zero where nothing but the rounding of float32 is left."""
    rest = samples - np.asarray(shift, np.float64)
    return np.where(np.abs(rest) > 2.0**-20 * np.abs(samples).max(), rest, 0.0)


class _Quantiser:
    def __init__(self, nodes, inputs, outputs, calibration: Calibration, precision: Precision,
                 variants: Sequence[Sequence[ir.Node]]):
        named = {value.name: value for node in nodes for value in (*node.inputs, *node.outputs)}
        self.nodes = nodes
        self.variants = [{node.name: node for node in variant} for variant in variants]
        self.inputs, self.outputs = ([named[name] for name in names] for names in (inputs, outputs))
        self.calibration, self.precision = calibration, precision
        self.result = QuantisedStep()
        self.values: dict[str, Tensor | Embedding] = {}
        self.pending: dict[str, ir.Node] = {}  # Linear or Experts that its consumer will emit
        self.norms: dict[str, tuple[q.Norm, Tensor]] = {}  # LayerNorm value -> all its rows
        self.stream_step = self._stream_step()

    def run(self) -> QuantisedStep:
        for value in self.inputs:
            self._input(value)
        for node in self.nodes:
            getattr(self, f"_{node.op_type}")(node, **attributes(node))
        for value in self.outputs:
            self._output(value)
        return self.result

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
        # The normalisation unit holds epsilon in 48 bits; a finer grid would resolve only what
        # epsilon drowns.
        finest = max((shape(node.outputs[0])[-1] * math.sqrt(attributes(node)["epsilon"])
                      for node in self.nodes if node.op_type == "LayerNorm"), default=0.0)
        return max(float(HEADROOM * largest / 32767), finest / (1 << 23)) if largest else 1.0

    def _tensor(self, value: ir.Value) -> Tensor:
        found = self.values[value.name]
        if isinstance(found, Embedding):
            found = self._emit_embedding(value.name, found)
        return found

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
            self._head(value)
        tensor = self._tensor(value)
        rows = dims[1] if len(dims) == 3 else 1
        region = Region(memory=Memory.RESIDUAL, rows=rows, channels=dims[-1], address=0)
        self.result.outputs.append(Port(
            name=value.name, tensor=tensor.tensor, shape=dims[1:], scale=tensor.step,
            split=(rows, dims[-1]), order=(0, 1), region=region))

    def _head(self, value: ir.Value) -> None:
        """A Linear that leaves the step: wide, on a grid of its own."""
        node = self.pending.pop(value.name)
        source = self._tensor(node.inputs[0])
        step = float(HEADROOM * np.abs(self.calibration.rows(value.name)).max() / 32767) or 1.0
        self._add_linear(node, value.name, source, step, residual=None)
        self.values[value.name] = Tensor(value.name, step, rows=source.rows)

    def _add_linear(self, node: ir.Node, output: str, source: Tensor, step: float, *,
                    residual: str | None, first_row: int = 0) -> None:
        bits = self.precision.of(node.name, "linear")
        weight, affine = scaled_weights(*self._constants(node), source, step, 16,
                                        limit=WEIGHT_BITS[bits])
        self._add(q.AddLinear(name=node.name, output=output, source=source.tensor,
                              residual=residual, first_row=first_row, weight=weight, affine=affine,
                              bits=bits))

    @staticmethod
    def _constants(node: ir.Node, first: int = 1) -> list[np.ndarray]:
        return [value.const_value.numpy() for value in node.inputs[first:]]

    # The residual stream

    def _PatchEmbed(self, node, height, width, ph, pw, **_):
        rows = (height // ph) * (width // pw)
        channels = shape(node.inputs[1])[0]
        self.values[node.outputs[0].name] = Embedding(np.zeros((rows, channels)), 0, node)

    def _ClassToken(self, node):
        start = self.values[node.inputs[0].name]
        if not isinstance(start, Embedding):
            raise CompileError(f"Node {node.name!r} must follow the patch embedding")
        token = self._constants(node)[0]
        self.values[node.outputs[0].name] = Embedding(
            np.vstack([token[None], start.constant]), start.first_row + 1, start.patches)

    def _AddConstant(self, node):
        start = self.values[node.inputs[0].name]
        if not isinstance(start, Embedding):
            raise CompileError(f"Node {node.name!r} must follow the patch embedding")
        self.values[node.outputs[0].name] = Embedding(
            start.constant + self._constants(node)[0], start.first_row, start.patches)

    def _emit_embedding(self, name: str, start: Embedding) -> Tensor:
        node = start.patches
        image = self._tensor(node.inputs[0])
        constant = np.clip(np.rint(start.constant / self.stream_step), -32768, 32767)
        self._add(q.Constant(name=node.name, output=f"{name}/constant",
                             value=constant.astype(np.int16)))
        self._add_linear(node, name, image, self.stream_step, residual=f"{name}/constant",
                         first_row=start.first_row)
        tensor = Tensor(name, self.stream_step, rows=len(start.constant))
        self.values[name] = tensor
        return tensor

    def _Add(self, node):
        branch = next((v for v in node.inputs if v.name in self.pending), None)
        if branch is None:
            raise CompileError(f"Node {node.name!r} must add a Linear or Experts to the stream")
        other = node.inputs[0] if branch is node.inputs[1] else node.inputs[1]
        stream, name = self._tensor(other), node.outputs[0].name
        source_node = self.pending.pop(branch.name)
        if source_node.op_type == "Linear":
            source = self._tensor(source_node.inputs[0])
            self._add_linear(source_node, name, source, self.stream_step, residual=stream.tensor)
        else:
            self._experts(source_node, stream, name)
        self.values[name] = Tensor(name, self.stream_step, rows=stream.rows)

    def _TakeToken(self, node, index):
        value, name = node.inputs[0], node.outputs[0].name
        if value.name in self.norms:
            # Only the row that is used gets normalised.
            self.values[name] = self._norm(value.name, name, index, 1)
            return
        source = self._tensor(value)
        self.values[name] = Tensor(source.tensor, source.step, source.gain, source.shift,
                                   source.first_row + index, 1)

    # Into the branches

    def _LayerNorm(self, node, epsilon):
        value, source = node.outputs[0], self._tensor(node.inputs[0])
        gamma, beta = (array.astype(np.float64) for array in self._constants(node))
        channels = len(gamma)
        live = np.abs(gamma) > 1e-12 * np.abs(gamma).max(initial=0.0)
        demand = self._demand(value, channels) * np.abs(gamma)
        smooth, step = smoothed_norm(self.calibration.rows(node.inputs[0].name), epsilon, demand)
        scale = smooth / (step * (1 << numerics.NORM_FRACTION_BITS))
        multiplier, shift = encode_scales(scale)
        integer_epsilon = round(epsilon * (channels / source.step) ** 2)
        affine = q.Affine(bias=np.zeros(channels, np.int32), multiplier=multiplier, shift=shift)
        self.norms[value.name] = (
            q.Norm(name=node.name, output=value.name, source=source.tensor,
                   first_row=source.first_row, rows=source.rows, mode=NormMode.LAYER,
                   epsilon=integer_epsilon, affine=affine),
            Tensor(value.name, step, np.where(live, gamma, 0.0) / smooth, beta, rows=source.rows))
        if any(user.op_type != "TakeToken" for user in self._consumers(value)):
            self.values[value.name] = self._norm(value.name, value.name, 0, source.rows)

    def _norm(self, norm: str, output: str, first_row: int, rows: int) -> Tensor:
        """Emit some rows of a LayerNorm as the tensor `output`."""
        operation, tensor = self.norms[norm]
        self._add(dataclasses.replace(operation, output=output, rows=rows,
                                      first_row=operation.first_row + first_row))
        return dataclasses.replace(tensor, tensor=output, rows=rows)

    def _demand(self, value: ir.Value, channels: int) -> np.ndarray:
        """Largest weight that meets each channel of a value, over all its consumers in all
        variants."""
        largest = np.zeros(channels)
        for node in self._consumers(value):
            if node.op_type in ("Linear", "Route", "Experts"):
                for variant in self.variants:
                    inputs = variant[node.name].inputs
                    weight = inputs[3 if node.op_type == "Experts" else 1].const_value.numpy()
                    largest = np.maximum(largest, np.abs(weight.reshape(-1, channels)).max(0))
            elif node.op_type in ("TakeToken", "MeanTokens"):
                largest = np.maximum(largest, self._demand(node.outputs[0], channels))
        return largest

    def _Linear(self, node):
        value, consumers = node.outputs[0], self._consumers(node.outputs[0])
        if value in self.outputs or consumers[0].op_type in ("Add", "Pointwise"):
            self.pending[value.name] = node
            return
        weight, bias = self._constants(node)
        samples, shift = self.calibration.rows(value.name), None
        users = [user for user in consumers if user.op_type == "Attention"]
        roles = {user.inputs.index(value) for user in users}
        if roles and roles <= {1, 2}:
            samples, shift = _without(samples, bias), None if roles == {1} else bias.astype(np.float64)
            bias = np.zeros_like(bias)
            if roles == {1, 2}:
                raise CompileError(f"Node {node.name!r} must be key or value of attention, not both")
            # A LayerNorm's shift reaches keys and values as a bias, too.
            source = self._tensor(node.inputs[0])
            if source.shift is not None:
                lifted = weight.astype(np.float64) @ source.shift
                samples = _without(samples, lifted)
                shift = None if shift is None else shift + lifted
                bias = -lifted
            # The attention unit has one stride for query, key and value: shared heads are repeated.
            a = attributes(users[0])
            if a["heads"] != a["kv_heads"]:
                heads = np.arange(len(weight)).reshape(a["kv_heads"], -1)
                order = np.repeat(heads, a["heads"] // a["kv_heads"], 0).ravel()
                weight, bias, samples = weight[order], bias[order], samples[..., order]
                shift = None if shift is None else shift[order]
        gain = None
        if len(users) == len(consumers) == 1 and roles == {2}:
            gain = self._value_gain(users[0], samples, shift)
            samples, weight, bias = samples / gain, weight / gain[:, None], bias / gain
        self._emit_linear(node, value, weight, bias, grid(samples), shift=shift, gain=gain)

    def _value_gain(self, attention: ir.Node, samples: np.ndarray, shift) -> np.ndarray:
        """Factors that the channels of a value are divided by, and those of the weighted means with
        them: the values' and the means' largest magnitudes share the difference (SmoothQuant,
        section 4, alpha = 1/2)."""
        means = self.calibration.rows(attention.outputs[0].name)
        means = np.abs(means if shift is None else _without(means, shift)).max(0)
        values = np.abs(samples).max(0)
        usable = (values > 0) & (means > 0)
        gain = np.ones(len(values))
        gain[usable] = np.sqrt(values[usable] * means[usable])
        return gain / gain.max()

    def _emit_linear(self, node, value, weight, bias, step, *, table=None, after=None,
                     shift=None, gain=None, mean=0.0) -> None:
        source = self._tensor(node.inputs[0])
        bits = self.precision.of(node.name, "linear")
        integer, affine = scaled_weights(weight, bias, source, step, limit=WEIGHT_BITS[bits])
        self._add(q.Linear(name=node.name, output=value.name, source=source.tensor, weight=integer,
                           affine=affine, table=table, bits=bits))
        step, offset = after or (step, 0.0)
        self.values[value.name] = Tensor(value.name, step, shift=shift, gain=gain, offset=offset,
                                         mean=mean, rows=source.rows)

    def _Pointwise(self, node, function):
        linear = self.pending.pop(node.inputs[0].name, None)
        if linear is None:
            raise CompileError(f"Node {node.name!r} must follow a Linear of its own")
        before = shifted_grid(self.calibration.rows(node.inputs[0].name), of=FUNCTION[function])
        samples = self.calibration.rows(node.outputs[0].name)
        weight, bias = self._constants(linear)
        # Only what multiplies by weights can take an offset along.
        plain = all(user.op_type == "Linear" for user in self._consumers(node.outputs[0]))
        after = shifted_grid(samples) if plain else (grid(samples), 0.0)
        self._emit_linear(linear, node.outputs[0], weight, bias - before[1], before[0],
                          table=function_table(function, before, after), after=after,
                          mean=samples.mean(0))

    def _Attention(self, node, heads, scale, causal, **_):
        query, key, value = (self._tensor(v) for v in node.inputs)
        output = node.outputs[0]
        samples, shift = self.calibration.rows(output.name), None
        if value.shift is not None:
            shift = value.shift
            samples = _without(samples, shift)
        if value.gain is not None:
            samples = samples / value.gain
        self._attention(node, query, key, value, output, grid(samples), shift=shift, gain=value.gain,
                        heads=heads, causal=bool(causal), per_step=scale * query.step * key.step)

    def _attention(self, node, query, key, value, output, step, *, per_step, shift, gain=None,
                   heads, causal) -> None:
        octave = 1 << numerics.OCTAVE_BITS
        multiplier, right = encode_scale(per_step * math.log2(math.e) * octave)
        out_multiplier, out_right = encode_scale(value.step / step)
        rows = 1 if query is None else query.rows
        self._add(q.Attention(name=node.name, output=output.name,
                              query=query and query.tensor, key=key.tensor,
                              value=value.tensor, heads=heads, key_heads=heads, causal=causal,
                              multiplier=multiplier, shift=right, out_multiplier=out_multiplier,
                              out_shift=out_right))
        self.values[output.name] = Tensor(output.name, step, gain, shift,
                                          rows=rows)

    def _MeanTokens(self, node):
        source, output = self._tensor(node.inputs[0]), node.outputs[0]
        plain = self.calibration.rows(output.name).astype(np.float64)
        if source.shift is not None:
            plain = _without(plain, source.shift)
        if source.gain is not None:
            plain = np.where(source.gain != 0, plain / np.where(source.gain, source.gain, 1), 0)
        # Equal scores weigh every row alike: attention with a query of zeros is the mean.
        self._attention(node, None, source, source, output, grid(plain), per_step=0.0,
                        shift=source.shift, gain=source.gain, heads=1, causal=False)

    # Mixture of experts

    def _Route(self, node, k, normalise):
        source = self._tensor(node.inputs[0])
        # One step for all experts: their logits are compared with one another.
        weight, bias, accumulator = quantise_weights(*self._constants(node), source, per_tensor=True)
        octave = 1 << numerics.OCTAVE_BITS
        multiplier, shift = encode_scale(float(accumulator[0]) * math.log2(math.e) * octave)
        self._add(q.Route(name=node.name, output=node.outputs[0].name, source=source.tensor,
                          weight=weight, bias=bias, chosen=k, over_chosen=normalise == "chosen",
                          multiplier=multiplier, shift=shift))

    def _Experts(self, node, function):
        self.pending[node.outputs[0].name] = node

    def _experts(self, node: ir.Node, stream: Tensor, output: str) -> None:
        function = attributes(node)["function"]
        source = self._tensor(node.inputs[0])
        w1, b1, w2, b2 = self._constants(node, 3)
        before = shifted_grid(self._expert_samples(node, "hidden"), of=FUNCTION[function])
        after = shifted_grid(self._expert_samples(node, "activation"))
        bits = np.array([self.precision.of(f"{node.name}/expert{e}", node.name, "experts")
                         for e in range(len(w1))], np.uint8)
        limit = np.array([WEIGHT_BITS[each] for each in bits.tolist()])
        up, up_affine = scaled_weights(w1, b1 - before[1], source, before[0], limit=limit)
        mean = self._expert_samples(node, "activation").mean(0)
        hidden = Tensor("", after[0], offset=after[1], mean=mean)
        down, down_affine = scaled_weights(w2, b2, hidden, self.stream_step, 16, limit=limit)
        self._add(q.Experts(
            name=node.name, output=output, source=source.tensor, residual=stream.tensor,
            route=node.inputs[1].name, up=up,
            up_affine=up_affine, table=function_table(function, before, after), down=down,
            down_affine=down_affine, bits=bits))

    def _expert_samples(self, node: ir.Node, stage: str) -> np.ndarray:
        names = [f"{node.name}/expert{e}/{stage}" for e in range(shape(node.inputs[3])[0])]
        found = [self.calibration.samples[name] for name in names
                 if name in self.calibration.samples]
        if not found:
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return np.concatenate(found)
