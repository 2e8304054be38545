"""Queries and keys that are normalised or turned between their product and attention."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import attributes, projection, shape
from moeware.compiler.quantise.state import State
from moeware.compiler.scales import encode_scales, grid
from moeware.compiler.weights import Tensor
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NormMode

__all__ = ["Projections", "head_channels"]


def head_channels(attention: ir.Node, value: ir.Value) -> np.ndarray:
    """Channels [heads, width] of what an attention reads, a row for each head of queries. The attention
    unit has one stride for queries, keys and values: heads of keys that several share are repeated."""
    heads, shared = attributes(attention)["heads"], attributes(attention)["kv_heads"]
    own = heads if value is attention.inputs[0] else shared
    return np.repeat(np.arange(shape(value)[-1]).reshape(own, -1), heads // own, 0)


class Projections(State):
    """Rules for RMSNorm of a Linear that attention reads, for Join and for Rotary.

    The product, or the sum of products of which each makes its own channels and zeros elsewhere, is kept in 16 bits on a grid of its own, with its bias: what stands between bias and
    score is not linear.
    """

    def _projected_norm(self, node: ir.Node) -> None:
        value = node.outputs[0]
        if self._consumers(value)[0].op_type != "Rotary":
            self._projection(node)

    def _Join(self, node):
        self.pending[node.outputs[0].name] = node

    def _Rotary(self, node, heads):
        self._projection(node)

    def _projection(self, node: ir.Node) -> None:
        """Emit what the last of a Linear or Join, a norm and a rotary embedding gives."""
        value = node.outputs[0]
        base, norm, rotary = projection(value)
        product = base.outputs[0]
        del self.pending[product.name]
        attention = self._consumers(value)[0]
        heads, width = head_channels(attention, value).shape
        order = _order(attention, value).ravel()

        step, sign = self._wide_step(product), np.ones(len(order))
        mode, groups, epsilon, scale = NormMode.SCALE, 1, 0, np.full(len(order), step)
        if norm is not None:
            attrs, gamma = attributes(norm), self._constants(norm)[0].astype(np.float64)
            # A head by itself wherever it makes no difference: all need not be there for it.
            by_head = attrs["groups"] > 1 or len(gamma) == width
            mode, groups = NormMode.RMS, heads if by_head else 1
            together = len(order) // groups
            step = max(step, self._finest(together, attrs["epsilon"]))
            epsilon = self._epsilon(together, attrs["epsilon"], step)
            gamma = gamma[order]
            scale = np.abs(gamma) / (1 << numerics.norm_fraction_bits(together))
            # Multipliers have no sign: the weights take it.
            sign = np.where(gamma < 0, -1.0, 1.0)
        rows = self._product(base, order, sign, step)

        gain, kept = self._score_gain(attention, value), self._kept_scores(value)
        target = kept or grid(self.calibration.rows(value.name)[:, order] / gain)
        rotation = None
        if rotary is not None:
            rotation, largest = _factors(*self._constants(rotary))
            scale = scale * largest * (1 << numerics.PAIR_BITS)
        multiplier, shift = encode_scales(scale / (gain * target))
        affine = q.Affine(bias=np.zeros(len(order), np.int32), multiplier=multiplier, shift=shift)
        self._add(q.Norm(name=node.name, output=value.name, source=product.name, first_row=0, rows=rows,
                         mode=mode, epsilon=epsilon, affine=affine, groups=groups, rotation=rotation))
        self.values[value.name] = Tensor(value.name, target, gain, rows=rows)
        self.columns[value.name] = order

    def _product(self, base: ir.Node, order: np.ndarray, sign: np.ndarray, step: float) -> int:
        """Emit channels `order` of a Linear or Join, times `sign`; returns the number of rows."""
        parts = [(base, order)] if base.op_type == "Linear" else self._joined(base, order)
        outputs = [*(linear.outputs[0].name for linear, _ in parts[:-1]), base.outputs[0].name]
        for (linear, rows), residual, output in zip(parts, [None, *outputs], outputs):
            weight, bias = (array[rows] for array in self._constants(linear))
            factor = np.where(rows < 0, 0, sign).astype(weight.dtype)
            self._add_linear(linear, output, step, residual=residual,
                             constants=(weight * factor[:, None], bias * factor))
        return self._tensor(parts[0][0].inputs[0]).rows

    def _joined(self, join: ir.Node, order: np.ndarray) -> list[tuple[ir.Node, np.ndarray]]:
        """The Linears of a Join, and the channel of each that every channel of `order` is, or -1."""
        columns, found = join.inputs[2].const_value.numpy()[order], []
        for value in join.inputs[:2]:
            width = shape(value)[-1]
            found.append((self.pending.pop(value.name),
                          np.where((0 <= columns) & (columns < width), columns, -1)))
            columns = columns - width
        # The one with less to do for each channel makes the zeros, too.
        return sorted(found, key=lambda part: shape(part[0].inputs[0])[-1])

    def _score_gain(self, attention: ir.Node, value: ir.Value) -> np.ndarray:
        """Factors that the channels of queries or keys are divided by, reciprocal to each other, so that
        scores stay and what is loud in one is shared by both (SmoothQuant, section 4, alpha = 1/2); one
        for both channels of a pair, which a rotation mixes."""
        queries, keys, values = attention.inputs
        plain = any(projection(each)[1:] == (None, None) for each in (queries, keys))
        if value is values or plain or self._kept_scores(queries) or self._kept_scores(keys):
            return np.ones(_order(attention, value).size)  # a plain Linear or a grid of the file
        loud = []
        for each in (queries, keys):
            samples = self.calibration.rows(each.name)[:, _order(attention, each)]
            loud.append(np.sqrt(np.square(samples).sum(-1)).max(0))
        gain = np.ones(loud[0].shape)
        usable = (loud[0] > 0) & (loud[1] > 0)
        gain[usable] = np.sqrt(loud[0][usable] / loud[1][usable])
        gain = np.repeat(np.clip(gain, 1 / 64, 64), _order(attention, value).shape[-1], -1).ravel()
        return gain if value is queries else 1 / gain

    def _kept_scores(self, value: ir.Value) -> float | None:
        """Step of the grid that queries or keys came with."""
        kept = self._kept_grid(value, self.calibration.rows(value.name), "middle")
        return kept and kept[0]


def _order(attention: ir.Node, value: ir.Value) -> np.ndarray:
    """Channels [heads, pairs, 2] of turned queries or keys, a pair side by side; of others
    [heads, width, 1]."""
    order = head_channels(attention, value)
    if projection(value)[2] is None:
        return order[..., None]
    return order.reshape(len(order), 2, -1).swapaxes(1, 2)


def _factors(cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, float]:
    """Factors [rows, width] as `numerics.rotate` takes them, and what they were divided by: 1, or more
    where a model scales its scores by them."""
    factors = np.stack([cos, sin], -1).astype(np.float64).reshape(len(cos), -1)
    largest = max(1.0, float(np.abs(factors).max()))
    return np.rint(factors / largest * (1 << numerics.FACTOR_BITS)).astype(np.int16), largest
