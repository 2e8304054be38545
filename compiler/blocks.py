"""Weights that share scales block by block, as ONNX Runtime stores them: unsigned integers of 8, 4 or 2
bits, the first of a byte in its low bits, along the inputs of a layer. A weight is ``(integer - zero) *
scale``, with one of each for every block of inputs, of which the last may be shorter."""

import numpy as np

__all__ = ["WIDTHS", "dequantised", "middle", "unpacked"]

WIDTHS = (8, 4, 2)


def unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    """The integers that bytes hold along the last axis."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (array[..., None] >> places) & np.uint8((1 << bits) - 1)
    return parts.reshape(*array.shape[:-1], -1)


def middle(bits: int) -> int:
    """The zero point of integers that are stored without any."""
    return 1 << (bits - 1)


def dequantised(
    integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | int, length: int
) -> np.ndarray:
    """Weights [..., K], float32, of integers [..., K] in blocks of ``length``; scale and zero:
    [..., blocks], or one zero for all."""
    spread = lambda each: each.repeat(length, axis=-1)[..., : integers.shape[-1]]
    zero = np.broadcast_to(zero, scale.shape).astype(np.float32)
    return np.subtract(integers, spread(zero), dtype=np.float32) * spread(scale.astype(np.float32))
