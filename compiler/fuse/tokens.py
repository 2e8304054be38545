"""TakeToken, MeanTokens and the residual Add."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN, ROUTED
from moeware.compiler.fuse.rebuild import Builder, token_shape
from moeware.compiler.fuse.trace import (
    Trace,
    attribute,
    constant,
    is_op,
    operand,
    size,
    static_shape,
    traces,
)


def fuse_take_token(model: ir.Model) -> None:
    """Replace the selection of one row of ``[1, N, D]`` by ``TakeToken``.

    Forms
    -----
    TakeToken
        - ``Gather``, ``Slice`` or ``Split`` that selects one token
    """
    for node in list(model.graph):
        if not is_op(node, "Gather", "Slice", "Split"):
            continue
        for output in node.outputs:
            if not output.uses() and not output.is_graph_output():
                continue
            trace = _rows_of_tokens(output)
            if trace is None:
                continue
            _, tokens, features = static_shape(trace.root)  # type: ignore[misc]
            first = int(trace.numbers.reshape(-1)[0])
            expected = first + np.arange(features)
            one_row = trace.numbers.size == features and first % features == 0
            if tokens < 2 or not one_row or (trace.numbers.reshape(-1) != expected).any():
                continue
            build = Builder(model, node, trace.nodes)
            index = {"index": first // features}
            (result,) = build.node("TakeToken", [trace.root], [(1, features)], index)
            build.replace(output, result)


def _rows_of_tokens(value: ir.Value) -> Trace | None:
    """The farthest trace of ``value`` to a ``[1, N, D]`` value."""
    for trace in reversed(traces(value)):
        shape = static_shape(trace.root)
        if trace.nodes and shape is not None and len(shape) == 3 and shape[0] == 1:
            return trace
    return None


def fuse_mean(model: ir.Model) -> None:
    """Replace a mean over all tokens by ``MeanTokens``.

    Forms
    -----
    MeanTokens
        - ``ReduceMean`` over the tokens, or ``GlobalAveragePool`` of them as an image
    """
    for node in list(model.graph):
        if not is_op(node, "ReduceMean", "GlobalAveragePool") or node.inputs[0] is None:
            continue
        axes = constant(operand(node, 1))
        if axes is None:
            axes = attribute(node, "axes", None)
        given = static_shape(node.inputs[0])
        if given is None:
            continue
        if is_op(node, "GlobalAveragePool"):
            axes = range(2, len(given))
        # No axes at all are all of them, or none, as another attribute says.
        if axes is None or np.ndim(axes) != 1 or len(axes) == 0:
            continue
        axes = sorted({int(axis) % len(given) for axis in axes})
        for trace in reversed(traces(node.inputs[0])):
            shape = static_shape(trace.root)
            if shape is None or len(shape) != 3 or shape[0] != 1:
                continue
            kept = [axis for axis in range(len(given)) if axis not in axes]
            numbers = trace.numbers.transpose(*axes, *kept)
            numbers = numbers.reshape(int(np.prod([given[axis] for axis in axes])), -1)
            wanted = np.arange(size(trace.root)).reshape(shape[1:])
            if numbers.shape == wanted.shape and (numbers == wanted).all():
                build = Builder(model, node, [*trace.nodes, node])
                (result,) = build.node("MeanTokens", [trace.root], [(1, shape[2])])
                build.replace(node.outputs[0], result)
                break


def fuse_add(model: ir.Model) -> None:
    """Replace the sum of two values of rows by the residual ``Add``.

    Forms
    -----
    Add
        - ``Add`` of two computed values of one shape
    """
    for node in list(model.graph):
        if not is_op(node, "Add") or any(
            value is None or value.const_value is not None for value in node.inputs
        ):
            continue
        a, b = node.inputs
        assert a is not None and b is not None
        shape = token_shape(a)
        if shape is None or static_shape(a) != static_shape(b) or len(shape) != 3:
            continue
        build = Builder(model, node, [node])
        operands = [build.resolve(value, shape) for value in (a, b)]
        (result,) = build.node("Add", operands, [shape])
        build.replace(node.outputs[0], result)


def join_branches(model: ir.Model) -> None:
    """Rewrite ``x + (a + b)``, with branches a and b (a shared expert), as ``(x + a) + b``.

    Then each branch joins the residual stream by itself. Only the rounding of the sum differs.

    Forms
    -----
    Add
        - ``Add`` of the stream and of the sum of two branches (a shared expert)
    """
    for node in list(model.graph):
        if not _is(node, "Add"):
            continue
        for index, value in enumerate(node.inputs):
            inner = value.producer() if value is not None else None
            stream = node.inputs[1 - index]
            if inner is None or stream is None or not _is(inner, "Add") or value is None:
                continue
            branches = [branch for branch in inner.inputs if branch is not None]
            whole = len(value.uses()) == 1 and not value.is_graph_output()
            if not whole or not all(
                _is(branch.producer(), "Linear", *ROUTED) for branch in branches
            ):
                continue
            shape = static_shape(stream)
            assert shape is not None
            build = Builder(model, node, [inner, node])
            for branch in branches:
                (stream,) = build.node("Add", [stream, branch], [shape])
            build.replace(node.outputs[0], stream)
            break


def _is(node: ir.Node | None, *operators: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type in operators
