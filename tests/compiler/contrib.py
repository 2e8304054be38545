"""Mixtures of experts as nodes of ONNX Runtime's domain, for models of `exports`."""

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

EXPERTS = 4


class Operator(torch.autograd.Function):
    """``com.microsoft::MoE`` in the exported graph; tests add attributes and run the file."""

    @staticmethod
    def forward(ctx, x, logits, w1, b1, w2, b2):
        return x.clone()

    @staticmethod
    def symbolic(g, x, logits, w1, b1, w2, b2):
        result = g.op("com.microsoft::MoE", x, logits, w1, b1, w2, b2)
        result.setType(x.type())
        return result


class ContribMoe(nn.Module):
    """A linear gate and a ``MoE`` node; ``rows``: the node reads ``[tokens, features]``."""

    def __init__(self, dim, hidden, experts=EXPERTS, rows=True, softmax=False):
        super().__init__()
        self.gate, self.rows, self.softmax = nn.Linear(dim, experts), rows, softmax
        # A gate that chooses by more than the noise of the integers.
        nn.init.normal_(self.gate.weight, std=2 / dim**0.5)
        for name, shape in (("w1", (hidden, dim)), ("b1", (hidden,)), ("w2", (dim, hidden)),
                            ("b2", (dim,))):  # fmt: skip
            setattr(self, name, nn.Parameter(torch.randn(experts, *shape) * dim**-0.5))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        if self.softmax:
            logits = F.softmax(logits, -1)
        given = rows if self.rows else x
        result = Operator.apply(given, logits, self.w1, self.b1, self.w2, self.b2)
        return result.reshape(x.shape)


def rewrite(path, change):
    """Apply ``change(proto, node, arrays)`` to each ``MoE`` node of the model at ``path``."""
    proto = onnx.load(str(path))
    arrays = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "MoE":
            change(proto, node, arrays)
    if not any(entry.domain == "com.microsoft" for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, str(path))
    return path


def set_attributes(node, **attributes):
    """Replace the attributes of ``node``."""
    del node.attribute[:]
    node.attribute.extend(
        onnx.helper.make_attribute(name, value) for name, value in attributes.items()
    )


def add_constant(proto, name, array):
    """A new initializer; returns its name."""
    name = f"{name}_{len(proto.graph.initializer)}"
    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name


def packed(integers, bits):
    """Bytes of unsigned integers along the last axis, the first in the low bits."""
    count = 8 // bits
    padding = [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % count)]
    padded = np.pad(integers, padding).reshape(*integers.shape[:-1], -1, count)
    return sum(padded[..., place].astype(np.uint8) << (bits * place) for place in range(count))


def quantised(weight, bits, block=0, zeros=False):
    """(integers, scales, zero points or None) of ``[E, N, K]``, nearest on a grid per block of ``block``
    inputs, of which the last may be shorter (0: of all).

    The arrays have the shapes ``[E, N, K]`` and ``[E, N, blocks]``.
    """
    block = block or weight.shape[2]
    padded = np.pad(weight, ((0, 0), (0, 0), (0, -weight.shape[2] % block)))
    parts = padded.reshape(*weight.shape[:2], -1, block)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    if zeros:
        low, high = parts.min(-1), parts.max(-1)
        scale = (high - low) / top
        zero = np.clip(np.rint(-low / scale), 0, top)
    else:
        scale = np.abs(parts).max(-1) / (middle - 1)
        zero = np.full(scale.shape, middle)
    integers = np.clip(np.rint(parts / scale[..., None]) + zero[..., None], 0, top)
    return (
        integers.reshape(padded.shape)[..., : weight.shape[2]].astype(np.uint8),
        scale.astype(np.float32),
        zero.astype(np.uint8) if zeros else None,
    )


def to_qmoe(bits, block=0, zeros=False, **attributes):
    """A change for `rewrite`: the node becomes a ``QMoE``. ``block``: inputs that share a scale."""

    def change(proto, node, arrays):
        x, logits, *names = node.input
        layers, zero_points = [], []
        for weight, bias in (names[:2], names[2:4]):
            integers, scale, zero = quantised(arrays[weight], bits, block, zeros)
            if not block:
                scale, zero = scale[..., 0], zero if zero is None else zero[..., 0]
            layers += [
                add_constant(proto, "weight", packed(integers, bits)),
                add_constant(proto, "scale", scale),
                bias,
            ]
            if zeros:
                zero_points.append(add_constant(proto, "zero", packed(zero, bits)))
        node.op_type = "QMoE"
        node.input[:] = [x, logits, *layers, *([""] * 3 + zero_points if zeros else [])]
        more = {"block_size": block} if block else {}
        set_attributes(node, expert_weight_bits=bits, **more, **attributes)

    return change
