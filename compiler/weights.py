"""Float weights to integers, and the normalised tensors that they meet, on grids that fit both."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeware.compiler.rounding import inputs_covariance, nested, rounded
from moeware.compiler.scales import coarsened, encode_scales, grid
from moeware.hw.arch.nested import upper_half
from moeware.hw.arch.numerics import norm_fraction_bits
from moeware.hw.arch.quantised import Affine

__all__ = ["Tensor", "informed", "nested_weights", "quantise_weights", "scaled_weights", "smoothed_norm"]

LARGEST_BIAS = 1 << 30  # in accumulator steps, of the 2**31 that an accumulator holds


@dataclass(frozen=True)
class Tensor:
    """What became of a canonical value: ``real = gain * step * integer + shift + offset`` for each
    channel.

    tensor : name in the quantised graph; first_row, rows : the part of it that the value is. shift is
    what a channel has in common over the rows; offset belongs to the grid, and integers are far from
    0 where the value is 0. mean : of the value less its shift, over its gain, by channel: what weights
    lose to rounding is made up for at this value (bias correction, Nagel et al. 2019, section 4.2).
    covariance : of the same, [channels, channels], where narrow weights want to know it.
    """

    tensor: str
    step: float
    gain: np.ndarray | None = None
    shift: np.ndarray | None = None
    offset: float = 0.0
    mean: np.ndarray | float = 0.0
    covariance: np.ndarray | None = None
    first_row: int = 0
    rows: int = 0


def informed(source: Tensor, samples: np.ndarray, weight: np.ndarray | None = None) -> Tensor:
    """A source that knows the mean and covariance of its real samples [rows, channels], for narrow
    weights. weight : [rows], how much each counts."""
    plain = samples.astype(np.float64) if source.shift is None else samples - source.shift
    if source.gain is not None:
        plain = np.where(source.gain != 0, plain / np.where(source.gain, source.gain, 1), 0)
    mean, covariance = inputs_covariance(plain, weight)
    covariance[np.diag_indices(len(mean))] += source.step**2 / 12  # what its grid rounds
    return dataclasses.replace(source, mean=mean, covariance=covariance)


def quantise_weights(weight: np.ndarray, bias: np.ndarray, source: Tensor, *,
                     per_tensor: bool = False, target: float | np.ndarray | None = None, bits: int = 8,
                     limit: int = 127) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 weight, int32 bias in accumulator steps, and the accumulator's step per channel.

    weight : float [N, K]; bias : [N]; the source's gain and shift are folded in. target : step of the
    result, of so many bits, for all or [N], if the ratio of steps may be `coarsened`. limit : the
    largest weight; those of fewer than 8 bits are `rounded` with each other in view.
    """
    weight, bias = _folded(weight, bias, source)
    admissible = _steps(weight, bias, source, per_tensor, target, bits)
    if limit < 127:
        integer, step = rounded(weight, limit, source.covariance, admissible)
    else:
        step = admissible(np.abs(weight).max(None if per_tensor else -1) / limit)
        integer = np.clip(np.rint(weight / np.where(step == 0, 1.0, step)[:, None]), -limit, limit)
    return _with_bias(weight, bias, source, integer, step)


def scaled_weights(weight: np.ndarray, bias: np.ndarray, source: Tensor, step: float | np.ndarray,
                   bits: int = 8, limit: int = 127) -> tuple[np.ndarray, Affine]:
    """int8 weight, and the scale to the grid `step`; arguments as of `quantise_weights`."""
    return _scaled(*quantise_weights(weight, bias, source, target=step, bits=bits, limit=limit), step)


def nested_weights(weight: np.ndarray, bias: np.ndarray, source: Tensor, step: float | np.ndarray,
                   bits: int = 8) -> tuple[tuple[np.ndarray, Affine], tuple[np.ndarray, Affine]]:
    """`scaled_weights` of 8 bits, and of 4 that are their upper halves."""
    weight, bias = _folded(weight, bias, source)
    integer, fine = nested(weight, source.covariance,
                           _steps(weight, bias, source, False, step, bits))
    upper = upper_half(integer.astype(np.int8))
    return (_scaled(*_with_bias(weight, bias, source, integer, fine), step),
            _scaled(*_with_bias(weight, bias, source, upper, 16 * fine), step))


def _folded(weight: np.ndarray, bias: np.ndarray, source: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias with the source's gain and shift."""
    weight, bias = weight.astype(np.float64), bias.astype(np.float64)
    if source.shift is not None:
        bias = bias + weight @ source.shift
    return (weight if source.gain is None else weight * source.gain), bias


def _steps(weight: np.ndarray, bias: np.ndarray, source: Tensor, per_tensor: bool,
           target: float | np.ndarray | None, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """What makes steps of channels out of those that they would like."""
    far = np.abs(bias) + abs(source.offset) * np.abs(weight).sum(-1)

    def admissible(step: np.ndarray) -> np.ndarray:
        # A channel of tiny weights and a large bias would overflow the accumulator's bias.
        step = np.maximum(step, far / (source.step * LARGEST_BIAS))
        step = np.broadcast_to(step.max(), step.shape) if per_tensor else step
        if target is None:
            return step
        # Rounding adds about half a step, an eighth coarser at most, to each weight and to the bias.
        unit, rounding = source.step / target, 9 / 16 * step
        reach = 128 * unit * (np.abs(weight).sum(-1) + weight.shape[-1] * rounding)
        most = np.minimum(1 << (bits - 1), reach) + far / target + unit * rounding + 0.5
        return coarsened(step * unit, most) / unit
    return admissible


def _with_bias(weight: np.ndarray, bias: np.ndarray, source: Tensor, integer: np.ndarray,
               step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result of `quantise_weights` for these integers."""
    real = integer * step[:, None]
    bias = bias + source.offset * real.sum(-1) + ((weight - real) * source.mean).sum(-1)
    divisor = np.where(step == 0, 1.0, step)  # of channels of zeros
    integer_bias = np.rint(bias / (divisor * source.step)).astype(np.int32)
    return integer.astype(np.int8), integer_bias, step * source.step


def _scaled(integer: np.ndarray, bias: np.ndarray, accumulator: np.ndarray,
            step: float | np.ndarray) -> tuple[np.ndarray, Affine]:
    multiplier, shift = encode_scales(accumulator / step)
    return integer, Affine(bias=bias, multiplier=multiplier, shift=shift)


def smoothed_norm(samples: np.ndarray, epsilon: float, demand: np.ndarray, *,
                  centred: bool = True) -> tuple[np.ndarray, float]:
    """A factor for each channel of a normalised tensor, and the step of its grid.

    samples : float [rows, channels] that are normalised; demand : largest weight that each channel
    meets; centred : whether a row's mean is subtracted. The factors balance the two (SmoothQuant, section 4, alpha = 1/2): tensor and weights
    share the rounding error.
    """
    samples = samples.astype(np.float64)
    plain = samples - samples.mean(-1, keepdims=True) * centred
    plain /= np.sqrt(np.maximum(np.square(plain).mean(-1, keepdims=True) + epsilon, 1e-300))
    spread = np.abs(plain).max(0)
    usable = (spread > 0) & (demand > 0)
    smooth = np.ones(len(demand))
    smooth[usable] = np.sqrt(demand[usable] / spread[usable])
    smooth = np.clip(smooth / np.median(smooth), 1 / 64, 64)
    step = grid(plain * smooth)
    # Any factor will do: one with which the result is exact in float32.
    unit = step * (1 << norm_fraction_bits(len(demand)))
    return coarsened(smooth / unit, np.array(128.5)) * unit, step
