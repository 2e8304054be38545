"""The experts that ``com.microsoft.MoE`` and ``QMoE`` hold, as float32 matrices.

QMoE stores integers as `blocks` says, ``[E, N, K]`` in ``[out, in]`` order, with a scale for each output
``[E, N]`` or for each block of inputs ``[E, N, blocks]``.
"""

import numpy as np
import onnx_ir as ir

from moeware.compiler.blocks import WIDTHS, dequantised, middle, unpacked
from moeware.compiler.fuse.moe_weights import ExpertWeights
from moeware.compiler.fuse.trace import attribute, constant, operand

# Places of the inputs: of each layer (weights, bias), and for QMoE (weights, scales, bias, zeros).
_MOE = ((2, 3), (4, 5))
_QMOE = ((2, 3, 4, 11), (5, 6, 7, 12))


class Refused(Exception):
    """A form that the canonical operator does not cover: what, and the remedy."""


def expert_weights(node: ir.Node, features: int) -> ExpertWeights:
    """The weights of ``node``, which reads rows of ``features``; raises ``Refused`` where they are no
    constants that fit."""
    read = _floats if node.op_type == "MoE" else _dequantised
    gated = attribute(node, "activation_type", "relu") == "swiglu"
    w1, b1 = read(node, 0, features)
    hidden = w1.shape[1] // (2 if gated else 1)
    w2, b2 = read(node, 1, hidden)
    wide = 2 * hidden if gated else hidden
    if w1.shape != (len(w1), wide, features) or w2.shape != (len(w1), features, hidden):
        raise Refused(
            f"fc1 and fc2 must have the shapes [E, {'2*H' if gated else 'H'}, {features}] and "
            f"[E, {features}, H], not {list(w1.shape)} and {list(w2.shape)}; export experts of two layers, "
            f"the gate's rows between those of the first where there is one"
        )
    b1 = np.zeros(w1.shape[:2]) if b1 is None else b1
    b2 = np.zeros(w2.shape[:2]) if b2 is None else b2
    w1, b1, w2, b2 = (np.ascontiguousarray(array, np.float32) for array in (w1, b1, w2, b2))
    return _gated(node, w1, b1, w2, b2) if gated else ExpertWeights(w1, b1, w2, b2)


def _gated(
    node: ir.Node, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray
) -> ExpertWeights:
    """Experts whose hidden values are g * sigmoid(alpha * g) * (l + beta), that is silu(alpha * g) * (l +
    beta) / alpha, of rows g and l that take turns."""
    alpha = np.float32(attribute(node, "activation_alpha", 1.0))
    beta = np.float32(attribute(node, "activation_beta", 0.0))
    if not np.isfinite(alpha) or alpha <= 0:
        raise Refused(f"activation_alpha must be positive, not {alpha}; export the node again")
    one, other = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
    arrays = w1[one] * alpha, b1[one] * alpha, w2, b2, w1[other] / alpha, (b1[other] + beta) / alpha
    return ExpertWeights(*(np.ascontiguousarray(array) for array in arrays))


def _stored(node: ir.Node, place: int, name: str) -> np.ndarray | None:
    """The constant that input ``place`` holds; None where it is absent."""
    value = operand(node, place)
    if value is not None and value.const_value is None:
        raise Refused(
            f"{name} must be an initializer, not the value {value.name!r}; export it as a weight"
        )
    return constant(value)


def _floats(
    node: ir.Node, number: int, columns: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight ``[E, N, K]`` and bias of layer ``number`` of a MoE; K: ``columns``."""
    name = f"fc{number + 1}_experts"
    weight, bias = (
        _stored(node, place, f"{name}_{part}")
        for place, part in zip(_MOE[number], ("weights", "bias"))
    )
    if weight is None or weight.ndim != 3:
        raise Refused(f"{name}_weights must have the shape [E, N, {columns}]; export the node again")
    return weight, bias


def _dequantised(
    node: ir.Node, number: int, columns: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight ``[E, N, K]`` and bias of layer ``number`` of a QMoE; K: ``columns``."""
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
    shape = (*integers.shape[:2], scale.size // max(1, len(weight) * weight.shape[1]))
    length = attribute(node, "block_size", 0) if scale.ndim == 3 else columns
    length = length or columns // max(1, shape[2])
    if scale.shape[:2] != shape[:2] or not length or -(-columns // length) != shape[2]:
        raise Refused(
            f"{name}_scales must be [E, N] or [E, N, blocks] for weights of {list(integers.shape)}, not "
            f"{list(scale.shape)}; quantise the experts again"
        )
    zeros: np.ndarray | int = middle(bits)
    if zero is not None:
        # Packed along the rows where a row has one scale, along the blocks where it has several.
        count = shape[1] if zero.ndim == 2 else shape[2]
        zeros = unpacked(zero, bits)[..., :count].reshape(shape)
    return dequantised(integers, scale.reshape(shape), zeros, length), bias


def bits_of(node: ir.Node, number: int) -> int:
    """Bits of a stored weight of layer ``number``."""
    return attribute(
        node, f"fc{number + 1}_expert_weight_bits", attribute(node, "expert_weight_bits", 4)
    )
