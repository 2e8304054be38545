"""Layers that keep the integers and the scale that their weights came with.

Nothing may be folded into such weights: a normalised tensor in front of them has its own gamma and
beta, on the file's grid or, where the file has none, on one grid for all channels.
"""

from collections.abc import Iterable

import numpy as np

from moeware.compiler.kept import Kept
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.scales import encode_scales
from moeware.compiler.weights import LARGEST_BIAS, Tensor, scaled_weights
from moeware.hw.arch.numerics import norm_fraction_bits
from moeware.hw.arch.quantised import Affine

__all__ = ["NARROW", "give_up", "kept_norm", "kept_or_scaled", "kept_weights", "survey", "usable_integers"]

NARROW = "weights of {} bits were asked for"
# Places of the weights of an operator.
_WEIGHTS = {"PatchEmbed": (1,), "Linear": (1,), "Route": (1,), "Experts": (3, 5),
            "GatedExperts": (3, 5, 7), "SoftExperts": (2, 4)}


def survey(kept: Kept, steps: Iterable) -> None:
    """Note what can be told before there are samples: a grid without a reason can be kept, unless
    samples saturate on it. steps : `partition.Step`s."""
    for node in (node for step in steps if step.kind == "fpga" for node in step.nodes):
        for place in _WEIGHTS.get(node.op_type, ()):
            usable_integers(kept, node.inputs[place].const_value.numpy(),
                            per_tensor=node.op_type == "Route")
    kept.settle(steps, "")


def usable_integers(kept: Kept, weight: np.ndarray, bits: int = 8, *, per_tensor: bool = False
                    ) -> tuple[np.ndarray, np.ndarray] | None:
    """int16 integers and steps of float32 weights (see `Kept.integers`) that a layer can keep, or None;
    the reason is noted. bits : that the user wants weights to have."""
    found = kept.integers(weight)
    if found is None:
        return None
    integers, steps = found
    reason = ""
    if bits < 8:
        reason = NARROW.format(bits)
    elif integers.min() < -128 or integers.max() > 127:
        reason = "weights with a zero point have 9 bits, those of the accelerator 8"
    elif per_tensor and len(set(steps[steps > 0].tolist())) > 1:
        reason = "logits of a gate are compared with one another, so they have one scale"
    kept.note_weight(steps, reason)
    return None if reason else found


def kept_weights(kept: Kept, integers: np.ndarray, steps: np.ndarray, bias: np.ndarray,
                 source: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """int8 weights [..., N, K], int32 bias and the accumulator's step, as of
    `weights.quantise_weights`, with these integers; None where they cannot be kept, which is noted.

    Where the source has a gain of -1, a column changes its sign. Its shift and offset are whole
    steps, so they go into the bias exactly; a bias of the file itself is exact below 2**22.
    """
    real = integers * steps[..., None]
    integers = integers.astype(np.int64)
    bias = bias.astype(np.float64) + source.offset * real.sum(-1)
    if source.shift is not None:
        bias = bias + real @ source.shift
    if source.gain is not None:
        if (np.abs(source.gain) != 1).any():
            kept.note_weight(steps, "channels that it reads are scaled against one another")
            return None
        integers = integers * source.gain.astype(np.int64)
    # A channel of zeros takes the scale that its bias needs.
    steps = np.where(steps > 0, steps, np.abs(bias) / (source.step * LARGEST_BIAS))
    accumulator = steps * source.step
    whole = np.rint(bias / np.where(accumulator == 0, 1.0, accumulator))
    reason = ""
    if integers.max() > 127:
        reason = "-128 meets a channel of negative gamma, for which it would be 128"
    elif np.abs(whole).max() > LARGEST_BIAS:
        reason = "a bias is beyond 2**30 of its steps"
    if reason:
        kept.note_weight(steps, reason)
        return None
    return integers.astype(np.int8), whole.astype(np.int32), accumulator


def kept_or_scaled(kept: Kept, weight: np.ndarray, bias: np.ndarray, source: Tensor,
                   step: float | np.ndarray, result_bits: int = 8, bits: int = 8
                   ) -> tuple[np.ndarray, Affine]:
    """The integers that weights came with, and the scale to the grid `step`; where these cannot be
    kept, `scaled_weights` of so many bits."""
    integers = usable_integers(kept, weight, bits)
    found = integers and kept_weights(kept, *integers, bias, source)
    if not found:
        return scaled_weights(weight, bias, source, step, result_bits, limit=WEIGHT_BITS[bits])
    integers, bias, accumulator = found
    multiplier, shift = encode_scales(accumulator / step)
    return integers, Affine(bias=bias, multiplier=multiplier, shift=shift)


def give_up(kept: Kept, weight: np.ndarray, reason: str) -> None:
    """Note why weights are none that they came with."""
    found = kept.integers(weight)
    if found:
        kept.note_weight(found[1], reason)


def kept_norm(gamma: np.ndarray, beta: np.ndarray, step: float, offset: np.ndarray | float
              ) -> tuple[Affine, np.ndarray | None, np.ndarray | None]:
    """The scale of normalised values to ``gamma * n + beta`` on the grid ``step * integer + offset``,
    and the gain and the shift of the result.

    A multiplier has no sign: channels of negative gamma are held negated, as -1 - integer, which
    has the range of int8. Their gain is -1.
    """
    sign = np.where(gamma < 0, -1.0, 1.0)
    shift = np.broadcast_to(np.asarray(offset, np.float64), gamma.shape) - step * (gamma < 0)
    unit = 1 << norm_fraction_bits(len(gamma))
    # A faint gamma under a large beta: one that is 2**-20 of it at least changes nothing.
    scale = np.maximum(np.abs(gamma), np.abs(beta - shift) * unit / LARGEST_BIAS)
    bias = np.rint(sign * (beta - shift) * unit / np.where(scale == 0, 1.0, scale))
    multiplier, right = encode_scales(scale / (step * unit))
    affine = Affine(bias=bias.astype(np.int32), multiplier=multiplier, shift=right)
    return affine, sign if (gamma < 0).any() else None, shift if shift.any() else None
