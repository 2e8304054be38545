"""The integers of `hw.arch.numerics` in the float formats that a CPU is fastest at, all exact.

A float64 holds every integer and every multiple of a power of two whose numerator stays below
2**53. ``value * multiplier / 2**shift + 1/2`` is (value * multiplier + 2**(shift - 1)) / 2**shift
with a numerator below 2**49, so one multiplication and one addition give it exactly, and a floor
the result. A float32 holds integers up to 2**24: sums of int8 products up to a depth of 1,024.
"""

import numpy as np
import torch

from moeware.hw.arch import numerics
from moeware.hw.arch.quantised import Affine

__all__ = ["Product", "Scale", "gate_weight_table", "inverse", "probability_table",
           "top_experts"]

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
        """[rows, channels], exact, in the type that is fastest."""
        if self.int8_products:
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

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """`sums` as float64."""
        return self.sums(source).double()


class Scale:
    """`numerics.requantise` of float64 integers [rows, channels] plus bias, in place.

    Bias and rounding are one constant for each channel. An int8 result is computed 128 higher,
    where cutting off the fraction is a floor. reach : largest magnitude of the values by channel,
    which tells whether 16 bits can saturate.
    """

    def __init__(self, affine: Affine, *, wide: bool = False, table: np.ndarray | None = None,
                 reach: np.ndarray | float = np.inf):
        factor = np.ldexp(np.asarray(affine.multiplier, np.float64),
                          -np.asarray(affine.shift, np.int32))
        offset = np.asarray(affine.bias, np.float64) * factor + (0.5 if wide else 128.5)
        self.factor, self.offset = torch.from_numpy(factor), torch.from_numpy(offset)
        self.wide = wide
        largest = (reach + np.abs(np.asarray(affine.bias, np.float64))) * factor + 1
        self.saturates = bool((largest > 32767).any())
        self.table = None if table is None else pair_table(np.roll(np.asarray(table, np.int8), 128))

    def linear(self, value: torch.Tensor) -> torch.Tensor:
        """What `finish` rounds."""
        return torch.addcmul(self.offset, value, self.factor, out=value)

    def finish(self, value: torch.Tensor) -> torch.Tensor:
        """int8 [rows, channels], or float64 integers of 16 bits where `wide`."""
        if self.wide:
            return value.floor_().clamp_(-32768, 32767) if self.saturates else value.floor_()
        if self.table is None:
            return to_int8(value)
        return look_up(self.table, value.clamp_(0, 255.5).to(torch.int16).to(torch.uint8))

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.finish(self.linear(value))


def to_int8(value: torch.Tensor) -> torch.Tensor:
    """Floor of ``value - 128``, saturated; changes `value`."""
    return value.clamp_(0, 255.5).to(torch.int16).sub_(128).to(torch.int8)


def pair_table(table: np.ndarray) -> torch.Tensor:
    """int16 [65536]: two entries of `table`, int8 [256], for each two bytes in memory."""
    index = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return torch.from_numpy(table[index].view(np.int16))


def look_up(pairs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int8 entries, two at a time, for uint8 `index` of any contiguous shape."""
    flat = index.view(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat[:1]])
    entries = pairs.index_select(0, flat.view(torch.uint16).to(torch.int32))
    return entries.view(torch.int8)[:index.numel()].view(index.shape)


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


def inverse(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(r, 2**(1 - e))`` with (r, e) from `numerics.reciprocal` of positive float64 integers.

    With total = f * 2**e, 1/2 <= f < 1: 2**(e + 15) / total = 2**15 / f, whose distance from the
    next integer is at least 2**-32 unless it is one, so that a float64 quotient has the same floor.
    """
    mantissa = (total.view(torch.int64) & ((1 << 52) - 1)) | (1022 << 52)
    fraction = mantissa.view(torch.float64)
    return (32768 / fraction).floor_().clamp_(max=65535), 2 * fraction / total


def top_experts(logits: torch.Tensor, count: int) -> torch.Tensor:
    """`numerics.chosen_experts` of float64 integers [rows, experts] below 2**44."""
    experts = logits.shape[-1]
    # No two keys of a row are equal, so the order of equal logits does not depend on topk's.
    keys = logits * experts - torch.arange(experts, dtype=torch.float64)
    return keys.topk(count, dim=-1).indices
