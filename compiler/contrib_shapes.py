"""Shapes of what operators of ONNX Runtime's domain give, where ONNX's inference stops."""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.contrib_moe import is_contrib_moe
from moeware.compiler.fuse.group_query import is_group_query
from moeware.compiler.fuse.terms import is_rotary
from moeware.compiler.fuse.trace import attribute, constant, operand, static_shape

__all__ = ["infer_shapes"]


def infer_shapes(model: ir.Model) -> None:
    """Infer shapes in place, those behind operators of ONNX Runtime's domain included.

    Raises ``CompileError`` for rows of attention that are no whole heads.
    """
    unknown = [node for node in model.graph if node.domain and _is_known(node)]
    while unknown:
        # Not strict, as a value without a type is an error there.
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        known = [node for node in unknown if static_shape(operand(node, 0)) is not None]
        if not known:
            return  # folding may find more
        for node in known:
            for value, shape in zip(node.outputs, _shapes(node)):
                value.type, value.shape = node.inputs[0].type, ir.Shape(shape)
        unknown = [node for node in unknown if node not in known]


def _is_known(node: ir.Node) -> bool:
    """Whether `_shapes` knows the operator."""
    special = is_contrib_moe(node) or is_rotary(node) or is_group_query(node)
    return special or node.op_type in ("MatMulNBits", "Attention", "MultiHeadAttention")


def _shapes(node: ir.Node) -> list[tuple[int, ...]]:
    """Shapes of the results: that of the first input, with other features where need be."""
    *rows, features = static_shape(operand(node, 0)) or ()
    if is_group_query(node):
        return _group_query(node, *rows, features) if len(rows) == 2 else []
    if node.op_type in ("Attention", "MultiHeadAttention"):
        return [(*rows, _value_features(node, features))] if len(rows) == 2 else []
    return [(*rows, attribute(node, "N", features))]


def _value_features(node: ir.Node, features: int) -> int:
    """Of the values that attention sums; packed weights make them of a third of their columns."""
    if node.op_type == "Attention":
        weight, sizes = static_shape(operand(node, 1)), attribute(node, "qkv_hidden_sizes", ())
        return sizes[2] if len(sizes) == 3 else weight[-1] // 3 if weight else features
    value = static_shape(operand(node, 2))
    return value[-1] if value and len(value) == 3 else features


def _group_query(
    node: ir.Node, batch: int, tokens: int, features: int
) -> list[tuple[int, ...]]:
    """Of GroupQueryAttention: rows, and keys and values of this run behind those of earlier ones."""
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    count = heads if operand(node, 1) is not None else heads + 2 * kv_heads
    if min(heads, kv_heads) < 1 or features % count:
        raise CompileError(
            f"Node {node.name!r} (GroupQueryAttention) must have rows of whole heads, not {features} "
            f"features for num_heads={heads} and kv_num_heads={kv_heads}; repair the node or export the "
            f"model again"
        )
    past, total = static_shape(operand(node, 3)), constant(operand(node, 6))
    length = tokens if total is None else int(total.max(initial=tokens))
    if past is not None and len(past) == 4:
        length = max(length, past[2])
    present = (batch, kv_heads, length, features // count)
    return [(batch, tokens, heads * (features // count)), present, present]
