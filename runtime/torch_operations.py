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

from moeware.hw.arch import numerics, quantised, routing
from moeware.hw.arch.isa import NormMode
from moeware.hw.arch.quantised import Affine

from .torch_arithmetic import (
    Product,
    Scale,
    gate_weight_table,
    in_best_groups,
    inverse,
    paired,
    score_table,
    top_experts,
)
from .torch_attention import attention

__all__ = ["Values", "prepare"]

Values = dict[str, Any]  # by name: a tensor, or a route's pair of tensors

# |(C x - S) / sqrt(V)| is at most sqrt(C): below this many channels a normalised value, with its
# relative error of 2**-14, cannot leave int16.
UNSATURATED_CHANNELS = 1000


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
    dtype = torch.float32 if attended else torch.int8
    if op.gate is not None:
        gate = Product(op.gate)
        value = Scale(op.gate_affine, table=op.table, reach=gate.reach)
        factor = Scale(op.affine, wide=True, reach=product.reach)

        def gated(values: Values, frames: int) -> torch.Tensor:
            source = values[op.source].flatten(0, 1)
            result = paired(value(gate.sums(source)), factor(product.sums(source)))
            return by_row(result.to(dtype), frames)
        return gated
    scale = Scale(op.affine, table=op.table, reach=product.reach)

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
    scale = Scale(op.affine, wide=op.rotation is not None, reach=32768)
    dtype = torch.float32 if attended else torch.int8
    turn = _rotate(op.rotation)
    half = (np.arange(64) + 1) >> 1  # by the number of bits of the variance
    left, right = (torch.from_numpy(np.maximum(bits, 0)) for bits in (32 - 2 * half, 2 * half - 32))
    fraction = numerics.norm_fraction_bits(len(op.affine.bias) // op.groups)
    drop = torch.from_numpy(np.ldexp(1.0, fraction - 16 - half))

    def norm(values: Values, frames: int) -> torch.Tensor:
        source = values[op.source][op.first_row:op.first_row + op.rows]
        if op.mode is NormMode.SCALE:
            return turn(by_row(scale(source.flatten(0, 1).double()), frames)).to(dtype)
        row = source.unflatten(-1, (op.groups, -1)).flatten(0, 2).double()
        channels = row.shape[1]
        # A float64 of 1 + 2**-53 times the norm has a square of 1 + 2**-51 times at most: the root
        # of a sum of squares, an integer below 2**46, leads back to it.
        squares = torch.linalg.vector_norm(row, dim=-1).square_().round_()
        variance = squares.long().mul_(channels).add_(op.epsilon)  # of 63 bits at most
        if op.mode is NormMode.LAYER:
            total = row.sum(-1)
            variance.sub_(total.long().square_())
        # As in `numerics.bit_length`.
        bits = torch.frexp((variance & ~(variance >> 1)).double()).exponent
        aligned = (variance << left.index_select(0, bits)) >> right.index_select(0, bits)
        root = aligned.double().sqrt_().floor_()
        step = root.clamp_(min=1).reciprocal_().mul_(4294967296.0).floor_()
        step.mul_(drop.index_select(0, bits))
        row.mul_((step * channels).unsqueeze(1))
        if op.mode is NormMode.LAYER:
            row.sub_(total.mul_(step).sub_(0.5).unsqueeze(1)).floor_()
        else:
            row.add_(0.5).floor_()
        if channels > UNSATURATED_CHANNELS:
            row.clamp_(-32768, 32767)
        return turn(by_row(scale(row.view(-1, source.shape[-1])), frames)).to(dtype)
    return norm


def _rotate(rotation: np.ndarray | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`numerics.rotate` of [rows, frames, channels], each head by the factors of its row."""
    if rotation is None:
        return lambda values: values
    # A product has 31 bits at most, so float64 holds it and its fraction.
    factors = np.ldexp(np.asarray(rotation, np.float64), -numerics.FACTOR_BITS - numerics.PAIR_BITS)
    cos, sin = torch.from_numpy(factors)[:, None, None].unflatten(-1, (-1, 2)).unbind(-1)

    def turn(values: torch.Tensor) -> torch.Tensor:
        pairs = values.double().unflatten(-1, (-1, rotation.shape[1] // 2, 2))
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
        return turned.add_(0.5).floor_().clamp_(-128, 127).flatten(2)
    return turn


@prepare.register
def _(op: quantised.Attention, attended: bool):
    weighted_means = attention(op)
    names = op.query, op.key, op.value
    return lambda values, frames: weighted_means(*(name and values[name] for name in names))


@prepare.register
def _(op: quantised.Route, attended: bool):
    product = Product(op.weight)
    bias = torch.from_numpy(np.asarray(op.bias, np.float64))
    weigh = _scores(op) if op.sigmoid else _sparse(op) if op.sparse else _softmax(op)

    def route(values: Values, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = product.sums(values[op.source].flatten(0, 1)).double().add_(bias)
        experts, weights = weigh(logits)
        if op.capacity:
            weights.mul_(_within_capacity(op, experts, frames))
        return experts, weights
    return route


def _within_capacity(op: quantised.Route, experts: torch.Tensor, frames: int) -> torch.Tensor:
    """`routing.within_capacity` of each frame, bool [rows * frames, chosen]."""
    chosen = experts.view(-1, frames, op.chosen).numpy()
    kept = [routing.within_capacity(chosen[:, frame], op.capacity, by_rank=op.by_rank)
            for frame in range(frames)]
    return torch.from_numpy(np.stack(kept, 1)).flatten(0, 1)


def _softmax(op: quantised.Route):
    table, factor = gate_weight_table(), op.multiplier * 2.0 ** -op.shift

    def weigh(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts = top_experts(_grouped(op, logits), op.chosen)
        chosen = logits.gather(1, experts)
        compared = chosen if op.over_chosen else logits
        steps = (chosen[:, :1] - compared).mul_(factor).add_(0.5)
        index = steps.clamp_(max=len(table) - 1).to(torch.int32)
        weights = table.index_select(0, index.view(-1)).view(index.shape)
        r, octave = inverse(weights.sum(-1, keepdim=True))
        if not op.over_chosen:
            weights = weights.gather(1, experts)
        return experts, weights.mul_(r).mul_(octave).floor_().clamp_(max=65535)
    return weigh


def _scores(op: quantised.Route):
    table, factor = score_table(), op.multiplier * 2.0 ** -op.shift
    correction = None if op.correction is None else torch.from_numpy(op.correction.astype(np.float64))
    one = torch.full((1, 1), 65536.0, dtype=torch.float64)

    def weigh(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = logits.abs().mul_(factor).add_(0.5).clamp_(max=len(table) - 1).to(torch.int32)
        scores = table.index_select(0, place.view(-1)).view(place.shape)
        scores = torch.where(logits < 0, 65536 - scores, scores)
        compared = logits if correction is None else scores + correction
        experts = top_experts(_grouped(op, compared), op.chosen)
        weights = scores.gather(1, experts)
        r, octave = inverse(weights.sum(-1, keepdim=True) if op.over_chosen else one)
        return experts, weights.mul_(r).mul_(octave).floor_().clamp_(max=65535)
    return weigh


def _sparse(op: quantised.Route):
    table, factor = gate_weight_table(), op.multiplier * 2.0 ** -op.shift
    one = 2.0 ** routing.NEAR_BITS

    def weigh(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = top_experts(logits, op.chosen), []
        left = torch.ones_like(logits)  # 1 for each expert that was not chosen before
        for each in experts.split(1, -1):
            largest = logits.gather(1, each)
            below = largest - logits
            # Both sides are integers below 2**48.
            near = below * one <= logits.abs().maximum(largest) * op.threshold
            index = (below * factor).add_(0.5).clamp_(0, len(table) - 1).to(torch.int32)
            parts = table.index_select(0, index.view(-1)).view(index.shape)
            r, octave = inverse((parts * left * near).sum(-1, keepdim=True))
            weights.append(parts.gather(1, each).mul_(r).mul_(octave).floor_().clamp_(max=65535))
            left.scatter_(1, each, 0.0)
        return experts, torch.cat(weights, 1)
    return weigh


def _grouped(op: quantised.Route, compared: torch.Tensor) -> torch.Tensor:
    return in_best_groups(compared, op.group, op.chosen_groups, op.pair) if op.group else compared


@prepare.register
def _(op: quantised.Experts, attended: bool):
    if op.gate is None:
        hidden_of = _per_expert(op.up, op.up_affine, table=op.table)
    else:
        value = _per_expert(op.gate, op.gate_affine, table=op.table)
        factor = _per_expert(op.up, op.up_affine, wide=True)

        def hidden_of(source: torch.Tensor, counts: list[int]) -> torch.Tensor:
            return paired(value(source, counts), factor(source, counts))
    update_of = _per_expert(op.down, op.down_affine, wide=True)

    def experts(values: Values, frames: int) -> torch.Tensor:
        source, residual = values[op.source], values[op.residual]
        chosen, gates = values[op.route]
        # Entry i of the queues of all experts, one behind the other, is slot queue[i] of the rows.
        flat = chosen.view(-1).numpy().astype(np.uint8)
        queue = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=len(op.up)).tolist()
        rows = source.flatten(0, 1).index_select(0, torch.from_numpy(queue // chosen.shape[1]))
        hidden = hidden_of(rows, counts).to(torch.int8)
        update = update_of(hidden, counts).to(torch.int32)
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


def _per_expert(weight: np.ndarray, affine: Affine,
                **options) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """The scaled products of (rows, counts), where the experts' rows, so many of each, follow one
    another. options : of the scales."""
    layers = [(product, Scale(affine.part(expert), reach=product.reach, **options))
              for expert, product in enumerate(map(Product, weight))]
    scales = [scale for _, scale in layers]
    finish = max(scales, key=lambda scale: scale.saturates).finish
    wide = any(scale.dtype == torch.float64 for scale in scales)
    dtype = torch.float64 if wide else torch.float32

    def scaled(source: torch.Tensor, counts: list[int]) -> torch.Tensor:
        result = torch.empty(len(source), weight.shape[1], dtype=dtype)
        parts = zip(layers, source.split(counts), result.split(counts), strict=True)
        for (product, scale), part, own in parts:
            if len(part):
                scale.linear(product.sums(part), own)
        return finish(result)
    return scaled
