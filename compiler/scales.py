"""Real scales as integers: multiplier and shift, int8 grids with the least error, pointwise tables."""

import functools
import math
from collections.abc import Callable

import numpy as np

from moeware.compiler.errors import CompileError

__all__ = ["FUNCTION", "coarsened", "encode_scale", "encode_scales", "function_table", "grid", "shifted_grid"]

LONGEST_SHIFT = 47
FEWEST_STEPS = 8  # of a float32's grid in a scale, so that rounding it up adds an eighth at most


def encode_scale(real: float) -> tuple[int, int]:
    """``(multiplier, shift)`` with ``multiplier / 2**shift`` nearest to a positive real scale.

    Raises
    ------
    CompileError
        `real` is not finite, negative, or 2**15 or more.
    """
    if not 0 <= real < 1 << 15:
        raise CompileError(f"A scale between two tensors must be between 0 and 32768, not {real!r}: "
                           "calibrate with data of the model's real range")
    if real == 0:
        return 0, 1
    shift = min(15 - math.floor(math.log2(real)), LONGEST_SHIFT)
    multiplier = round(real * 2.0 ** shift)
    if multiplier > 65535:
        shift -= 1
        multiplier = round(real * 2.0 ** shift)
    if shift < 1:
        shift, multiplier = 1, min(round(real * 2), 65535)
    return multiplier, shift


def encode_scales(real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encode_scale` for every element: uint16 and uint8 arrays."""
    flat = [encode_scale(float(value)) for value in np.ravel(real)]
    multiplier, shift = zip(*flat)
    return (np.array(multiplier, np.uint16).reshape(np.shape(real)),
            np.array(shift, np.uint8).reshape(np.shape(real)))


def coarsened(real: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Scales rounded up to the finest grid 2**-s on which float32 requantises exactly: it holds
    multiples of 2**-s up to 2**(24 - s), which `largest`, the results' bound, must not exceed. A
    scale too small for that grid stays as it is.
    """
    shift = np.clip(np.floor(np.log2((1 << 24) / np.maximum(largest, 0.5))), 1, LONGEST_SHIFT)
    steps = np.ceil(np.round(real * 2.0 ** shift, 6))
    fits = (steps >= FEWEST_STEPS) & (steps <= 65535)
    return np.where(fits, steps * 2.0 ** -shift, real)


def grid(samples: np.ndarray, bits: int = 8, of: Callable | None = None) -> float:
    """Step of the symmetric integer grid with the least mean squared error over the samples.

    samples : [rows, ...]. `of` is a function that follows: then its error counts, so that a GELU's
    flat side may clip. Candidates clip at 40 % to 100 % of the largest magnitude. Few rows show
    little of a tensor's range: the step is larger by one over the root of their number.
    """
    room = 1 + 1 / math.sqrt(max(len(samples), 1))
    samples = np.ravel(samples).astype(np.float64)
    largest = np.abs(samples).max(initial=0.0)
    if largest == 0:
        return 1.0
    top = (1 << (bits - 1)) - 1
    if len(samples) > 1 << 16:
        samples = samples[:: len(samples) >> 16]
    follow = of or (lambda values: values)
    exact = follow(samples)
    best, step = math.inf, largest / top
    for share in np.linspace(0.4, 1.0, 25):
        candidate = share * largest / top
        rounded = np.clip(np.rint(samples / candidate), -top - 1, top) * candidate
        error = np.square(follow(rounded) - exact).mean()
        if error < best:
            best, step = error, candidate
    return float(step * room)


def shifted_grid(samples: np.ndarray, of: Callable | None = None) -> tuple[float, float]:
    """``(step, offset)`` of the int8 grid ``step * integer + offset`` with the least mean squared error
    over the samples; arguments as of `grid`. For values that lie on one side, as behind a GELU."""
    room = 1 + 1 / math.sqrt(max(len(samples), 1))
    samples = np.ravel(samples).astype(np.float64)
    low, high = samples.min(initial=0.0), samples.max(initial=0.0)
    if low == high:
        return 1.0, 0.0
    # Bins far finer than a step, so that every sample counts: clipping is about the rare ones.
    counts, edges = np.histogram(samples, bins=1 << 13, range=(low, high))
    samples, counts = ((edges[1:] + edges[:-1]) / 2)[counts > 0], counts[counts > 0]
    follow = of or (lambda values: values)
    exact = follow(samples)
    best, found = math.inf, (1.0, 0.0)
    for low_share in np.linspace(0.1, 1.0, 19) if low else [1.0]:
        for high_share in np.linspace(0.4, 1.0, 13) if high else [1.0]:
            step = (high_share * high - low_share * low) / 255
            offset = low_share * low + 128 * step
            rounded = np.clip(np.rint((samples - offset) / step), -128, 127) * step + offset
            error = (counts * np.square(follow(rounded) - exact)).sum()
            if error < best:
                best, found = error, (float(step * room), float(offset))
    return found


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


@functools.cache
def _gelu_knots() -> tuple[np.ndarray, np.ndarray]:
    # A grid has 256 points at most, and samples are many: interpolating a fine table keeps the
    # error below 1e-7, far under a step of int8.
    knots = np.linspace(-9, 9, 1 << 14)
    return knots, 0.5 * knots * (1 + _erf(knots / math.sqrt(2)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 9, x, np.interp(x, *_gelu_knots(), left=0.0))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


FUNCTION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


def function_table(function: str, source: tuple[float, float],
                   target: tuple[float, float]) -> np.ndarray:
    """int8 [256]: the function on the grid `source`, on the grid `target`, (step, offset) each, indexed
    by the argument as an unsigned byte."""
    argument = np.arange(256).astype(np.uint8).view(np.int8) * source[0] + source[1]
    integers = np.rint((FUNCTION[function](argument) - target[1]) / target[0])
    return np.clip(integers, -128, 127).astype(np.int8)
