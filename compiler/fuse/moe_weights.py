"""Find the weights of experts among the products with constants in a region."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.expert_order import expert_numbers
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.fuse.trace import attribute, constant, is_op, operand

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Cast", "Identity", "Expand", "Flatten")
_SELECT = ("Gather", "GatherND", "GatherElements", "Slice", "Split")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")

# Where the two layers of gated experts lie in one, by the size of either.
_HALVES = (lambda hidden: slice(hidden)), (lambda hidden: slice(hidden, None))
_TURNS = (lambda hidden: slice(0, None, 2)), (lambda hidden: slice(1, None, 2))


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked experts, float32: w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]; of gated ones
    also w3 and b3, as w1 and b1."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    w3: np.ndarray | None = None
    b3: np.ndarray | None = None

    def scaled(self, factor: float) -> "ExpertWeights":
        """Experts whose results are ``factor`` times those of these."""
        if factor == 1.0:
            return self
        return replace(self, w2=self.w2 * np.float32(factor), b2=self.b2 * np.float32(factor))


@dataclass(eq=False)  # compared by identity: arrays have no single truth value
class _Layer:
    """A product with a constant, the bias added to it, the products it is computed from, and the
    operators between it and the next one."""

    weight: np.ndarray
    node: ir.Node
    bias: np.ndarray | None = None
    before: set[int] = field(default_factory=set)
    users: list[str] = field(default_factory=list)


def propose_weights(
    nodes: list[ir.Node], x: ir.Value, experts: int, features: int
) -> Iterator[ExpertWeights]:
    """Readings of the constants in ``nodes`` as experts; the caller proves one.

    A matrix whose orientation its shape does not tell gives two readings, and so do the two
    factors of gated experts.
    """
    layers = _layers(_after(nodes, x), experts * features)
    first = {number for number, layer in enumerate(layers) if not layer.before}
    last = [number for number, layer in enumerate(layers) if layer.before]
    # The first of two is the same of all experts, if the graph tells them apart.
    read = [
        sorted(layers[number].before & first, key=lambda each: (sorted(layers[each].users), each))
        for number in last
    ]
    widths = {len(each) for each in read}
    once = sorted(number for each in read for number in each) == sorted(first)
    if len(last) not in (1, experts) or len(widths) != 1 or not once:
        return
    order = sorted(range(len(last)), key=lambda place: min(read[place]))
    if len(last) > 1:
        numbers = expert_numbers(nodes, x, [layers[number].node for number in last], experts)
        order = order if numbers is None else list(np.argsort(numbers))
    columns = [[layers[last[place]] for place in order]]
    columns += [[layers[read[place][turn]] for place in order] for turn in range(widths.pop())]
    if any(len({layer.weight.ndim for layer in column}) > 1 for column in columns):
        return
    (w2, b2), *ups = map(_stack, columns)
    if w2.size % (experts * features):
        return
    hidden, bias2 = w2.size // (experts * features), _bias(b2, experts, features)
    if bias2 is None or any(layers[number].before - first for number in last):
        return
    for down in _orientations(w2, experts, features, hidden):
        for (one, bias1), *gate in _first_layers(ups, experts, hidden, features):
            yield ExpertWeights(one, bias1, down, bias2, *(gate[0] if gate else ()))


def _after(nodes: list[ir.Node], x: ir.Value) -> list[ir.Node]:
    """Those of ``nodes`` that compute with ``x``; the others route."""
    found, reached = [], {x}
    for node in nodes:
        if not reached.isdisjoint(inputs_of(node)):
            found.append(node)
            reached.update(node.outputs)
    return found


def _first_layers(
    stacks: list[tuple[np.ndarray, np.ndarray | None]], experts: int, hidden: int, features: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Readings of the layers that x enters: one, or of gated experts the layer of the function
    and the one beside it (two stacks, or one that holds the halves or alternates)."""
    size = experts * hidden * features
    sizes = [weight.size for weight, _ in stacks]
    rows = hidden if sizes in ([size], [size, size]) else 2 * hidden
    biases = [_bias(bias, experts, rows) for _, bias in stacks]
    if sizes not in ([size], [size, size], [2 * size]) or any(bias is None for bias in biases):
        return
    readings = (_orientations(weight, experts, rows, features) for weight, _ in stacks)
    for weights in product(*readings):
        layers = list(zip(weights, biases))
        if sizes == [size]:
            yield layers
        elif len(layers) == 2:
            yield from (layers, layers[::-1])
        else:
            for one, other in (_HALVES, _TURNS):
                parts = [
                    tuple(np.ascontiguousarray(array[:, part(hidden)]) for array in layers[0])
                    for part in (one, other)
                ]
                yield from (parts, parts[::-1])


def _stack(layers: list[_Layer]) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights and biases of the experts' layers; smaller ones end in zeros, which hidden values of any
    function then meet."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    weights = _padded([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weights, None
    length = max(layer.bias.size for layer in layers if layer.bias is not None)
    rows = [np.zeros(1) if layer.bias is None else layer.bias.reshape(-1) for layer in layers]
    return weights, _padded([np.broadcast_to(row, length) if row.size == 1 else row for row in rows])


def _padded(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of one rank as one, each filled up with zeros to the size of the largest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    return np.stack([np.pad(array, [(0, more) for more in shape - array.shape]) for array in arrays])


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
        if not any(layers[number].before for number in before):
            for number in before:
                layers[number].users.append(node.op_type)
        sources = [_weight_source(value) for value in reads]
        known = [array for array in sources if array is not None]
        layer: int | None = None
        if is_op(node, *_PRODUCTS) and any(array.ndim >= 2 for array in known[:2]):
            weight = next(array for array in known if array.ndim >= 2)
            if is_op(node, "Gemm"):
                weight = weight if attribute(node, "transB", 0) else weight.T
            layer = _again(layers, weight) if any(map(_is_chosen, reads[:2])) else None
            if layer is None:
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


def _again(layers: list[_Layer], weight: np.ndarray) -> int | None:
    """The layer of ``weight``, where it is used for another choice of a token already."""
    for number, layer in enumerate(layers):
        if layer.weight.shape == weight.shape and np.array_equal(layer.weight, weight):
            return number
    return None


def _is_chosen(value: ir.Value) -> bool:
    """Whether ``value`` is selected from a constant by computed places."""
    node = value.producer()
    while is_op(node, *_LAYOUT, *_SELECT) and node is not None and node.inputs[0] is not None:
        places = operand(node, 1) if is_op(node, "Gather", "GatherND") else None
        if places is not None and places.const_value is None:
            return _weight_source(node.inputs[0]) is not None
        node = node.inputs[0].producer()
    return False


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
