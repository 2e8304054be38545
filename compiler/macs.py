"""Multiply-accumulates of a node, canonical or not."""

import math

import onnx_ir as ir

from moeware.compiler.canonical import ROUTED, is_canonical, shape

__all__ = ["macs"]


def macs(node: ir.Node) -> int:
    """Multiply-accumulates of ``node`` for one frame; 0 for operators without products."""
    shapes = [shape(value) if _is_static(value) else () for value in node.inputs]
    outputs = [shape(value) if _is_static(value) else () for value in node.outputs]
    if is_canonical(node):
        if node.op_type in ("PatchEmbed", "Linear"):
            return math.prod(outputs[0]) * shapes[1][1]
        if node.op_type == "Route":
            return math.prod(shapes[0]) * shapes[1][0]
        if node.op_type in ROUTED:
            layers = 2 if node.op_type == "Experts" else 3
            return math.prod(shapes[1]) * layers * math.prod(shapes[3][1:])
        if node.op_type == "SoftExperts":
            slots, features = shapes[1]
            # Logits, tokens to slots and slots to tokens; two layers.
            return slots * features * (3 * shapes[0][1] + 2 * shapes[2][1])
        if node.op_type == "Attention":
            return (math.prod(shapes[0]) + math.prod(outputs[0])) * shapes[1][-2]
        return 0
    if node.op_type == "MatMul" and shapes[0]:
        return math.prod(outputs[0]) * shapes[0][-1]
    if node.op_type == "Gemm" and shapes[1]:
        return math.prod(shapes[1]) * outputs[0][0] if outputs[0] else 0
    if node.op_type == "Conv" and shapes[1]:
        return math.prod(outputs[0]) * math.prod(shapes[1][1:])
    if node.op_type == "Einsum" and "..." not in node.attributes["equation"].value:
        return _einsum_macs(node, shapes)
    if node.op_type == "GroupQueryAttention" and outputs[0]:
        return 2 * math.prod(outputs[0]) * outputs[1][-2]  # keys and values, earlier ones included
    if node.op_type in ("Attention", "MultiHeadAttention") and node.domain and outputs[0]:
        packed = node.op_type == "Attention"
        products = math.prod((*shapes[0], *shapes[1][-1:])) if packed else 0
        return products + 2 * math.prod(outputs[0]) * outputs[0][1]
    if node.op_type in ("MoE", "QMoE") and shapes[0] and shapes[2]:
        return _contrib_macs(node, shapes)
    return 0


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.is_static()


def _einsum_macs(node: ir.Node, shapes: list[tuple[int, ...]]) -> int:
    terms = node.attributes["equation"].value.replace(" ", "").split("->")[0].split(",")
    sizes = {label: size for term, dims in zip(terms, shapes) for label, size in zip(term, dims)}
    return math.prod(sizes.values())


def _contrib_macs(node: ir.Node, shapes: list[tuple[int, ...]]) -> int:
    """Of a mixture of experts in ONNX Runtime's domain; packed weights tell only their rows."""
    hidden = shapes[2][1]
    fusion = node.attributes.get("swiglu_fusion")
    columns = hidden // 2 if fusion is not None and fusion.value else hidden
    k = node.attributes["k"].value if "k" in node.attributes else 1
    return math.prod(shapes[0]) * k * (hidden + columns)
