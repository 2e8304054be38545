"""Put canonical nodes into the graph."""

import json
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN
from moeware.compiler.fuse.grids import inherit
from moeware.compiler.fuse.trace import same_elements, static_shape, traces


class Builder:
    """Makes canonical nodes before the node that is being replaced.

    ``sources`` collects the names of the nodes that the new ones stand for.
    """

    def __init__(self, model: ir.Model, at: ir.Node, replaced: Iterable[ir.Node]):
        self._graph = model.graph
        self._at = at
        names: dict[str, None] = {}
        for node in replaced:
            if "sources" in node.metadata_props:
                names.update(dict.fromkeys(json.loads(node.metadata_props["sources"])))
            elif node.name:
                names[node.name] = None
        self._sources = json.dumps(list(names))

    def weight(self, array: np.ndarray, name: str = "weight") -> ir.Value:
        """Register ``array`` as an initializer of the graph."""
        array = np.ascontiguousarray(array, np.int64 if array.dtype == np.int64 else np.float32)
        number = len(self._graph.initializers)
        while f"{name}_{number}" in self._graph.initializers:
            number += 1
        name = f"{name}_{number}"
        value = ir.val(name, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=name)
        self._graph.register_initializer(value)
        return value

    def node(
        self,
        operator: str,
        inputs: list[ir.Value],
        shapes: list[tuple[int, ...]],
        attributes: Mapping[str, int | float | str] | None = None,
        types: list[ir.DataType] | None = None,
    ) -> list[ir.Value]:
        """Insert one canonical node and return its outputs with the given shapes and types."""
        types = types or [ir.DataType.FLOAT] * len(shapes)
        return self._insert(operator, inputs, shapes, attributes or {}, DOMAIN, types)

    def plain(
        self,
        operator: str,
        inputs: list[ir.Value],
        like: Iterable[ir.Value],
        attributes: Mapping[str, int | float | str],
        domain: str = "",
    ) -> list[ir.Value]:
        """Insert one node of ``domain``, the standard one where none is named, and return its outputs,
        with the shapes and types of ``like``."""
        like = list(like)
        shapes, types = [value.shape for value in like], [value.dtype for value in like]
        return self._insert(operator, inputs, shapes, attributes, domain, types)

    def reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """``value`` with another shape (itself where the shape is equal)."""
        if static_shape(value) == shape:
            return value
        target = self.weight(np.array(shape, np.int64), "shape")
        return self._insert("Reshape", [value, target], [shape], {}, "", [value.dtype])[0]

    def transpose(self, value: ir.Value, order: tuple[int, ...]) -> ir.Value:
        """``value`` with its axes in another order (itself where that is its own)."""
        shape = static_shape(value)
        assert shape is not None
        if order == tuple(range(len(shape))):
            return value
        shapes, attributes = [tuple(shape[axis] for axis in order)], {"perm": order}
        return self._insert("Transpose", [value], shapes, attributes, "", [value.dtype])[0]

    def product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The matrix product of two values of one rank and batch."""
        (*batch, rows, _), columns = static_shape(a) or (), (static_shape(b) or ())[-1]
        return self._insert("MatMul", [a, b], [(*batch, rows, columns)], {}, "", [a.dtype])[0]

    def concat(self, values: list[ir.Value], axis: int) -> ir.Value:
        """Values behind each other on one axis."""
        shapes = [static_shape(value) or () for value in values]
        shape = list(shapes[0])
        shape[axis] = sum(each[axis] for each in shapes)
        return self._insert(
            "Concat", values, [tuple(shape)], {"axis": axis}, "", [values[0].dtype])[0]

    def take(self, value: ir.Value, columns: np.ndarray) -> ir.Value:
        """Columns of the last axis of ``value``."""
        shape, indices = static_shape(value), self.weight(columns.astype(np.int64), "columns")
        assert shape is not None
        shapes, attributes = [(*shape[:-1], len(columns))], {"axis": -1}
        return self._insert("Gather", [value, indices], shapes, attributes, "", [value.dtype])[0]

    def expand(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """``value`` broadcast to ``shape``."""
        target = self.weight(np.array(shape, np.int64), "shape")
        return self._insert("Expand", [value, target], [shape], {}, "", [value.dtype])[0]

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        """``value`` times one number."""
        shape, number = static_shape(value), self.weight(np.array(factor, np.float32), "factor")
        assert shape is not None
        return self._insert("Mul", [value, number], [shape], {}, "", [value.dtype])[0]

    def _insert(self, operator, inputs, shapes, attributes, domain, types) -> list[ir.Value]:
        node = ir.node(operator, inputs, attributes, domain=domain, num_outputs=len(shapes))
        node.metadata_props["sources"] = self._sources
        for output, shape, kind in zip(node.outputs, shapes, types):
            output.shape = None if shape is None else ir.Shape(shape)
            output.dtype = kind
        self._graph.insert_before(self._at, node)
        return list(node.outputs)

    def resolve(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The earliest value of ``shape`` with the elements of ``value`` in their order."""
        equal = [trace.root for trace in traces(value) if same_elements(trace)]
        for root in reversed(equal):
            if static_shape(root) == shape:
                return root
        return self.reshape(equal[-1], shape)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new`` (reshaped to the shape of ``old``)."""
        inherit(old, new)
        shape = static_shape(old)
        if shape is not None:
            new = self.reshape(new, shape)
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def flat_root(value: ir.Value) -> ir.Value:
    """The earliest value that holds the elements of ``value`` in the same order; itself where its
    shape is not known."""
    return [value, *(trace.root for trace in traces(value) if same_elements(trace))][-1]


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The canonical node, one of ``operators``, that ``value`` comes from, whatever its shape."""
    if value is None or value.const_value is not None:
        return None
    node = flat_root(value).producer()
    found = node is not None and node.domain == DOMAIN and node.op_type in operators
    return node if found else None


def token_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Canonical shape of a value of rows: ``[1, N, D]``, or ``[1, D]`` for a row without tokens.

    The canonical shape is that of the earliest ancestor with the same elements that has one;
    otherwise the leading axes are counted as tokens.
    """
    shape = static_shape(value)
    if shape is None or len(shape) < 2:
        return None
    for trace in reversed(traces(value)):
        root = static_shape(trace.root)
        rows = bool(root) and root[0] == 1 and len(root) in (2, 3) and root[-1] == shape[-1]
        if rows and same_elements(trace):
            return root
    if len(shape) == 2 and shape[0] == 1:
        return shape
    return (1, int(np.prod(shape[:-1])), shape[-1])


def straighten(model: ir.Model) -> None:
    """Let canonical nodes and graph outputs read past layout operators that move nothing."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is None:
                node.replace_input_with(index, _earliest(value))
    for output in list(model.graph.outputs):
        earliest = _earliest(output)
        taken = earliest.is_graph_output() or earliest.is_graph_input()
        if earliest is not output and not taken and earliest.dtype == output.dtype:
            output.replace_all_uses_with(earliest, replace_graph_outputs=True)


def _earliest(value: ir.Value) -> ir.Value:
    """The earliest value of the same shape, type and elements."""
    for trace in reversed(traces(value)):
        if same_elements(trace) and static_shape(trace.root) == static_shape(value):
            return trace.root
    return value
