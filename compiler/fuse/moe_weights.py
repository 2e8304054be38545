"""Find the weights of experts among the products with constants in a region."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.trace import attribute, constant, is_op, operand

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Cast", "Identity", "Expand", "Flatten")
_SELECT = ("Gather", "GatherND", "GatherElements", "Slice", "Split")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked two-layer experts, float32: w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


@dataclass(eq=False)  # compared by identity: arrays have no single truth value
class _Layer:
    """A product with a constant, the bias added to it, and the products it is computed from."""

    weight: np.ndarray
    node: ir.Node
    bias: np.ndarray | None = None
    before: set[int] = field(default_factory=set)


def propose_weights(
    nodes: list[ir.Node], x: ir.Value, experts: int, features: int
) -> Iterator[ExpertWeights]:
    """Readings of the constants in ``nodes`` as two-layer experts; the caller proves one.

    A matrix whose orientation its shape does not tell gives two readings.
    """
    layers = _layers(nodes, experts * features)
    first = [layer for layer in layers if not layer.before]
    second = [layer for layer in layers if layer.before]
    if not first or len(first) != len(second):
        return
    if len(first) == 1:
        stacks = [(layer.weight, layer.bias) for layer in (first[0], second[0])]
    elif len(first) == experts:
        number = {layers.index(layer): row for row, layer in enumerate(first)}
        if any(len(layer.before & set(number)) != 1 for layer in second):
            return
        # Pair each second layer with the first layer that it reads.
        second.sort(key=lambda layer: number[min(layer.before & set(number))])
        stacks = [_stack(first), _stack(second)]
    else:
        return
    (w1, b1), (w2, b2) = stacks
    if w1.size != w2.size or w1.size % (experts * features):
        return
    hidden = w1.size // (experts * features)
    bias1, bias2 = _bias(b1, experts, hidden), _bias(b2, experts, features)
    if bias1 is None or bias2 is None:
        return
    for one, two in product(
        _orientations(w1, experts, hidden, features), _orientations(w2, experts, features, hidden)
    ):
        yield ExpertWeights(one, bias1, two, bias2)


def _stack(layers: list[_Layer]) -> tuple[np.ndarray, np.ndarray | None]:
    weights = np.stack([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weights, None
    length = max(layer.bias.size for layer in layers if layer.bias is not None)
    rows = [np.zeros(length) if layer.bias is None else layer.bias for layer in layers]
    return weights, np.stack([np.broadcast_to(row.reshape(-1), length) for row in rows])


def _bias(array: np.ndarray | None, experts: int, length: int) -> np.ndarray | None:
    if array is None:
        return np.zeros((experts, length), np.float32)
    if array.size != experts * length:
        return None
    return np.ascontiguousarray(array.reshape(experts, length), np.float32)


def _orientations(
    weight: np.ndarray, experts: int, rows: int, columns: int
) -> Iterator[np.ndarray]:
    """``weight`` as [experts, rows, columns], from each layout that its shape allows."""
    weight = weight.astype(np.float32)
    if weight.shape in ((experts * rows, columns), (experts, rows, columns)):
        yield weight.reshape(experts, rows, columns)
    if weight.shape == (experts, columns, rows):
        yield np.ascontiguousarray(weight.transpose(0, 2, 1))
    if weight.shape == (columns, experts * rows):
        yield np.ascontiguousarray(weight.T.reshape(experts, rows, columns))
    if weight.shape == (columns, experts, rows):
        yield np.ascontiguousarray(weight.transpose(1, 2, 0))
    if weight.shape == (rows, columns, experts):
        yield np.ascontiguousarray(weight.transpose(2, 0, 1))


def _layers(nodes: list[ir.Node], combine_size: int) -> list[_Layer]:
    """Products with constants in topological order, with their biases and dependencies."""
    layers: list[_Layer] = []
    behind: dict[ir.Value, set[int]] = {}
    direct: dict[ir.Value, int] = {}  # value -> the layer that it is, but for layout and bias
    for node in nodes:
        reads = [value for value in node.inputs if value is not None]
        before = set().union(*(behind.get(value, set()) for value in reads))
        sources = [_weight_source(value) for value in reads]
        known = [array for array in sources if array is not None]
        layer: int | None = None
        if is_op(node, *_PRODUCTS) and any(array.ndim >= 2 for array in known[:2]):
            weight = next(array for array in known if array.ndim >= 2)
            if is_op(node, "Gemm"):
                weight = weight if attribute(node, "transB", 0) else weight.T
            layers.append(_Layer(weight, node, before=set(before)))
            layer = len(layers) - 1
            before = before | {layer}
            if is_op(node, "Gemm"):
                layers[layer].bias = constant(operand(node, 2))
        elif is_op(node, *_LAYOUT) and reads and reads[0] in direct:
            layer = direct[reads[0]]
        elif is_op(node, "Add") and len(reads) == 2:
            for value, other in (reads, reads[::-1]):
                array = _weight_source(other)
                if value in direct and array is not None and layers[direct[value]].bias is None:
                    layer = direct[value]
                    layers[layer].bias = array
        for output in node.outputs:
            behind[output] = before
            if layer is not None:
                direct[output] = layer
    return layers


def _weight_source(value: ir.Value | None) -> np.ndarray | None:
    """The float constant that ``value`` selects from or rearranges, or None."""
    for _ in range(12):
        array = constant(value)
        if array is not None:
            return array if np.issubdtype(array.dtype, np.floating) else None
        node = value.producer() if value is not None else None
        if not is_op(node, *_LAYOUT, *_SELECT):
            return None
        assert node is not None
        value = node.inputs[0]
    return None
