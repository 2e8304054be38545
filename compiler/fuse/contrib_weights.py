"""The experts that ``com.microsoft.MoE`` and ``QMoE`` hold, as float32 matrices.

QMoE stores unsigned integers of 8, 4 or 2 bits, the first of a byte in its low bits, ``[E, N, K]``
in ``[out, in]`` order. A weight is ``(integer - zero) * scale`` with a scale for each output
``[E, N]`` or for each block of inputs ``[E, N, blocks]``; ``zero`` is the middle of the range where
no zero points are stored.
"""

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.moe_weights import ExpertWeights
from moeware.compiler.fuse.trace import attribute, constant, operand

WIDTHS = (8, 4, 2)

# Places of the inputs: of each layer (weights, bias), and for QMoE (weights, scales, bias, zeros).
_MOE = ((2, 3), (4, 5))
_QMOE = ((2, 3, 4, 11), (5, 6, 7, 12))


class Refused(Exception):
    """A form that the canonical operator does not cover: what, and the remedy."""


def expert_weights(node: ir.Node) -> ExpertWeights:
    """The weights of ``node``; raises ``Refused`` where they are no constants that fit."""
    read = _floats if node.op_type == "MoE" else _dequantised
    (w1, b1), (w2, b2) = read(node, 0), read(node, 1)
    if w1.ndim != 3 or w2.shape != (len(w1), w1.shape[2], w1.shape[1]):
        raise Refused(
            f"fc1 and fc2 must have the shapes [E, H, D] and [E, D, H], not {list(w1.shape)} and "
            f"{list(w2.shape)}; export experts of two layers"
        )
    b1 = np.zeros(w1.shape[:2]) if b1 is None else b1
    b2 = np.zeros(w2.shape[:2]) if b2 is None else b2
    arrays = (np.ascontiguousarray(array, np.float32) for array in (w1, b1, w2, b2))
    return ExpertWeights(*arrays)


def _stored(node: ir.Node, place: int, name: str) -> np.ndarray | None:
    """The constant that input ``place`` holds; None where it is absent."""
    value = operand(node, place)
    if value is not None and value.const_value is None:
        raise Refused(
            f"{name} must be an initializer, not the value {value.name!r}; export it as a weight"
        )
    return constant(value)


def _floats(node: ir.Node, number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight ``[E, N, K]`` and bias of layer ``number`` of a MoE."""
    name = f"fc{number + 1}_experts"
    weight, bias = (
        _stored(node, place, f"{name}_{part}")
        for place, part in zip(_MOE[number], ("weights", "bias"))
    )
    assert weight is not None
    return weight, bias


def _dequantised(node: ir.Node, number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight ``[E, N, K]`` and bias of layer ``number`` of a QMoE."""
    name, bits = f"fc{number + 1}", bits_of(node, number)
    weight, scale, bias, zero = (
        _stored(node, place, f"{name}_{part}")
        for place, part in zip(
            _QMOE[number], ("experts_weights", "scales", "experts_bias", "zero_points")
        )
    )
    assert weight is not None and scale is not None
    if bits not in WIDTHS or weight.dtype != np.uint8 or weight.ndim != 3:
        raise Refused(
            f"{name}_experts_weights must be uint8 that pack {', '.join(map(str, WIDTHS))} bits, "
            f"not {weight.dtype} with expert_weight_bits={bits}; "
            f"quantise the experts to one of these"
        )
    integers = unpacked(weight, bits)
    experts, rows, columns = integers.shape
    blocks = scale.size // (experts * rows)
    if scale.shape[:2] != (experts, rows) or not blocks or columns % blocks:
        raise Refused(
            f"{name}_scales must be [E, N] or [E, N, blocks] for weights of "
            f"{list(integers.shape)}, not {list(scale.shape)}; "
            f"quantise the experts again"
        )
    middle = np.full((experts, rows, blocks), 1 << (bits - 1), np.float32)
    if zero is not None:
        # Packed along the rows where a row has one scale, along the blocks where it has several.
        count = rows if zero.ndim == 2 else blocks
        middle = unpacked(zero, bits)[..., :count].reshape(middle.shape).astype(np.float32)
    scale = scale.reshape(middle.shape).astype(np.float32)
    length = columns // blocks
    return (integers - middle.repeat(length, axis=2)) * scale.repeat(length, axis=2), bias


def bits_of(node: ir.Node, number: int) -> int:
    """Bits of a stored weight of layer ``number``."""
    return attribute(
        node, f"fc{number + 1}_expert_weight_bits", attribute(node, "expert_weight_bits", 4)
    )


def unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    """The integers that bytes hold along the last axis, the first in the low bits."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (array[..., None] >> places) & np.uint8((1 << bits) - 1)
    return parts.reshape(*array.shape[:-1], -1)
