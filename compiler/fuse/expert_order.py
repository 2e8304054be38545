"""Which expert each of separate products belongs to: the one whose number the choice is compared with.

The order of nodes does not tell, as tools that sort a graph anew put the last expert first.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.trace import attribute, constant, is_op, operand, scalar, static_shape

__all__ = ["expert_numbers"]


def expert_numbers(
    nodes: Sequence[ir.Node], x: ir.Value, products: Sequence[ir.Node], experts: int
) -> list[int] | None:
    """The expert of each of ``products``, their last ones, or None where the graph does not say.

    nodes: between ``x``, the scores and the result, in topological order. A number reaches an expert's
    rows or its result by whatever picks one out of scores, masks or indices (``Equal``, ``Gather``,
    ``Slice``, ``Split``), or is its place where the results of all experts stand in a row (``Concat``).
    """
    found: dict[int, int] = {}
    places = {node: {place} for place, node in enumerate(products)}
    behind: dict[ir.Value, set[int]] = {}  # products that a value is made of
    numbers: dict[ir.Value, set[int]] = {}  # experts that it was picked out for
    of_x = {x}
    for node in nodes:
        reads = [value for value in node.inputs if value is not None]
        before = places.get(node, set()).union(*(behind.get(value, set()) for value in reads))
        picked = set().union(*(numbers.get(value, set()) for value in reads))
        chosen: Sequence[int | None] = [None] * len(node.outputs)
        if any(value in of_x for value in reads):
            of_x.update(node.outputs)
        elif not picked:
            chosen = _picked(node, experts) or chosen
        if is_op(node, "Concat") and len(reads) == experts:
            for number, value in enumerate(reads):
                if len(behind.get(value, ())) == 1:
                    found.setdefault(*behind[value], number)
        if len(before) == len(picked) == 1:
            found.setdefault(*before, *picked)
        for output, number in zip(node.outputs, chosen):
            behind[output] = before
            numbers[output] = picked if number is None else {number}
    order = [found.get(place, -1) for place in range(len(products))]
    return order if sorted(order) == list(range(experts)) else None


def _picked(node: ir.Node, experts: int) -> list[int] | None:
    """Numbers of the experts that the outputs of ``node`` are for, where it picks them out of all."""
    shape, second = static_shape(operand(node, 0)), constant(operand(node, 1))
    if is_op(node, "Equal"):
        sides = [scalar(value) for value in node.inputs]
        found = [int(side) for side in sides if side is not None and side in range(experts)]
        return found if len(found) == 1 else None
    if shape is None:
        return None
    if is_op(node, "Split"):
        every = shape[attribute(node, "axis", 0)] == experts == len(node.outputs)
        return list(range(experts)) if every else None
    if is_op(node, "Gather") and second is not None and second.size == 1:
        axis, part = attribute(node, "axis", 0), np.ravel(second)
    elif is_op(node, "Slice"):
        bounds = [constant(operand(node, place)) for place in (1, 2, 3)]
        if any(bound is None or bound.size != 1 for bound in bounds):
            return None
        start, stop, axis = (int(bound.reshape(())) for bound in bounds)
        part = np.arange(shape[axis])[start:stop]
    else:
        return None
    return [int(part[0]) % experts] if shape[axis] == experts and len(part) == 1 else None
