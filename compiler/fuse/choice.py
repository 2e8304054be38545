"""Softmax and the choice of the largest scores, in the spellings of exporters, as ``Softmax`` and ``TopK``.

The rules behind these look for the two operators alone.
"""

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.fuse.trace import attribute, constant, is_op, move, operand, static_shape

_PRODUCTS = ("MatMul", "Gemm", "Einsum")


def rewrite_softmax(model: ir.Model) -> None:
    """Replace exponentials divided by their sum, the largest subtracted before or not, by ``Softmax``.

    Forms
    -----
    Route, Attention
        - ``Softmax`` written out: ``Exp``, ``ReduceSum``, ``Div``
    """
    for node in list(model.graph):
        power = _producer(node, 0) if is_op(node, "Div") else None
        total = _producer(node, 1)
        if not is_op(power, "Exp") or not is_op(total, "ReduceSum"):
            continue
        axis, x = _axis(total), power.inputs[0]  # type: ignore[union-attr, arg-type]
        if axis is None or total.inputs[0] is not node.inputs[0] or x is None:  # type: ignore
            continue
        shift = x.producer()
        largest = _producer(shift, 1) if is_op(shift, "Sub") else None
        if is_op(largest, "ReduceMax") and _axis(largest) == axis:  # type: ignore[arg-type]
            x = largest.inputs[0] if largest.inputs[0] is shift.inputs[0] else x  # type: ignore
        build = Builder(model, node, [node])
        (result,) = build.plain("Softmax", [x], node.outputs, {"axis": axis})
        build.replace(node.outputs[0], result)


def rewrite_choice(model: ir.Model) -> None:
    """Replace ``ArgMax`` of scores, and ``ReduceMax`` of the same, by ``TopK`` of one; choose no more
    than what is read of a longer ``TopK``.

    Forms
    -----
    Route
        - ``ArgMax`` of one expert, its weight by ``ReduceMax`` or gathered
        - a longer ``TopK`` of which less is read (a sorted list, noisy gates in evaluation)
    """
    for node in list(model.graph):
        if is_op(node, "ArgMax"):
            _take_largest(model, node)
        elif is_op(node, "TopK"):
            _shorten(model, node)


def _take_largest(model: ir.Model, node: ir.Node) -> None:
    scores = node.inputs[0]
    shape = static_shape(scores)
    if scores is None or not shape or attribute(node, "select_last_index", 0):
        return
    if attribute(node, "axis", 0) not in (-1, len(shape) - 1) or not _weighs(node):
        return
    alike = [each for each in scores.consumers()
             if is_op(each, "ReduceMax") and _axis(each, keeps=None) == len(shape) - 1]
    replaced = {node, *alike}
    build = Builder(model, next(each for each in model.graph if each in replaced), replaced)
    one = build.weight(np.array([1], np.int64), "k")
    values, indices = build.plain("TopK", [scores, one], [scores, node.outputs[0]], {"axis": -1})
    for each in (values, indices):
        each.shape = ir.Shape((*shape[:-1], 1))
    for each in alike:
        build.replace(each.outputs[0], values)
    build.replace(node.outputs[0], indices)


def _weighs(node: ir.Node) -> bool:
    """Whether products follow the choice of ``node``, and no other choice is between them or before
    it, as in mixtures of one expert: not behind the last layer, nor where the second largest is
    sought without the first."""
    after = _around(node, lambda each: [user for value in each.outputs for user in value.consumers()])
    before = _around(node, lambda each: [value.producer() for value in inputs_of(each)])
    choices = sum(is_op(each, "ArgMax") for each in (*before, *after))
    return choices == 0 and any(is_op(each, *_PRODUCTS) for each in after)


def _around(
    node: ir.Node, neighbours: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> set[ir.Node]:
    """Nodes reached from ``node``, up to the nearest products."""
    seen, stack = set(), [node]
    while stack:
        for each in neighbours(stack.pop()):
            if each is not None and each not in seen:
                seen.add(each)
                stack += [] if is_op(each, *_PRODUCTS) else [each]
    return seen


def _shorten(model: ir.Model, node: ir.Node) -> None:
    shape, k = static_shape(node.outputs[0]), constant(operand(node, 1))
    if not shape or k is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        return
    places = np.broadcast_to(np.arange(shape[-1]), shape)
    used = max(_last_read(value, places) for value in node.outputs) + 1
    if used == shape[-1] or used < 1 or not attribute(node, "sorted", 1):
        return
    node.replace_input_with(1, Builder(model, node, [node]).weight(np.array([used], np.int64), "k"))
    for value in node.outputs:
        _reshape(value, places[..., :used])


# What selects the same of a shorter axis, where all that it selects is there.
_SELECTS = ("Slice", "Gather", "Identity")


def _last_read(value: ir.Value, places: np.ndarray) -> int:
    """The last of ``places`` that is read of ``value``, which holds them; -1 where none is."""
    last = int(places.max(initial=-1)) if value.is_graph_output() else -1
    for reader in value.consumers():
        moved = _selected(reader, value, places)
        if moved is None:
            return int(places.max(initial=-1))
        last = max(last, _last_read(reader.outputs[0], moved))
    return last


def _selected(reader: ir.Node, value: ir.Value, places: np.ndarray) -> np.ndarray | None:
    if not is_op(reader, *_SELECTS) or reader.inputs[0] is not value:
        return None
    bounds = [constant(operand(reader, place)) for place in (1, 2)]
    if any(each is not None and (each < 0).any() for each in bounds):
        return None  # counted from the end
    moved = move(reader, places)
    return None if moved is None else moved[0]


def _reshape(value: ir.Value, places: np.ndarray) -> None:
    """Give ``value``, and what is selected of it, the shape of ``places``."""
    if static_shape(value) == places.shape:
        return
    value.shape = ir.Shape(places.shape)
    for reader in value.consumers():
        moved = _selected(reader, value, places)
        assert moved is not None
        _reshape(reader.outputs[0], moved)


def _producer(node: ir.Node | None, index: int) -> ir.Node | None:
    value = operand(node, index) if node is not None else None
    return value.producer() if value is not None else None


def _axis(node: ir.Node, keeps: int | None = 1) -> int | None:
    """The one axis that a reduction reduces, from the front; None for others, and for one that keeps
    the axis otherwise than ``keeps``, where given."""
    axes = constant(operand(node, 1))
    axes = attribute(node, "axes", None) if axes is None else axes
    if keeps is not None and attribute(node, "keepdims", 1) != keeps:
        return None
    shape = static_shape(node.inputs[0])
    return int(axes[0]) % len(shape) if shape and axes is not None and len(axes) == 1 else None
