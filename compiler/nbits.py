"""ONNX Runtime's products with weights of a few bits, as the float operators that they stand for."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from moeware.compiler.blocks import WIDTHS, dequantised, middle, unpacked
from moeware.compiler.canonical import REASON
from moeware.compiler.fuse.region import run
from moeware.compiler.fuse.trace import attribute, operand

__all__ = ["EXPANDED", "expand_nbits"]

_UNREAD = (
    "{} is read where its weights are constants of 8, 4 or 2 bits in blocks along the inputs, without g_idx "
    "or the packing of a provider; quantise the float model in that form"
)


def expand_nbits(model: ir.Model) -> list[str]:
    """Replace each ``MatMulNBits`` by ``MatMul`` (and ``Add``) and each ``GatherBlockQuantized`` by ``Gather``,
    of float constants; what is in another form stays, with the reason. Returns names of the products'
    weights."""
    names = []
    for node in list(model.graph):
        read = _READERS.get(node.op_type) if node.domain == "com.microsoft" else None
        if read is None:
            continue
        weight = read(model, node)
        if weight is None:
            node.metadata_props[REASON] = _UNREAD.format(node.op_type)
            continue
        value = _constant(model, node, weight)
        if node.op_type == "MatMulNBits":
            names.append(str(node.inputs[1].name))
            made = [ir.node("MatMul", [node.inputs[0], value], name=f"{node.name}_product")]
            bias = operand(node, 5)
            if bias is not None:
                made[0].outputs[0].name = f"{node.outputs[0].name}_product"
                made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{node.name}_sum"))
        else:
            made = [ir.node("Gather", [value, node.inputs[1]], {"axis": 0}, name=node.name)]
        _replace(model, node, made)
    return names


def _constant(model: ir.Model, node: ir.Node, weight: np.ndarray) -> ir.Value:
    name = f"{node.outputs[0].name}_weight"
    while name in model.graph.initializers:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(weight), name=name)
    value = ir.val(tensor.name, const_value=tensor, dtype=ir.DataType.FLOAT, shape=tensor.shape)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, node: ir.Node, made: list[ir.Node]) -> None:
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    model.graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name = old.name
    old.name, new.name = f"{name}_stored", name
    model.graph.remove(node, safe=True)


def _arrays(model: ir.Model, node: ir.Node, places: tuple[int, ...]) -> list[np.ndarray | None] | None:
    """The constants at ``places``; None where an input that is there is none."""
    found: list[np.ndarray | None] = []
    for place in places:
        value = operand(node, place)
        if value is None:
            found.append(None)
        elif value.const_value is not None and not value.is_graph_input():
            found.append(value.const_value.numpy())
        else:
            results = run(model, {}, [value])
            if results is None:
                return None
            found += results
    return found


def _zeros(zero: np.ndarray | None, bits: int, shape: tuple[int, int]) -> np.ndarray | int | None:
    """Zero points [rows, blocks], of which bytes hold each row by itself; None where there are others
    than so many."""
    if zero is None:
        return middle(bits)
    width = shape[1] if zero.dtype != np.uint8 else -(-shape[1] * bits // 8)
    if zero.size != shape[0] * width:
        return None
    zero = zero.reshape(shape[0], width)
    return zero if zero.dtype != np.uint8 else unpacked(zero, bits)[:, : shape[1]]


def _product(model: ir.Model, node: ir.Node) -> np.ndarray | None:
    """Weight [K, N] of ``MatMulNBits``."""
    bits, length = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    rows, columns = attribute(node, "N", 0), attribute(node, "K", 0)
    arrays = _arrays(model, node, (1, 2, 3))
    other = operand(node, 4) is not None or attribute(node, "weight_prepacked", 0)
    if arrays is None or other or bits not in WIDTHS or min(length, rows, columns) < 1:
        return None
    stored, scale, zero = arrays
    shape = rows, -(-columns // length)
    zeros = _zeros(zero, bits, shape)
    if stored.dtype != np.uint8 or stored.size * 8 != rows * shape[1] * length * bits:
        return None
    if zeros is None or scale.size != rows * shape[1]:
        return None
    integers = unpacked(stored.reshape(rows, -1), bits)[:, :columns]
    return dequantised(integers, scale.reshape(shape), zeros, length).T


def _table(model: ir.Model, node: ir.Node) -> np.ndarray | None:
    """Rows [V, D] of ``GatherBlockQuantized``."""
    arrays = _arrays(model, node, (0, 2, 3))
    if arrays is None or attribute(node, "gather_axis", 0) != 0:
        return None
    stored, scale, zero = arrays
    bits, length = attribute(node, "bits", 4), attribute(node, "block_size", 128)
    if attribute(node, "quantize_axis", 1) not in (1, -1) or {stored.ndim, scale.ndim} != {2}:
        return None
    if stored.dtype == np.uint8:
        if bits not in WIDTHS:
            return None
        integers, zeros = unpacked(stored, bits), _zeros(zero, bits, scale.shape)
    else:  # int4 and uint4, which NumPy has a type for
        integers, zeros = stored.astype(np.float32), 0
        if zero is not None:
            zeros = zero.astype(np.float32) if zero.shape == scale.shape else None
    if zeros is None or length < 1 or scale.shape != (len(integers), -(-integers.shape[1] // length)):
        return None
    return dequantised(integers, scale, zeros, length)


_READERS: dict[str, Callable[[ir.Model, ir.Node], np.ndarray | None]] = {
    "MatMulNBits": _product,
    "GatherBlockQuantized": _table,
}
EXPANDED = tuple(_READERS)
