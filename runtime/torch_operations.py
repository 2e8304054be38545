"""Each operation of the quantised graph as a PyTorch function over a batch of frames.

Tensors are [rows, frames, channels], so that some rows of every frame, and one head of all of them,
lie in memory at one stride. Activations are int8, or float32 where only attention reads them;
residuals float32 that holds int16. A route is a pair of [rows * frames, chosen]: experts int64 and
gate weights float64.
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
    top_experts,
)

__all__ = ["Values", "prepare"]

Values = dict[str, Any]  # by name: a tensor, or a route's pair of tensors

# |(C x - S) / sqrt(V)| is at most sqrt(C): below this many channels a normalised value, with its
# relative error of 2**-14, cannot leave int16.
UNSATURATED_CHANNELS = 1000
TABLED_KEYS = 256  # a table of row scales has 1023 entries for each key
HIDDEN = -1 << 30  # below every score


def by_row(flat: torch.Tensor, frames: int) -> torch.Tensor:
    """[rows, frames, channels] of [rows * frames, channels]."""
    return flat.view(len(flat) // frames, frames, flat.shape[1])


@singledispatch
def prepare(op: quantised.Operation, attended: bool) -> Callable[[Values, int], object]:
    """The function of (values, frames) that computes `op`'s output from the values by name.

    attended : whether nothing but attention reads an activation.
    """
    raise TypeError(f"Operation must be one of {list(quantised.OPERATIONS)}, not {op!r}")


@prepare.register
def _(op: quantised.Constant, attended: bool):
    value = torch.from_numpy(np.asarray(op.value, np.float32)).unsqueeze(1)
    return lambda values, frames: value.expand(-1, frames, -1)


@prepare.register
def _(op: quantised.Linear, attended: bool):
    product = Product(op.weight)
    scale = Scale(op.affine, table=op.table, reach=product.reach)
    dtype = torch.float32 if attended else torch.int8

    def linear(values: Values, frames: int) -> torch.Tensor:
        return by_row(scale(product.sums(values[op.source].flatten(0, 1))).to(dtype), frames)
    return linear


@prepare.register
def _(op: quantised.AddLinear, attended: bool):
    product = Product(op.weight)
    scale = Scale(op.affine, wide=True, reach=product.reach)

    def add_linear(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source]
        update = by_row(scale(product.sums(source.flatten(0, 1))).float(), frames)
        if op.residual is None:
            return update
        residual, last_row = values[op.residual], op.first_row + len(source)
        update.add_(residual[op.first_row:last_row]).clamp_(-32768, 32767)
        if len(update) == len(residual):
            return update
        return torch.cat([residual[:op.first_row], update, residual[last_row:]])
    return add_linear


@prepare.register
def _(op: quantised.Norm, attended: bool):
    scale = Scale(op.affine, reach=32768)
    dtype = torch.float32 if attended else torch.int8
    # By the exponent field of the variance, which says h: zero, and a float64 below 2**54.
    half = np.maximum((np.arange(1023 + 54) - 1021) >> 1, 0)
    align = torch.from_numpy(np.ldexp(1.0, 32 - 2 * half))
    drop = torch.from_numpy(np.ldexp(1.0, -6 - half))

    def norm(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source][op.first_row:op.first_row + op.rows]
        row = source.flatten(0, 1).double()
        channels = row.shape[1]
        if op.mode is NormMode.SCALE:
            return by_row(scale(row).to(dtype), frames)
        variance = (row * row).sum(-1).mul_(channels).add_(op.epsilon)
        if op.mode is NormMode.LAYER:
            total = row.sum(-1)
            variance.addcmul_(total, total, value=-1)
        exponent = variance.view(torch.int64) >> 52
        root = align.index_select(0, exponent).mul_(variance).floor_().sqrt_().floor_()
        step = root.clamp_(min=1).reciprocal_().mul_(4294967296.0).floor_()
        step.mul_(drop.index_select(0, exponent))
        row.mul_((step * channels).unsqueeze(1))
        if op.mode is NormMode.LAYER:
            row.sub_(total.mul_(step).sub_(0.5).unsqueeze(1)).floor_()
        else:
            row.add_(0.5).floor_()
        if channels > UNSATURATED_CHANNELS:
            row.clamp_(-32768, 32767)
        return by_row(scale(row).to(dtype), frames)
    return norm


@prepare.register
def _(op: quantised.Attention, attended: bool):
    key_head = torch.arange(op.heads) * op.key_heads // op.heads
    loud = op.out_multiplier * 2.0 ** -op.out_shift > 200  # 128 times this leaves int16
    probabilities: dict[int, torch.Tensor] = {}  # by width of a head
    factors: dict[int, torch.Tensor] = {}  # by number of keys

    def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """float32 [frames * heads of the query, rows, width]."""
        rows, frames, channels = tensor.shape
        width = channels // heads
        if heads != op.heads:
            tensor = tensor.view(rows, frames, heads, width).index_select(2, key_head)
        return tensor.float().view(rows, frames * op.heads, width).transpose(0, 1)

    def weighed(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities float32 [frames * heads, rows, keys], and their sums [..., 1]."""
        key = by_head(values[op.key], op.key_heads)
        query = by_head(values[op.query], op.heads)
        width = query.shape[-1]
        exact = torch.float32 if width <= 1024 else torch.float64
        # int32, because torch finds the maximum of a short row of floats element by element.
        scores = torch.bmm(query.to(exact), key.to(exact).transpose(1, 2)).to(torch.int32)
        rows, keys = scores.shape[1:]
        if op.causal:
            scores.masked_fill_(torch.ones(rows, keys, dtype=torch.bool).triu_(1 + keys - rows),
                                HIDDEN)
        if width not in probabilities:
            probabilities[width] = probability_table(op.multiplier, op.shift, width * 128 * 255)
        table = probabilities[width]
        index = torch.sub(scores.amax(-1, keepdim=True), scores, out=scores)
        index.clamp_(max=len(table) - 1)
        weights = table.index_select(0, index.view(-1)).view(-1, keys)
        total = torch.mv(weights, torch.ones(keys))
        return weights.view(-1, rows, keys), total.view(-1, rows, 1)

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
        keys, width = value.shape[1:]
        if op.query is None:
            weights = torch.full((frames * op.heads, 1, keys), 1023.0)
            total = weights.sum(-1, keepdim=True)
        else:
            weights, total = weighed(values)
        # Every partial sum is at most total * 128, and total at most keys * 1023.
        exact = torch.float32 if keys <= 128 or total.max() <= 1 << 17 else torch.float64
        mean = torch.bmm(weights.to(exact), value.to(exact)).double()
        mean.mul_(looked_up(total, keys)).add_(128.5)
        if loud:
            mean.clamp_(0, 255.5)
        # Cutting off the fraction is a floor above 0, and what is below becomes 0 anyway.
        result = torch.empty(mean.shape[1], *value.shape[::2], dtype=torch.int16)
        result.transpose(0, 1).copy_(mean)
        result = result.clamp_(0, 255).sub_(128).to(torch.int8)
        return result.view(mean.shape[1], frames, op.heads * width)
    return attention


@prepare.register
def _(op: quantised.Route, attended: bool):
    product, table = Product(op.weight), gate_weight_table()
    bias = torch.from_numpy(np.asarray(op.bias, np.float64))
    factor = op.multiplier * 2.0 ** -op.shift

    def route(values: Values, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = product.sums(values[op.source].flatten(0, 1)).double().add_(bias)
        experts = top_experts(logits, op.chosen)
        chosen = logits.gather(1, experts)
        compared = chosen if op.over_chosen else logits
        steps = (chosen[:, :1] - compared).mul_(factor).add_(0.5)
        index = steps.clamp_(max=len(table) - 1).to(torch.int32)
        weights = table.index_select(0, index.view(-1)).view(index.shape)
        r, octave = inverse(weights.sum(-1, keepdim=True))
        if not op.over_chosen:
            weights = weights.gather(1, experts)
        return experts, weights.mul_(r).mul_(octave).floor_().clamp_(max=65535)
    return route


@prepare.register
def _(op: quantised.Experts, attended: bool):
    up = [(product, Scale(_of_expert(op.up_affine, expert), table=op.table, reach=product.reach))
          for expert, product in enumerate(map(Product, op.up))]
    down = [(product, Scale(_of_expert(op.down_affine, expert), wide=True, reach=product.reach))
            for expert, product in enumerate(map(Product, op.down))]

    finish_up, finish_down = (max((scale for _, scale in layers),
                                  key=lambda scale: scale.saturates).finish
                              for layers in (up, down))

    def each(layers: list[tuple[Product, Scale]], source: torch.Tensor,
             counts: list[int]) -> torch.Tensor:
        """What the scales round, for the experts' rows, which follow one another."""
        dtype = torch.float32
        if any(scale.dtype == torch.float64 for _, scale in layers):
            dtype = torch.float64
        result = torch.empty(len(source), len(layers[0][1].factor), dtype=dtype)
        parts = zip(layers, source.split(counts), result.split(counts), strict=True)
        for (product, scale), part, own in parts:
            if len(part):
                scale.linear(product.sums(part), own)
        return result

    def experts(values: Values, frames: int) -> torch.Tensor:
        source, residual = values[op.source], values[op.residual]
        chosen, gates = values[op.route]
        # Entry i of the queues of all experts, one behind the other, is slot queue[i] of the rows.
        flat = chosen.view(-1).numpy().astype(np.uint8)
        queue = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=len(up)).tolist()
        rows = source.flatten(0, 1).index_select(0, torch.from_numpy(queue // chosen.shape[1]))
        hidden = finish_up(each(up, rows, counts)).to(torch.int8)
        update = finish_down(each(down, hidden, counts)).to(torch.int32)
        # (2**15 - 1) * 65535 + 2**15 and -2**15 * 65535 fit.
        gate = gates.to(torch.int32).view(-1).index_select(0, torch.from_numpy(queue))
        update.mul_(gate.unsqueeze(1)).add_(32768).bitwise_right_shift_(16)
        update = update.float()
        place = np.empty_like(queue)
        place[queue] = np.arange(len(queue))
        # A row's updates are added in the order of the experts, which is that of the queues.
        place = torch.from_numpy(place).view(chosen.shape).sort(-1).values
        result = residual.flatten(0, 1)
        for slot in place.unbind(1):
            result = update.index_select(0, slot).add_(result).clamp_(-32768, 32767)
        return by_row(result, frames)
    return experts


def _of_expert(affine: Affine, expert: int) -> Affine:
    return Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                  shift=affine.shift[expert])
