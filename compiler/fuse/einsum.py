"""Einsum of two variables as the MatMul that it is, so that attention is found in it."""

import onnx_ir as ir

from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.trace import attribute, is_op, static_shape


def rewrite_einsum(model: ir.Model) -> None:
    """Replace each Einsum of two variables that contracts one axis by ``MatMul``."""
    for node in list(model.graph):
        if not is_op(node, "Einsum") or len(node.inputs) != 2:
            continue
        a, b = node.inputs
        if a is None or b is None or a.const_value is not None or b.const_value is not None:
            continue
        orders = _orders(attribute(node, "equation", "").replace(" ", ""))
        shape = static_shape(node.outputs[0])
        if orders is None or shape is None or None in (static_shape(a), static_shape(b)):
            continue
        build = Builder(model, node, [node])
        result = build.product(build.transpose(a, orders[0]), build.transpose(b, orders[1]))
        build.replace(node.outputs[0], build.transpose(result, orders[2]))


def _orders(equation: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Orders of the axes of both factors and of their MatMul's result; None for another sum."""
    operands, _, result = equation.partition("->")
    a, _, b = operands.partition(",")
    if any(len(set(term)) < len(term) or "." in term for term in (a, b, result)):
        return None
    batch = [axis for axis in result if axis in a and axis in b]
    rows, columns = ([axis for axis in result if axis not in other] for other in (b, a))
    summed = [axis for axis in a if axis in b and axis not in result]
    if not len(rows) == len(columns) == len(summed) == 1:
        return None
    left, right, made = batch + rows + summed, batch + summed + columns, batch + rows + columns
    if sorted(left) != sorted(a) or sorted(right) != sorted(b):
        return None
    return (
        tuple(a.index(axis) for axis in left),
        tuple(b.index(axis) for axis in right),
        tuple(made.index(axis) for axis in result),
    )
