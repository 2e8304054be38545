"""Each operation of the quantised graph as a PyTorch function over a batch of frames.

Tensors are [frames, rows, channels]: activations int8, residuals float64 that hold int16. A route
is a pair of [frames * rows, chosen]: experts int64 and gate weights float64.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import numpy as np
import torch

from moeware.hw.arch import quantised
from moeware.hw.arch.isa import NormMode
from moeware.hw.arch.quantised import Affine

from .torch_arithmetic import (
    Product,
    Scale,
    gate_weight_table,
    inverse,
    probability_table,
    to_int8,
    top_experts,
)

__all__ = ["Values", "prepare"]

Values = dict[str, Any]  # by name: a tensor, or a route's pair of tensors

# |(C x - S) / sqrt(V)| is at most sqrt(C): below this many channels a normalised value, with its
# relative error of 2**-14, cannot leave int16.
UNSATURATED_CHANNELS = 1000
TABLED_KEYS = 256  # a table of row scales has 1023 entries for each key


def by_frame(rows: torch.Tensor, frames: int) -> torch.Tensor:
    """[frames, rows, channels] of [frames * rows, channels]."""
    return rows.view(frames, len(rows) // frames, rows.shape[1])


@singledispatch
def prepare(op: quantised.Operation) -> Callable[[Values, int], object]:
    """The function of (values, frames) that computes `op`'s output from the values by name."""
    raise TypeError(f"Operation must be one of {list(quantised.OPERATIONS)}, not {op!r}")


@prepare.register
def _(op: quantised.Constant):
    value = torch.from_numpy(np.asarray(op.value, np.float64))
    return lambda values, frames: value.expand(frames, -1, -1)


@prepare.register
def _(op: quantised.Linear):
    product, scale = Product(op.weight), Scale(op.affine, table=op.table)

    def linear(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source]
        return by_frame(scale(product(source.flatten(0, 1))), frames)
    return linear


@prepare.register
def _(op: quantised.AddLinear):
    product = Product(op.weight)
    scale = Scale(op.affine, wide=True, reach=product.reach)

    def add_linear(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source]
        update = by_frame(scale(product(source.flatten(0, 1))), frames)
        if op.residual is None:
            return update
        residual = values[op.residual]
        if update.shape == residual.shape:
            return update.add_(residual).clamp_(-32768, 32767)
        result = residual.clone(memory_format=torch.contiguous_format)
        rows = result[:, op.first_row:op.first_row + source.shape[1]]
        rows.add_(update).clamp_(-32768, 32767)
        return result
    return add_linear


@prepare.register
def _(op: quantised.Norm):
    scale = Scale(op.affine)
    # By the exponent field of the variance, which says h: zero, and a float64 below 2**54.
    half = np.maximum((np.arange(1023 + 54) - 1021) >> 1, 0)
    align = torch.from_numpy(np.ldexp(1.0, 32 - 2 * half))
    drop = torch.from_numpy(np.ldexp(1.0, -6 - half))

    def norm(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source][:, op.first_row:op.first_row + op.rows]
        row = source.flatten(0, 1)
        channels = row.shape[1]
        if op.mode is NormMode.SCALE:
            return by_frame(scale(row.clone()), frames)
        variance = (row * row).sum(-1, keepdim=True).mul_(channels).add_(op.epsilon)
        if op.mode is NormMode.LAYER:
            total = row.sum(-1, keepdim=True)
            variance -= total * total
        exponent = (variance.view(torch.int64) >> 52).view(-1)
        root = align.index_select(0, exponent).view(-1, 1).mul_(variance).floor_().sqrt_().floor_()
        step = (4294967296.0 / root.clamp_(min=1)).floor_()
        step *= drop.index_select(0, exponent).view(-1, 1)
        offset = 0.5 - total * step if op.mode is NormMode.LAYER else 0.5
        value = torch.mul(row, step.mul_(channels)).add_(offset).floor_()
        if channels > UNSATURATED_CHANNELS:
            value.clamp_(-32768, 32767)
        return by_frame(scale(value), frames)
    return norm


@prepare.register
def _(op: quantised.Attention):
    key_head = torch.arange(op.heads) * op.key_heads // op.heads
    probabilities: dict[int, torch.Tensor] = {}  # by width of a head
    factors: dict[int, torch.Tensor] = {}  # by number of keys

    def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """float32 [frames, heads of the query, rows, width]."""
        frames, rows, channels = tensor.shape
        split = tensor.view(frames, rows, heads, channels // heads).transpose(1, 2)
        if heads != op.heads:
            split = split.index_select(1, key_head)
        return split.to(torch.float32, memory_format=torch.contiguous_format)

    def weighed(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities float32 [frames, heads, rows, keys] and their sums."""
        key = by_head(values[op.key], op.key_heads)
        query = by_head(values[op.query], op.heads)
        width = query.shape[-1]
        exact = torch.float32 if width <= 1024 else torch.float64
        scores = torch.matmul(query.to(exact), key.to(exact).transpose(2, 3))
        if op.causal:
            rows, keys = scores.shape[2:]
            hidden = torch.ones(rows, keys, dtype=torch.bool).triu_(1 + keys - rows)
            scores.masked_fill_(hidden, -torch.inf)
        torch.sub(scores.amax(-1, keepdim=True), scores, out=scores)
        if width not in probabilities:
            probabilities[width] = probability_table(op.multiplier, op.shift, width * 128 * 255)
        table = probabilities[width]
        index = scores.clamp_(max=len(table) - 1).to(torch.int32)
        weights = table.index_select(0, index.view(-1)).view(index.shape)
        return weights, weights.sum(-1, keepdim=True)

    def factor(total: torch.Tensor) -> torch.Tensor:
        """`numerics.row_scale` as one float64 for each sum of probabilities."""
        r, octave = inverse(total.double())
        return (r * op.out_multiplier + 32768).mul_(2.0 ** -16).floor_().mul_(octave).mul_(
            2.0 ** -op.out_shift)

    def looked_up(total: torch.Tensor, keys: int) -> torch.Tensor:
        """`factor`, from a table where the keys are few."""
        if keys > TABLED_KEYS:
            return factor(total)
        if keys not in factors:
            factors[keys] = factor(torch.arange(1023 * keys + 1))
        return factors[keys].index_select(0, total.view(-1).to(torch.int32)).view(total.shape)

    def attention(values: Values, frames: int) -> torch.Tensor:
        value = by_head(values[op.value], op.key_heads)
        if op.query is None:
            keys = value.shape[2]
            weights = torch.full((frames, op.heads, 1, keys), 1023.0)
            total = weights.sum(-1, keepdim=True)
        else:
            weights, total = weighed(values)
        # Every partial sum is at most total * 128.
        exact = torch.float32 if total.max() <= 1 << 17 else torch.float64
        mean = torch.matmul(weights.to(exact), value.to(exact)).double()
        result = to_int8(mean.mul_(looked_up(total, value.shape[2])).add_(128.5))
        return result.transpose(1, 2).flatten(2)
    return attention


@prepare.register
def _(op: quantised.Route):
    product, table = Product(op.weight), gate_weight_table()
    bias = torch.from_numpy(np.asarray(op.bias, np.float64))
    factor = op.multiplier * 2.0 ** -op.shift

    def route(values: Values, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = product(values[op.source].flatten(0, 1)).add_(bias)
        experts = top_experts(logits, op.chosen)
        chosen = logits.gather(1, experts)
        compared = chosen if op.over_chosen else logits
        steps = (chosen[:, :1] - compared).mul_(factor).add_(0.5)
        index = steps.clamp_(max=len(table) - 1).to(torch.int64)
        weights = table.index_select(0, index.view(-1)).view(index.shape)
        r, octave = inverse(weights.sum(-1, keepdim=True))
        if not op.over_chosen:
            weights = weights.gather(1, experts)
        return experts, weights.mul_(r).mul_(octave).floor_().clamp_(max=65535)
    return route


@prepare.register
def _(op: quantised.Experts):
    count = len(op.up)
    up = [Product(weight) for weight in op.up]
    down = [Product(weight) for weight in op.down]
    up_scale = [Scale(_of_expert(op.up_affine, e), table=op.table) for e in range(count)]
    down_scale = [Scale(_of_expert(op.down_affine, e), wide=True, reach=down[e].reach)
                  for e in range(count)]
    finish_down = max(down_scale, key=lambda scale: scale.saturates).finish

    def each(products, scales, source: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Scaled products of the experts' rows, which follow one another."""
        parts = source.split(counts)
        value = torch.cat([product.sums(part) for product, part in zip(products, parts)
                           if len(part)]).double()
        for scale, part in zip(scales, value.split(counts)):
            if len(part):
                scale.linear(part)
        return finish_down(value) if scales is down_scale else scales[0].finish(value)

    def experts(values: Values, frames: int) -> torch.Tensor:
        source, residual = values[op.source], values[op.residual]
        chosen, gates = values[op.route]
        chosen, order = chosen.sort(-1)  # a row's updates are added in the order of the experts
        gates = gates.gather(1, order)
        # Entry i of the queues of all experts, one behind the other, is slot queue[i] of the rows.
        flat = chosen.view(-1).numpy().astype(np.uint8)
        queue = torch.from_numpy(np.argsort(flat, kind="stable"))
        counts = np.bincount(flat, minlength=count).tolist()
        rows = source.flatten(0, 1).index_select(0, queue // chosen.shape[1])
        update = each(down, down_scale, each(up, up_scale, rows, counts), counts)
        gate = gates.view(-1).index_select(0, queue).mul_(2.0 ** -16)
        update.mul_(gate.view(-1, 1)).add_(0.5).floor_()
        place = torch.empty_like(queue)
        place[queue] = torch.arange(len(queue))
        result = residual.flatten(0, 1)
        for slot in place.view(chosen.shape).unbind(1):
            result = update.index_select(0, slot).add_(result).clamp_(-32768, 32767)
        return by_frame(result, frames)
    return experts


def _of_expert(affine: Affine, expert: int) -> Affine:
    return Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                  shift=affine.shift[expert])
