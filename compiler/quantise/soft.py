"""Soft experts: attention fills the slots, experts work on slots, attention mixes their results."""

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import attributes
from moeware.compiler.quantise.hidden import STAGES, plain_hidden
from moeware.compiler.quantise.state import HEADROOM, State
from moeware.compiler.scales import encode_scale, encode_scales, grid
from moeware.compiler.weights import Tensor, scaled_weights
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NormMode

__all__ = ["SoftExperts"]

LIVE = 1e-4  # of the largest scale of a LayerNorm: channels with less keep that, far below a step


class SoftExperts(State):
    """Rule for SoftExperts.

    Both attentions have one head. Filling has the slots as queries, tokens as keys and values; mixing
    has tokens as queries, slots as keys, and the experts' results as values. Slots and results lie in
    the residual memory, from where NORM takes the rows that are wanted.
    """

    def _SoftExperts(self, node, function):
        self.pending[node.outputs[0].name] = node

    def _soft_experts(self, node: ir.Node, stream: Tensor, output: str) -> None:
        name, experts = node.name, len(node.inputs[2].const_value.numpy())
        tokens = self._whole_norm(node.inputs[0], f"{name}/tokens")
        slots, w1, b1, w2, b2 = self._constants(node)
        slots = slots * tokens.gain
        slot_step = grid(slots)
        stored = self._stored(f"{name}/slots", slots)
        filled_step = grid(self.calibration.rows(f"{name}/filled"))
        result_rows = self.calibration.rows(f"{name}/results")
        result_step = grid(result_rows)
        wide = float(HEADROOM * np.abs(result_rows).max() / 32767) or 1.0
        results = self._stored(f"{name}/biases", np.repeat(b2, len(slots) // experts, 0), wide)

        hidden, = plain_hidden(attributes(node)["function"], {
            stage: [self.calibration.rows(f"{name}/{stage}")] for stage in STAGES})
        count = len(slots) // experts
        for e in range(experts):
            own = f"{name}/expert{e}"
            bits = self.precision.of_soft_expert(name, e)
            queries = self._rows_of(f"{own}/slots", stored, slot_step, e * count, count)
            self._mix(f"{own}/filled", queries, tokens, tokens, filled_step)
            rows = Tensor(f"{own}/filled", filled_step, tokens.gain, rows=count)
            step, offset = hidden.before
            up, affine = self._scaled_weights(w1[e], b1[e] - offset, rows, step, bits=bits)
            self._add(q.Linear(name=f"{own}/up", output=f"{own}/hidden", source=rows.tensor,
                               weight=up, affine=affine, table=hidden.table, bits=bits))
            made = dataclasses.replace(hidden.made, tensor=f"{own}/hidden", rows=count)
            down, affine = self._scaled_weights(w2[e], np.zeros_like(b2[e]), made, wide, 16, bits)
            self._add(q.AddLinear(name=f"{own}/down", output=f"{own}/results", source=made.tensor,
                                  residual=results.tensor, first_row=e * count, weight=down,
                                  affine=affine, bits=bits))
            results = Tensor(f"{own}/results", wide, rows=len(slots))
        keys = self._rows_of(f"{name}/keys", stored, slot_step, 0, len(slots))
        values = self._rows_of(f"{name}/values", results, result_step, 0, len(slots))
        mixed_step = grid(self.calibration.rows(node.outputs[0].name))
        self._mix(f"{name}/mixed", tokens, keys, values, mixed_step)
        # Nothing adds int8 rows to the stream but a product.
        mixed = Tensor(f"{name}/mixed", mixed_step, rows=tokens.rows)
        same, affine = scaled_weights(np.eye(slots.shape[1]), np.zeros(slots.shape[1]), mixed,
                                      self.stream_step, 16)
        self._add(q.AddLinear(name=f"{name}/add", output=output, source=mixed.tensor,
                              residual=stream.tensor, first_row=0, weight=same, affine=affine))

    def _whole_norm(self, value: ir.Value, output: str) -> Tensor:
        """A norm with its scale and shift, which tokens as keys and queries cannot pass on to a
        weight; `gain` has the signs of the scale."""
        operation, _ = self.norms[value.name]
        if value.name in self.kept.grids:
            self.kept.note(self.kept.grids[value.name].names,
                           "keys of soft experts have a grid of their own, without a zero point")
        gamma, *beta = (array.astype(np.float64) for array in self._constants(value.producer()))
        sign = np.where(gamma < 0, -1.0, 1.0)
        size = np.maximum(np.abs(gamma), LIVE * np.abs(gamma).max() or 1.0)
        step = grid(self.calibration.rows(value.name))
        one = 1 << numerics.norm_fraction_bits(len(gamma))
        multiplier, shift = encode_scales(size / (step * one))
        bias = np.rint(sign * (beta[0] if beta else 0.0 * gamma) / size * one).astype(np.int32)
        affine = q.Affine(bias=bias, multiplier=multiplier, shift=shift)
        self._add(dataclasses.replace(operation, name=output, output=output, affine=affine))
        return Tensor(output, step, sign, rows=operation.rows)

    def _stored(self, output: str, rows: np.ndarray, step: float | None = None) -> Tensor:
        """Constant rows in the residual memory."""
        step = step or float(np.abs(rows).max() / 32767) or 1.0
        integers = np.clip(np.rint(rows / step), -32768, 32767).astype(np.int16)
        self._add(q.Constant(name=output, output=output, value=integers))
        return Tensor(output, step, rows=len(rows))

    def _rows_of(self, output: str, source: Tensor, step: float, first: int, count: int) -> Tensor:
        """Rows of the residual memory as int8."""
        multiplier, shift = encode_scales(np.full(self._channels(source), source.step / step))
        affine = q.Affine(bias=np.zeros(len(multiplier), np.int32), multiplier=multiplier, shift=shift)
        self._add(q.Norm(name=output, output=output, source=source.tensor, first_row=first, rows=count,
                         mode=NormMode.SCALE, epsilon=0, affine=affine))
        return Tensor(output, step, rows=count)

    def _channels(self, tensor: Tensor) -> int:
        made = next(op for op in self.result.operations if op.output == tensor.tensor)
        return made.value.shape[1] if isinstance(made, q.Constant) else len(made.weight)

    def _mix(self, output: str, query: Tensor, key: Tensor, value: Tensor, step: float) -> None:
        multiplier, shift = encode_scale(
            query.step * key.step * math.log2(math.e) * (1 << numerics.OCTAVE_BITS))
        out_multiplier, out_shift = encode_scale(value.step / step)
        self._add(q.Attention(name=output, output=output, query=query.tensor, key=key.tensor,
                              value=value.tensor, heads=1, key_heads=1, causal=False,
                              multiplier=multiplier, shift=shift, out_multiplier=out_multiplier,
                              out_shift=out_shift))
