"""What works row by row: normalisation, products, pointwise functions."""

import dataclasses

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.kept_weights import kept_norm
from moeware.compiler.quantise.hidden import GATED_STAGES, gated_hidden
from moeware.compiler.quantise.projections import head_channels
from moeware.compiler.quantise.state import MEETS, State, without
from moeware.compiler.scales import (
    FUNCTION,
    encode_scales,
    function_table,
    grid,
    shifted_grid,
)
from moeware.compiler.weights import Tensor, smoothed_norm
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NormMode

__all__ = ["Rows"]


class Rows(State):
    """Rules for LayerNorm, RMSNorm of the stream or between two Linears, Linear, Pointwise and
    Multiply."""

    def _LayerNorm(self, node, epsilon):
        gamma, beta = (array.astype(np.float64) for array in self._constants(node))
        self._stream_norm(node, NormMode.LAYER, epsilon, gamma, beta)

    def _RMSNorm(self, node, epsilon, groups):
        value = node.inputs[0]
        if value.name in self.pending:
            if self._consumers(node.outputs[0])[0].op_type != "Linear":
                self._projected_norm(node)
                return
            self._wide(value, self._finest(shape(value)[-1], epsilon))
        gamma = self._constants(node)[0].astype(np.float64)
        self._stream_norm(node, NormMode.RMS, epsilon, gamma, None)

    def _stream_norm(self, node, mode, epsilon, gamma, beta) -> None:
        value, channels = node.outputs[0], len(gamma)
        users = self._consumers(value)
        # A grid of the only row that is used is one of them all.
        seen = users[0].outputs[0] if [user.op_type for user in users] == ["TakeToken"] else value
        if value.name in self.kept.grids:
            seen = value
        kept = self._kept_grid(seen, self.calibration.rows(seen.name), "any", "middle")
        if kept or self._keeps_weights(value):
            # Nothing is folded into weights that are kept; beta still can be, as it goes into a bias.
            beta = np.zeros(channels) if beta is None else beta
            step, offset = kept or (grid(without(self.calibration.rows(value.name), beta)), beta)
            affine, gain, shift = kept_norm(gamma, beta, step, offset)
            self._emit_norm(node, mode, epsilon, affine, Tensor(value.name, step, gain, shift))
            return
        live = np.abs(gamma) > 1e-12 * np.abs(gamma).max(initial=0.0)
        demand = self._demand(value, channels) * np.abs(gamma)
        smooth, step = smoothed_norm(self.calibration.rows(node.inputs[0].name), epsilon, demand,
                                     centred=mode is NormMode.LAYER)
        scale = smooth / (step * (1 << numerics.norm_fraction_bits(channels)))
        multiplier, shift = encode_scales(scale)
        affine = q.Affine(bias=np.zeros(channels, np.int32), multiplier=multiplier, shift=shift)
        self._emit_norm(node, mode, epsilon, affine,
                        Tensor(value.name, step, np.where(live, gamma, 0.0) / smooth, beta))

    def _emit_norm(self, node, mode, epsilon, affine, tensor: Tensor) -> None:
        value, source = node.outputs[0], self._tensor(node.inputs[0])
        integer_epsilon = self._epsilon(len(affine.bias), epsilon, source.step)
        self.norms[value.name] = (
            q.Norm(name=node.name, output=value.name, source=source.tensor,
                   first_row=source.first_row, rows=source.rows, mode=mode,
                   epsilon=integer_epsilon, affine=affine),
            dataclasses.replace(tensor, rows=source.rows))
        if any(user.op_type not in ("TakeToken", "SoftExperts") for user in self._consumers(value)):
            self.values[value.name] = self._norm(value.name, value.name, 0, source.rows)

    def _norm(self, norm: str, output: str, first_row: int, rows: int) -> Tensor:
        """Emit some rows of a normalised stream as the tensor `output`."""
        operation, tensor = self.norms[norm]
        self._add(dataclasses.replace(operation, output=output, rows=rows,
                                      first_row=operation.first_row + first_row))
        return dataclasses.replace(tensor, tensor=output, rows=rows)

    def _demand(self, value: ir.Value, channels: int) -> np.ndarray:
        """Largest weight that meets each channel of a value, over all its consumers in all
        variants."""
        largest = np.zeros(channels)
        for node in self._consumers(value):
            if node.op_type in MEETS:
                for variant in self.variants:
                    for place in MEETS[node.op_type]:
                        weight = variant[node.name].inputs[place].const_value.numpy()
                        largest = np.maximum(largest, np.abs(weight.reshape(-1, channels)).max(0))
            elif node.op_type in ("TakeToken", "MeanTokens"):
                largest = np.maximum(largest, self._demand(node.outputs[0], channels))
        return largest

    def _Linear(self, node):
        value, consumers = node.outputs[0], self._consumers(node.outputs[0])
        later = ("Add", "Pointwise", "Multiply", "RMSNorm", "Join", "Rotary")
        if value in self.outputs or consumers[0].op_type in later:
            self.pending[value.name] = node
            return
        weight, bias = self._constants(node)
        samples, shift = self.calibration.rows(value.name), None
        users = [user for user in consumers if user.op_type == "Attention"]
        roles = {user.inputs.index(value) for user in users}
        # A key's offset adds one number to all scores of a row; a value's passes through, but the mean
        # behind it can have a grid of the file only without.
        places = ("middle", "any") if roles == {1} or roles == {2} else ("middle",)
        kept = self._kept_grid(value, samples, *places)
        if kept is None and roles and roles <= {1, 2}:
            samples, shift = without(samples, bias), bias.astype(np.float64)
            bias = np.zeros_like(bias)
            if roles == {1, 2}:
                raise CompileError(f"Node {node.name!r} must be key or value of attention, not both")
            # A LayerNorm's shift reaches keys and values as a bias, too.
            source = self._tensor(node.inputs[0])
            if source.shift is not None:
                lifted = weight.astype(np.float64) @ source.shift
                samples = without(samples, lifted)
                shift = shift + lifted
                bias = -lifted
        if roles and roles <= {1, 2}:
            order = head_channels(users[0], value).ravel()
            weight, bias, samples = weight[order], bias[order], samples[..., order]
            self.columns[value.name], shift = order, None if shift is None else shift[order]
        gain = None
        whole = kept or any(self._keeps_weights(user.outputs[0]) for user in users)
        if len(users) == len(consumers) == 1 and roles == {2} and not whole:
            gain = self._value_gain(users[0], samples, shift)
            samples, weight, bias = samples / gain, weight / gain[:, None], bias / gain
        step, offset = kept or (grid(samples), 0.0)
        self._emit_linear(node, value, weight, bias - offset, step, after=(step, offset), shift=shift,
                          gain=gain)

    def _emit_linear(self, node, value, weight, bias, step, *, table=None, after=None,
                     shift=None, gain=None, mean=0.0) -> None:
        bits = self.precision.of(node.name, "linear")
        source = self._linear_source(node, bits)
        integer, affine = self._scaled_weights(weight, bias, source, step, bits=bits)
        self._add(q.Linear(name=node.name, output=value.name, source=source.tensor, weight=integer,
                           affine=affine, table=table, bits=bits))
        step, offset = after or (step, 0.0)
        self.values[value.name] = Tensor(value.name, step, shift=shift, gain=gain, offset=offset,
                                         mean=mean, rows=source.rows)

    def _Pointwise(self, node, function):
        if self._consumers(node.outputs[0])[0].op_type == "Multiply":
            self.pending[node.outputs[0].name] = node
            return
        linear = self.pending.pop(node.inputs[0].name, None)
        if linear is None:
            raise CompileError(f"Node {node.name!r} must follow a Linear of its own")
        argument = self.calibration.rows(node.inputs[0].name)
        samples = self.calibration.rows(node.outputs[0].name)
        weight, bias = self._constants(linear)
        # Only what multiplies by weights can take an offset along.
        plain = all(user.op_type == "Linear" for user in self._consumers(node.outputs[0]))
        places = ("any", "middle") if plain else ("middle",)
        kept = self._kept_grid(node.outputs[0], samples, *places)
        after = kept or (shifted_grid(samples) if plain else (grid(samples), 0.0))
        before = self._kept_grid(node.inputs[0], argument, "any", "middle")
        if before is None and kept and function == "relu":
            before = kept  # cut at 0 by itself: one rounding, as in the file
        before = before or shifted_grid(argument, of=FUNCTION[function])
        self._emit_linear(linear, node.outputs[0], weight, bias - before[1], before[0],
                          table=function_table(function, before, after), after=after,
                          mean=samples.mean(0))

    def _Multiply(self, node):
        """A Linear, or a function of one, times another Linear of the same source."""
        value = node.outputs[0]
        operands = sorted((self.pending.pop(v.name) for v in node.inputs),
                          key=lambda operand: operand.op_type != "Pointwise")
        gate, function = operands[0], None
        if gate.op_type == "Pointwise":
            function = attributes(gate)["function"]
            gate = self.pending.pop(gate.inputs[0].name)
        up = operands[1]
        stages = (gate.outputs[0], operands[0].outputs[0], up.outputs[0], value)
        samples = {stage: [self.calibration.rows(each.name)]
                   for stage, each in zip(GATED_STAGES, stages)}
        places = {"hidden": ("any", "middle") if function else (), "activation": ("middle",),
                  "product": ("middle",)}
        grids = {stage: self._kept_grid(each, samples[stage][0], *places[stage])
                 for stage, each in zip(GATED_STAGES, stages) if places.get(stage)}
        demand = self._demand(value, shape(value)[-1])
        hidden, = gated_hidden(function, samples, demand[None], grids, whole=self._keeps_weights(value))
        if grids["product"] and hidden.made.step != grids["product"][0]:
            self.kept.note(self.kept.grids[value.name].names,
                           "on it the factor of the product has more than 16 bits")
        bits = self.precision.of(up.name, gate.name, "linear")
        source = self._linear_source(up, bits)
        weight, bias = self._constants(gate)
        step, offset = hidden.before
        gate_weight, gate_affine = self._scaled_weights(weight, bias - offset, source, step, bits=bits)
        weight, affine = self._scaled_weights(*self._constants(up), source, hidden.factor, 16, bits)
        self._add(q.Linear(name=up.name, output=value.name, source=source.tensor, weight=weight,
                           affine=affine, table=hidden.table, bits=bits, gate=gate_weight,
                           gate_affine=gate_affine))
        self.values[value.name] = dataclasses.replace(hidden.made, tensor=value.name, rows=source.rows)
