"""Each operation of the quantised graph as a PyTorch function over a batch of frames.

Tensors are [frames, rows, channels]: activations int8, residuals float64 that hold int16. A route is
a pair of [frames * rows, chosen]: experts int64 and gate weights float64.
"""

from collections.abc import Callable
from functools import singledispatch

import numpy as np
import torch

from moeware.hw.arch import quantised
from moeware.hw.arch.isa import NormMode
from moeware.hw.arch.quantised import Affine

from .torch_arithmetic import (
    Product, Scale, exponent, gate_weight_table, inverse, probability_table, to_int8, top_experts,
)

__all__ = ["Values", "prepare"]

Values = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]

# |(C x - S) / sqrt(V)| is at most sqrt(C): below this many channels a normalised value, with its
# relative error of 2**-14, cannot leave int16.
UNSATURATED_CHANNELS = 1000


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
        return scale(product(source.flatten(0, 1))).unflatten(0, source.shape[:2])
    return linear


@prepare.register
def _(op: quantised.AddLinear):
    product, scale = Product(op.weight), Scale(op.affine, wide=True)

    def add_linear(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source]
        update = scale(product(source.flatten(0, 1))).unflatten(0, source.shape[:2])
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
    half_bits = torch.arange(28, dtype=torch.float64)
    align = torch.from_numpy(np.ldexp(1.0, 32 - 2 * half_bits.numpy().astype(np.int32)))
    drop = torch.from_numpy(np.ldexp(1.0, -6 - half_bits.numpy().astype(np.int32)))

    def norm(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source][:, op.first_row:op.first_row + op.rows]
        row = source.flatten(0, 1)
        channels = row.shape[1]
        if op.mode is NormMode.SCALE:
            return scale(row.clone()).unflatten(0, source.shape[:2])
        variance = (row * row).sum(-1, keepdim=True).mul_(channels).add_(op.epsilon)
        if op.mode is NormMode.LAYER:
            total = row.sum(-1, keepdim=True)
            variance -= total * total
        half = (exponent(variance).view(-1) + 1) >> 1
        root = (variance * align.index_select(0, half).view(-1, 1)).floor_().sqrt_().floor_()
        step = (4294967296.0 / root.clamp_(min=1)).floor_()
        step *= drop.index_select(0, half).view(-1, 1)
        offset = 0.5 - total * step if op.mode is NormMode.LAYER else 0.5
        value = torch.mul(row, step.mul_(channels)).add_(offset).floor_()
        if channels > UNSATURATED_CHANNELS:
            value.clamp_(-32768, 32767)
        return scale(value).unflatten(0, source.shape[:2])
    return norm


@prepare.register
def _(op: quantised.Attention):
    factor = op.out_multiplier
    key_head = torch.arange(op.heads) * op.key_heads // op.heads
    probabilities: dict[int, torch.Tensor] = {}  # by width of a head

    def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """float32 [frames, heads of the query, rows, width]."""
        split = tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
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
        index = scores.clamp_(max=len(table) - 1).to(torch.int64)
        weights = table.index_select(0, index.view(-1)).view(index.shape)
        return weights, weights.sum(-1, keepdim=True)

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
        r, octave = inverse(total.double())
        row = (r * factor + 32768).mul_(2.0 ** -16).floor_().mul_(octave).mul_(2.0 ** -op.out_shift)
        result = to_int8(mean.mul_(row).add_(128.5))
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
    down_scale = [Scale(_of_expert(op.down_affine, e), wide=True) for e in range(count)]

    def each(products, scales, source: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Scaled products of the experts' rows, which follow one another."""
        parts = source.split(counts)
        value = torch.cat([product.sums(part) for product, part in zip(products, parts)
                           if len(part)]).double()
        for scale, part in zip(scales, value.split(counts)):
            if len(part):
                scale.linear(part)
        return scales[0].finish(value)

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
        return result.unflatten(0, residual.shape[:2])
    return experts


def _of_expert(affine: Affine, expert: int) -> Affine:
    return Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                  shift=affine.shift[expert])
