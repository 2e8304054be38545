"""The integers of `hw.arch.numerics` in the float formats that a CPU is fastest at, all exact.

A float64 holds every integer and every multiple of a power of two whose numerator stays below
2**53. ``value * multiplier / 2**shift + 1/2`` is (value * multiplier + 2**(shift - 1)) / 2**shift
with a numerator below 2**49, so one multiplication and one addition give it exactly, and a floor
the result. A float32 holds integers up to 2**24: sums of int8 products up to a depth of 1,024.
"""

import functools

import numpy as np
import torch

from moeware.hw.arch import numerics, routing
from moeware.hw.arch.quantised import Affine

__all__ = ["Product", "Scale", "gate_weight_table", "in_best_groups", "inverse", "paired",
           "probability_table", "score_table", "top_experts"]

FLOAT32_DEPTH = 1 << (24 - 14)  # int8 products, each at most 2**14, whose sum float32 holds


def _exact_int8_products() -> bool:
    """Whether this CPU sums int8 products in 32 bits without saturating on the way (VNNI), and the
    installed PyTorch uses that."""
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not supported() or not hasattr(torch, "_int_mm"):
        return False
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    left, right = extremes.repeat(64, 32)[:, :64], extremes.repeat(64, 32).t()[:64, :64]
    products = torch._int_mm(left.contiguous(), right.contiguous()).double()
    return torch.equal(products, left.double() @ right.double())


INT8_PRODUCTS = _exact_int8_products()


class Product:
    """``source @ weight.T`` for int8 source [rows, depth] and weight [channels, depth].

    It uses the CPU's int8 instructions where there are any; otherwise float32 products, in parts of
    the depth whose sums are exact. `reach` is the largest magnitude of each channel.
    """

    def __init__(self, weight: np.ndarray):
        # PyTorch 2.13's int8 product takes a depth of 1 for a transposed matrix, and is wrong.
        self.int8_products = INT8_PRODUCTS and weight.shape[1] > 1
        turned = torch.tensor(np.asarray(weight, np.int8).T.copy())
        self.reach = 128 * np.abs(np.asarray(weight, np.int64)).sum(1)
        if self.int8_products:
            self.parts = [turned]
        else:
            self.parts = [part.float() for part in turned.split(FLOAT32_DEPTH)]

    def sums(self, source: torch.Tensor) -> torch.Tensor:
        """[rows, channels] of source integers of any type, exact, in the type that is fastest."""
        if self.int8_products:
            source = source.to(torch.int8)
            # It takes strides at their word, even those of an axis of length 1: any number.
            if source.stride() != (source.shape[1], 1):
                source = source.contiguous().view(-1).view(source.shape)
            return torch._int_mm(source, self.parts[0])
        real = source.float()
        if len(self.parts) == 1:
            return torch.mm(real, self.parts[0])
        products = (torch.mm(columns, part).double()
                    for columns, part in zip(real.split(FLOAT32_DEPTH, 1), self.parts, strict=True))
        return sum(products, start=torch.zeros((), dtype=torch.float64))


class Scale:
    """`numerics.requantise` of integers [rows, channels] plus bias.

    Bias and rounding are one constant for each channel, ``offset``, and a floor follows:
    y = floor(value * factor + offset). `dtype` is float32 where that is exact. With
    u = 1 / 2**s the unit of `factor` (and of `offset`: s is 1 at least), a float32 holds multiples
    of u up to 2**24 u, and L = 2**7 or 2**15 is where y saturates. Let
    min(L, largest value * factor) + offset <= 2**24 u in magnitude. Then

    - a product that is not exact is 2**24 u or more (its exact value is beyond 2**24 u, which a
      float32 holds, and rounding keeps the order), so that with `offset` it is L or more: y
      saturates, as it should; the same is true of a value beyond 2**24, as factor >= u;
    - a sum that is not exact is beyond 2**24 u >= L and saturates, too.

    reach : largest magnitude of the values by channel.
    """

    def __init__(self, affine: Affine, *, wide: bool = False, table: np.ndarray | None = None,
                 reach: np.ndarray | float = np.inf):
        factor = np.ldexp(np.asarray(affine.multiplier, np.float64),
                          -np.asarray(affine.shift, np.int32))
        offset = np.asarray(affine.bias, np.float64) * factor + 0.5
        self.limit = 32768 if wide else 128
        largest = np.where(factor > 0, reach, 0) * factor
        self.saturates = bool((largest + np.abs(offset) >= self.limit).any())
        exact = np.minimum(self.limit, largest) + np.abs(offset) <= (1 << 24) * _unit(affine)
        self.dtype = torch.float32 if exact.all() else torch.float64
        self.factor, self.offset = (torch.from_numpy(array).to(self.dtype)
                                    for array in (factor, offset))
        self.table = None if table is None else pair_table(np.asarray(table, np.int8))

    def linear(self, value: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """What `finish` rounds, of integers of any type, in `out` or instead of a `value` of `dtype`.

        A wider `out` holds it, too.
        """
        value = value.to(self.dtype)
        return torch.addcmul(self.offset, value, self.factor, out=value if out is None else out)

    def finish(self, value: torch.Tensor) -> torch.Tensor:
        """Integers of 8 bits (where `wide`, of 16) in `value`; with a table, its entries as int8."""
        value.floor_()
        if self.saturates:
            value.clamp_(-self.limit, self.limit - 1)
        return value if self.table is None else look_up(self.table, value.to(torch.int8))

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """`finish` of `linear`."""
        return self.finish(self.linear(value))


def _unit(affine: Affine) -> np.ndarray:
    """The largest 2**-s, s >= 1, of which multiplier / 2**shift is a multiple."""
    multiplier = np.asarray(affine.multiplier, np.int64)
    lowest = np.where(multiplier > 0, multiplier & -multiplier, 1 << 62)
    return np.minimum(np.ldexp(lowest.astype(np.float64), -np.asarray(affine.shift, np.int32)), 0.5)


def pair_table(table: np.ndarray) -> torch.Tensor:
    """int16 [65536]: two entries of `table`, int8 [256], for each two bytes in memory."""
    index = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return torch.from_numpy(table[index].view(np.int16))


def look_up(pairs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int8 entries, two at a time, for `index` (bytes) of any contiguous shape."""
    flat = index.view(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat[:1]])
    entries = pairs.index_select(0, flat.view(torch.uint16).to(torch.int32))
    return entries.view(torch.int8)[:index.numel()].view(index.shape)


def paired(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`numerics.product` of int8 values of any type and int16 factors in a float type, in `factor`;
    2**7 * 2**15 + 2**9 is below 2**24."""
    half, unit = 1 << (numerics.PRODUCT_BITS - 1), 2.0 ** -numerics.PRODUCT_BITS
    return factor.mul_(value).add_(half).mul_(unit).floor_().clamp_(-128, 127)


def probability_table(multiplier: int, shift: int, largest: int) -> torch.Tensor:
    """`numerics.probability` of a score difference, float32, for differences 0, 1, … up to where
    it stays 0, or to `largest`; one more entry, 0, is for what a mask hides."""
    low, high = 0, largest + 1  # the least difference with probability 0, or largest + 1
    while low < high:
        middle = (low + high) // 2
        if numerics.probability(numerics.octaves(middle, multiplier, shift)):
            low = middle + 1
        else:
            high = middle
    values = numerics.probability(numerics.octaves(np.arange(low), multiplier, shift))
    return torch.from_numpy(np.append(values, 0).astype(np.float32))


def gate_weight_table() -> torch.Tensor:
    """`numerics.exp2_weight` of every number of steps, float64."""
    steps = np.arange(16 << numerics.OCTAVE_BITS)
    return torch.from_numpy(numerics.exp2_weight(steps).astype(np.float64))


@functools.cache
def score_table() -> torch.Tensor:
    """`routing.sigmoid_scores` of every place on the curve, float64."""
    places = np.arange(1 << routing.SIGMOID_BITS)
    return torch.from_numpy(routing.sigmoid_scores(places, 2, 1).astype(np.float64))


def inverse(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(r, 2**(1 - e))`` with (r, e) from `numerics.reciprocal` of positive float64 integers.

    With total = f * 2**e, 1/2 <= f < 1: 2**(e + 15) / total = 2**15 / f, whose distance from the
    next integer is at least 2**-32 unless it is one, so that a float64 quotient has the same floor.
    """
    mantissa = (total.view(torch.int64) & ((1 << 52) - 1)) | (1022 << 52)
    fraction = mantissa.view(torch.float64)
    return (32768 / fraction).floor_().clamp_(max=65535), 2 * fraction / total


def top_experts(logits: torch.Tensor, count: int) -> torch.Tensor:
    """`routing.chosen_experts` of float64 integers [rows, experts] below 2**44."""
    experts = logits.shape[-1]
    # No two keys of a row are equal, so the order of equal logits does not depend on topk's.
    keys = logits * experts - torch.arange(experts, dtype=torch.float64)
    return keys.topk(count, dim=-1).indices


def in_best_groups(values: torch.Tensor, size: int, count: int, pair: bool) -> torch.Tensor:
    """`routing.in_best_groups` of float64 integers [rows, experts] below 2**43."""
    groups = values.unflatten(1, (-1, size))
    best = top_experts(groups.topk(1 + pair, dim=-1).values.sum(-1), count)
    hidden = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(hidden.unsqueeze(-1), routing.HIDDEN).flatten(1)
