"""Attention, and the mean over tokens, which is attention with a query of zeros."""

import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import shape
from moeware.compiler.quantise.state import State, without
from moeware.compiler.scales import (
    encode_scale,
    grid,
)
from moeware.compiler.weights import Tensor
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q

__all__ = ["Attention"]


class Attention(State):
    """Rules for Attention and MeanTokens."""

    def _Attention(self, node, heads, scale, causal, **_):
        query, key, value = (self._tensor(v) for v in node.inputs)
        output = node.outputs[0]
        samples, shift = self.calibration.rows(output.name), _shift(value, output)
        kept = self._kept_mean(output, samples, shift, value.gain)
        if shift is not None:
            samples = without(samples, shift)
        if value.gain is not None:
            samples = samples / value.gain
        self._attention(node, query, key, value, output, kept or grid(samples), shift=shift,
                        gain=value.gain, heads=heads, causal=bool(causal),
                        per_step=scale * query.step * key.step)

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
        kept = self._kept_mean(output, plain, source.shift, source.gain)
        if source.shift is not None:
            plain = without(plain, source.shift)
        if source.gain is not None:
            plain = np.where(source.gain != 0, plain / np.where(source.gain, source.gain, 1), 0)
        # Equal scores weigh every row alike: attention with a query of zeros is the mean.
        self._attention(node, None, source, source, output, kept or grid(plain), per_step=0.0,
                        shift=source.shift, gain=source.gain, heads=1, causal=False)

    def _kept_mean(self, output: ir.Value, samples: np.ndarray, shift, gain) -> float | None:
        """Step of the grid that a mean of values came with."""
        if shift is None and gain is None:
            kept = self._kept_grid(output, samples, "middle")
            return kept and kept[0]
        if output.name in self.kept.grids:
            self.kept.note(self.kept.grids[output.name].names,
                           "a mean of values has their offset, not one of its own")
        return None

    def _value_gain(self, attention: ir.Node, samples: np.ndarray, shift) -> np.ndarray:
        """Factors that the channels of a value are divided by, and those of the weighted means with
        them: the values' and the means' largest magnitudes share the difference (SmoothQuant,
        section 4, alpha = 1/2)."""
        means = self.calibration.rows(attention.outputs[0].name)
        means = np.abs(means if shift is None else without(means, shift)).max(0)
        values = np.abs(samples).max(0)
        usable = (values > 0) & (means > 0)
        gain = np.ones(len(values))
        gain[usable] = np.sqrt(values[usable] * means[usable])
        return gain / gain.max()


def _shift(value: Tensor, output: ir.Value) -> np.ndarray | None:
    """What a mean of values has in common over the rows: weights sum to one."""
    if not value.offset:
        return value.shift
    return value.offset + (np.zeros(shape(output)[-1]) if value.shift is None else value.shift)
