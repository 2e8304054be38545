"""Rows of heads: which columns of a value of rows the heads of attention are, and back."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.grids import inherit_traced
from moeware.compiler.fuse.rebuild import Builder, made_by
from moeware.compiler.fuse.trace import attribute, constant, size, static_shape, traces


@dataclass(frozen=True)
class Heads:
    """``value``, heads selected from a value of rows: head h is columns ``columns[h]`` of ``root``.

    ``axis``: where the tokens lie in ``value``, -2 or -3.
    """

    value: ir.Value
    root: ir.Value
    columns: np.ndarray  # [heads, dim]
    tokens: int
    scale: float
    nodes: tuple[ir.Node, ...]
    axis: int = -2

    @property
    def is_whole(self) -> bool:
        """Whether these are all columns of the root, in order."""
        return np.array_equal(self.columns.reshape(-1), np.arange(size(self.root) // self.tokens))


def select_heads(
    value: ir.Value, heads: int = 0, lead: tuple[int, ...] | None = None, transposed: bool = False
) -> Heads | None:
    """``value`` ([.., heads, tokens, dim], or packed rows where ``heads`` is given) as columns.

    lead: what a product broadcasts the leading axes to;
    transposed: the last two axes are exchanged (the key side of the score product).
    """
    for trace in reversed(traces(value, scaled=True)):
        numbers = trace.numbers
        if heads and numbers.ndim == 3:
            numbers = numbers.reshape(numbers.shape[1], heads, -1).transpose(1, 0, 2)
        if transposed:
            numbers = numbers.swapaxes(-1, -2)
        if lead is not None:
            numbers = np.broadcast_to(numbers, (*lead, *numbers.shape[-2:]))
        columns = _columns(numbers, size(trace.root))
        if columns is not None:
            return Heads(
                value, trace.root, columns, numbers.shape[-2], trace.scale, trace.nodes
            )
    return None


def select_rows(value: ir.Value) -> Heads | None:
    """``value`` ([.., heads, tokens, dim], [.., tokens, heads, dim] or [.., tokens * heads, dim]) as
    columns of the earliest value ``[1, tokens, features]`` that it is a selection of."""
    for trace in reversed(traces(value)):
        shape, numbers = static_shape(trace.root), trace.numbers
        if shape is None or len(shape) != 3 or shape[0] != 1 or numbers.ndim < 2:
            continue
        count, dim = numbers.shape[-2:]
        if count > shape[1] and count % shape[1] == 0 and numbers.size == count * dim:
            numbers = numbers.reshape(shape[1], -1, dim)
        for axis in (-2, -3):
            if numbers.ndim < -axis or numbers.shape[axis] != shape[1]:
                continue
            columns = _columns(np.moveaxis(numbers, axis, -2), size(trace.root))
            if columns is not None:
                return Heads(value, trace.root, columns, shape[1], 1.0, trace.nodes, axis)
    return None


def _columns(numbers: np.ndarray, total: int) -> np.ndarray | None:
    """Columns [heads, dim] of rows that ``numbers`` ([.., heads, tokens, dim]) selects, or None."""
    tokens, dim = numbers.shape[-2:]
    numbers = numbers.reshape(-1, tokens, dim)
    if total % tokens:
        return None
    columns, width = numbers[:, 0], total // tokens
    rows = np.arange(tokens)[None, :, None] * width
    if columns.max() < width and (numbers == rows + columns[:, None]).all():
        return columns
    return None


def gather_rows(model: ir.Model, at: ir.Node, part: Heads, factor: float = 1.0) -> ir.Value | None:
    """``factor * part`` as ``[1, tokens, heads * dim]``: its root, or the nodes that make the root
    again with the rows of weights selected. None where neither is possible."""
    if part.is_whole and factor == 1.0:
        shape = (1, part.tokens, part.columns.size)
        whole = Builder(model, at, []).resolve(part.root, shape)
        inherit_traced(part.value, whole, part.scale)
        return whole
    node = made_by(part.root, "Linear", "RMSNorm")
    width = (static_shape(node.outputs[0]) or (0,))[-1] if node is not None else 0
    if part.tokens * width != size(part.root):  # rows of a window hold several tokens
        return None
    if made_by(part.root, "Linear"):
        return _select_linear(model, at, part, factor)
    return _select_norm(model, at, part) if factor == 1.0 else None


def _select_linear(model: ir.Model, at: ir.Node, part: Heads, factor: float) -> ir.Value:
    node = made_by(part.root, "Linear")
    assert node is not None
    build = Builder(model, at, [node, *part.nodes])
    x, weight, bias = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    assert x is not None and weight is not None and bias is not None
    columns = part.columns.reshape(-1)
    inputs = [
        x,
        build.weight(weight[columns] * factor),
        build.weight(bias[columns] * factor, "bias"),
    ]
    features = static_shape(x)
    assert features is not None
    (result,) = build.node("Linear", inputs, [(*features[:-1], len(columns))])
    inherit_traced(part.value, result, part.scale / factor)
    return build.reshape(result, (1, part.tokens, len(columns)))


def _select_norm(model: ir.Model, at: ir.Node, part: Heads) -> ir.Value | None:
    """Whole groups of an RMSNorm, in any order and each in any order."""
    node = made_by(part.root, "RMSNorm")
    assert node is not None and node.inputs[0] is not None
    gamma, before = constant(node.inputs[1]), select_rows(node.inputs[0])
    assert gamma is not None
    length = len(gamma) // attribute(node, "groups", 1)
    columns = part.columns.reshape(-1)
    if before is None or len(columns) % length:
        return None
    groups = np.sort(columns.reshape(-1, length), -1)
    if (groups[:, 0] % length).any() or (groups != groups[:, :1] + np.arange(length)).any():
        return None
    inner = before.columns.reshape(-1)[columns].reshape(part.columns.shape)
    x = gather_rows(model, at, replace(before, columns=inner))
    if x is None:
        return None
    build = Builder(model, at, [node, *part.nodes])
    attributes = {"epsilon": attribute(node, "epsilon", 1e-5), "groups": len(groups)}
    inputs = [x, build.weight(gamma[columns], "gamma")]
    (result,) = build.node("RMSNorm", inputs, [(1, part.tokens, len(columns))], attributes)
    inherit_traced(part.value, result, part.scale)
    return result


def join_rows(
    model: ir.Model, at: ir.Node, roots: tuple[ir.Value, ...], part: Heads
) -> ir.Value | None:
    """``part``, whose columns are those of two ``roots`` side by side, as ``[1, tokens, heads * dim]``:
    channels of Linears joined. None where a root is made by another operator."""
    if not all(made_by(root, "Linear") for root in roots):
        return None
    columns, made, first = part.columns.reshape(-1), [], 0
    places, before = np.zeros_like(columns), 0
    for root in roots:
        width = size(root) // part.tokens
        own = (columns >= first) & (columns < first + width)
        used, places_of_own = np.unique(columns[own] - first, return_inverse=True)
        places[own] = before + places_of_own
        made.append(gather_rows(model, at, replace(part, value=root, root=root, columns=used[None])))
        first, before = first + width, before + len(used)
    if None in made:
        return None
    build = Builder(model, at, part.nodes)
    inputs = [*made, build.weight(places, "columns")]
    return build.node("Join", inputs, [(1, part.tokens, len(columns))])[0]


def scatter_rows(build: Builder, rows: ir.Value, part: Heads, shape: tuple[int, ...]) -> ir.Value:
    """``rows`` (``[1, tokens, heads * dim]``) laid out as the value that ``part`` was selected from,
    with ``shape``."""
    heads, dim = part.columns.shape
    value = build.reshape(rows, (1, part.tokens, heads, dim))
    if part.axis == -2 and heads > 1:
        value = build.transpose(value, (0, 2, 1, 3))
    return build.reshape(value, shape)
