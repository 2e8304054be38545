"""Attention of the quantised graph in PyTorch, over all heads of a batch of frames at once."""

from collections.abc import Callable

import torch

from moeware.hw.arch import quantised

from .torch_arithmetic import inverse, probability_table

__all__ = ["attention"]

TABLED_KEYS = 256  # a table of row scales has 1023 entries for each key
HIDDEN = -1 << 30  # below every score


def attention(op: quantised.Attention) -> Callable[..., torch.Tensor]:
    """The function of (query, key, value), [rows, frames, channels] each, or None for a query that is
    None, that computes the output of `op`, int8."""
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

    def weighed(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities float32 [frames * heads, rows, keys], and their sums [..., 1]."""
        query, key = by_head(query, op.heads), by_head(key, op.key_heads)
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

    def weighted_means(query, key, value) -> torch.Tensor:
        frames = value.shape[1]
        value = by_head(value, op.key_heads)
        keys, width = value.shape[1:]
        if query is None:
            weights = torch.full((frames * op.heads, 1, keys), 1023.0)
            total = weights.sum(-1, keepdim=True)
        else:
            weights, total = weighed(query, key)
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
    return weighted_means
