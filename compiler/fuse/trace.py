"""What layout operators do, found by running them on element numbers.

Exporters write the same head split as many sequences of Reshape, Transpose, Split, Gather and
Squeeze. Instead of listing sequences, the elements of a value are numbered and the operators run
on the numbers: two sequences are equal when the numbers arrive in the same places.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE}


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of ``value`` as integers, or None where it is unknown or depends on data."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape)


def size(value: ir.Value | None) -> int:
    """Number of elements of ``value``; -1 where its shape is not static."""
    shape = static_shape(value)
    return -1 if shape is None else int(np.prod(shape, dtype=np.int64))


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a one-element initializer holds, or None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default):
    """Value of an attribute of ``node``, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of ``node``, or None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether ``node`` is one of the standard operators ``names``."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in names


def other_operand(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(variable operand, initializer operand) of a node with one of each, or None."""
    first, second = operand(node, 0), operand(node, 1)
    if first is None or second is None:
        return None
    if (first.const_value is None) == (second.const_value is None):
        return None
    return (first, second) if second.const_value is not None else (second, first)


def move(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    """Outputs of layout operator ``node`` when its data input is ``numbers``; None if not one."""
    if not is_op(node, *_MOVES):
        return None
    try:
        return _MOVES[node.op_type](node, numbers)
    except (IndexError, ValueError, TypeError):
        return None


def _by_shape(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    shape = static_shape(node.outputs[0])
    return None if shape is None else [numbers.reshape(shape)]


def _cast(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    source, target = node.inputs[0], ir.DataType(attribute(node, "to", 1))
    return [numbers] if source is not None and {source.dtype, target} <= _FLOATS else None


def _transpose(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers.transpose(attribute(node, "perm", None))]


def _expand(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    shape = static_shape(node.outputs[0])
    return None if shape is None else [np.broadcast_to(numbers, shape)]


def _reduce(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    """A reduction over axes of one element (top-1 routing) moves nothing."""
    return _by_shape(node, numbers) if size(node.outputs[0]) == numbers.size else None


def _tile(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    repeats = constant(operand(node, 1))
    return None if repeats is None else [np.tile(numbers, repeats)]


def _gather(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    indices = constant(operand(node, 1))
    return None if indices is None else [np.take(numbers, indices, attribute(node, "axis", 0))]


def _gather_nd(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    indices = constant(operand(node, 1))
    if indices is None or attribute(node, "batch_dims", 0):
        return None
    return [numbers[tuple(np.moveaxis(indices, -1, 0))]]


def _split(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    axis, sizes = attribute(node, "axis", 0), []
    for output in node.outputs:
        shape = static_shape(output)
        if shape is None:
            return None
        sizes.append(shape[axis])
    return np.split(numbers, np.cumsum(sizes)[:-1], axis)


def _slice(node: ir.Node, numbers: np.ndarray) -> list[np.ndarray] | None:
    arrays = [constant(operand(node, index)) for index in range(1, 5)]
    starts, ends, axes, steps = arrays
    if starts is None or ends is None:
        return None
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    if (steps <= 0).any():
        return None
    cut = [slice(None)] * numbers.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps):
        cut[axis] = slice(int(start), int(end), int(step))
    return [numbers[tuple(cut)]]


_MOVES = {
    "Reshape": _by_shape,
    "Flatten": _by_shape,
    "Squeeze": _by_shape,
    "Unsqueeze": _by_shape,
    "Identity": lambda node, numbers: [numbers],
    "Dropout": lambda node, numbers: [numbers],
    "Cast": _cast,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "ReduceSum": _reduce,
    "ReduceMean": _reduce,
    "ReduceMax": _reduce,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Split": _split,
    "Slice": _slice,
}
LAYOUT = tuple(_MOVES)  # operators that only move elements (a reduction, where its axes have one)


@dataclass(frozen=True)
class Trace:
    """``value``'s elements are ``scale *`` the elements ``numbers`` of the flattened ``root``."""

    root: ir.Value
    numbers: np.ndarray
    nodes: tuple[ir.Node, ...]
    scale: float = 1.0


def _source(node: ir.Node | None, scaled: bool) -> tuple[ir.Value, float] | None:
    """Data input of a layout operator (or of a scaling by one number) and the factor."""
    if is_op(node, *_MOVES):
        assert node is not None
        return (node.inputs[0], 1.0) if node.inputs[0] is not None else None
    if scaled and is_op(node, "Mul", "Div"):
        assert node is not None
        pair = other_operand(node)
        factor = scalar(pair[1]) if pair else None
        if pair is None or factor is None or static_shape(pair[0]) != static_shape(node.outputs[0]):
            return None
        if node.op_type == "Mul":
            return pair[0], factor
        return (pair[0], 1.0 / factor) if pair[0] is node.inputs[0] else None
    return None


def traces(value: ir.Value, scaled: bool = False) -> list[Trace]:
    """Traces of ``value`` to itself and to each ancestor that only layout operators separate.

    With ``scaled``, multiplications by one number count as layout too. Nearest ancestor first.
    """
    shape = static_shape(value)
    if shape is None:
        return []
    path: list[tuple[ir.Node, ir.Value, float]] = []
    current = value
    while True:
        step = _source(current.producer(), scaled)
        if step is None or static_shape(step[0]) is None:
            break
        node = current.producer()
        assert node is not None
        path.append((node, current, step[1]))
        current = step[0]
    found = [Trace(value, np.arange(size(value)).reshape(shape), ())]
    for depth in range(1, len(path) + 1):
        root = _source(path[depth - 1][0], scaled)[0]  # type: ignore[index]
        numbers = np.arange(size(root)).reshape(static_shape(root))
        scale = 1.0
        for node, output, factor in reversed(path[:depth]):
            scale *= factor
            if is_op(node, "Mul", "Div"):
                continue
            outputs = move(node, numbers)
            if outputs is None:
                return found
            numbers = outputs[output.index()]  # type: ignore[index]
        nodes = tuple(node for node, _, _ in path[:depth])
        found.append(Trace(root, numbers, nodes, scale))
    return found


def same_elements(trace: Trace) -> bool:
    """Whether the traced value is its root with another shape and nothing moved."""
    flat = trace.numbers.reshape(-1)
    return flat.size == size(trace.root) and bool((flat == np.arange(flat.size)).all())


def forward(value: ir.Value) -> Iterator[tuple[ir.Value, np.ndarray, list[ir.Node]]]:
    """Values that layout operators make of ``value``: (value, element numbers, nodes between)."""
    shape = static_shape(value)
    if shape is None:
        return
    queue: list[tuple[ir.Value, np.ndarray, list[ir.Node]]] = [
        (value, np.arange(size(value)).reshape(shape), [])
    ]
    while queue:
        current, numbers, nodes = queue.pop(0)
        yield current, numbers, nodes
        for node in current.consumers():
            if node.inputs[0] is not current:
                continue
            outputs = move(node, numbers)
            for output, moved in zip(node.outputs, outputs or []):
                queue.append((output, moved, [*nodes, node]))
