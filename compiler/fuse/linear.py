"""Linear: MatMul, Gemm or Einsum with a constant matrix, its bias, and a scale per output; the
product of two for a gated feed-forward network."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.heads import gather_rows, scatter_rows, select_rows
from moeware.compiler.fuse.rebuild import Builder, made_by, token_shape
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    is_op,
    operand,
    other_operand,
    same_elements,
    scalar,
    static_shape,
    traces,
)


@dataclass(frozen=True)
class LinearMatch:
    """``y = x weight^T + bias`` with weight ``[out, in]`` and bias ``[out]``, float32."""

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray
    nodes: tuple[ir.Node, ...]


def fuse_linear(model: ir.Model) -> None:
    """Replace each product with a constant matrix, and the bias added to it, by ``Linear``.

    Forms
    -----
    Linear
        - ``MatMul`` with a constant matrix on the right, and a constant added per output
        - ``Gemm`` with a constant matrix, alpha, beta and transB; not transA
        - ``Einsum`` over the last axis with a constant matrix
    """
    for node in list(model.graph):
        if node.graph is None or match_product(node) is None:
            continue
        output = node.outputs[0]
        with_bias = [
            add.outputs[0]
            for add in output.consumers()
            if is_op(add, "Add") and len(output.uses()) == 1 and not output.is_graph_output()
        ]
        match = next(filter(None, map(match_linear, [*with_bias, output])), None)
        if match is None:
            continue
        shape = token_shape(match.x)
        if shape is None:
            continue
        last = match.nodes[-1]
        build = Builder(model, last, match.nodes)
        x = build.resolve(match.x, shape)
        inputs = [x, build.weight(match.weight), build.weight(match.bias, "bias")]
        (result,) = build.node("Linear", inputs, [(*shape[:-1], len(match.bias))])
        build.replace(last.outputs[0], result)


def match_linear(value: ir.Value) -> LinearMatch | None:
    """The linear map whose result is ``value``: a product, a product plus its bias, or one of these
    times a number."""
    node = value.producer()
    if node is None:
        return None
    product = match_product(node)
    if product is not None:
        return product
    pair = other_operand(node) if is_op(node, "Add", "Mul", "Div") else None
    inner = pair[0].producer() if pair else None
    if pair is None or inner is None:
        return None
    if not is_op(node, "Add"):
        return _scaled(node, *pair)
    product, bias = match_product(inner), constant(pair[1])
    if product is None or bias is None or not _per_feature(bias, len(product.bias)):
        return None
    total = product.bias + np.broadcast_to(bias.reshape(-1), product.bias.shape)
    return LinearMatch(product.x, product.weight, total, (*product.nodes, node))


def _scaled(node: ir.Node, value: ir.Value, by: ir.Value) -> LinearMatch | None:
    """The linear map ``value`` times or divided by the number ``by`` (a temperature)."""
    factor, match = scalar(by), match_linear(value)
    if factor is None or match is None or static_shape(value) != static_shape(node.outputs[0]):
        return None
    if is_op(node, "Div"):
        if node.inputs[0] is not value or factor == 0:
            return None
        factor = 1 / factor
    weight, bias = (array * np.float32(factor) for array in (match.weight, match.bias))
    return LinearMatch(match.x, weight, bias, (*match.nodes, node))


def match_product(node: ir.Node) -> LinearMatch | None:
    """``node`` as a linear map, where it multiplies by a constant matrix."""
    if is_op(node, "Einsum"):
        return _match_einsum(node)
    x, weight = operand(node, 0), constant(operand(node, 1))
    if x is None or x.const_value is not None or weight is None or weight.ndim != 2:
        return None
    if not np.issubdtype(weight.dtype, np.floating):
        return None
    if is_op(node, "MatMul"):
        return _product(x, weight.T, node)
    if is_op(node, "Gemm") and not attribute(node, "transA", 0):
        return _match_gemm(node)
    return None


def _product(x: ir.Value, weight: np.ndarray, node: ir.Node) -> LinearMatch:
    weight = weight.astype(np.float32)
    return LinearMatch(x, weight, np.zeros(len(weight), np.float32), (node,))


def _match_gemm(node: ir.Node) -> LinearMatch | None:
    x, weight = node.inputs[0], constant(node.inputs[1])
    assert x is not None and weight is not None
    weight = weight if attribute(node, "transB", 0) else weight.T
    product = _product(x, attribute(node, "alpha", 1.0) * weight, node)
    if operand(node, 2) is None:
        return product
    bias = constant(operand(node, 2))
    if bias is None or not _per_feature(bias, len(weight)):
        return None
    bias = np.broadcast_to(bias.reshape(-1), product.bias.shape) * attribute(node, "beta", 1.0)
    return LinearMatch(x, product.weight, bias.astype(np.float32), (node,))


def _match_einsum(node: ir.Node) -> LinearMatch | None:
    pair = other_operand(node) if len(node.inputs) == 2 else None
    weight = constant(pair[1]) if pair else None
    equation = attribute(node, "equation", "").replace(" ", "")
    if pair is None or weight is None or weight.ndim != 2 or "->" not in equation:
        return None
    operands, result = equation.split("->")
    terms = operands.split(",")
    x_term, w_term = terms if pair[0] is node.inputs[0] else reversed(terms)
    if result[:-1] != x_term[:-1] or len(set(x_term)) != len(x_term) or result[-1:] in x_term:
        return None
    if w_term == result[-1] + x_term[-1]:
        return _product(pair[0], weight, node)
    return _product(pair[0], weight.T, node) if w_term == x_term[-1] + result[-1] else None


def _per_feature(array: np.ndarray, features: int) -> bool:
    """Whether ``array`` broadcasts along the last axis alone."""
    return array.size == 1 or array.size == features == array.shape[-1]


def fold_output_scale(model: ir.Model) -> None:
    """Fold a constant factor, one or for each feature (layer scale), into the Linear, the experts or
    the norm before it.

    Forms
    -----
    LayerNorm, RMSNorm
        - with a ``Mul`` or ``Div`` by a constant, one or for each feature, after it
    Linear
        - with a ``Mul`` or ``Div`` by a constant, one or for each output, after it
    Experts, GatedExperts
        - with a ``Mul`` or ``Div`` by a constant, one or for each feature, after them
    """
    for node in list(model.graph):
        pair = other_operand(node) if is_op(node, "Mul", "Div") else None
        factor = constant(pair[1]) if pair else None
        source = made_by(pair[0], *_SCALED) if pair else None
        if pair is None or factor is None or source is None:
            continue
        if is_op(node, "Div") and pair[0] is not node.inputs[0] or not _only_read(pair[0]):
            continue
        shape, given = static_shape(source.outputs[0]), static_shape(pair[0])
        if shape is None or given != static_shape(node.outputs[0]) or given[-1] != shape[-1]:
            continue
        if not _per_feature(factor, shape[-1]):
            continue
        factor = np.broadcast_to(factor.reshape(-1).astype(np.float32), shape[-1])
        factor = 1 / factor if is_op(node, "Div") else factor
        build = Builder(model, node, [source, node])
        inputs = list(source.inputs)
        for place, name in _SCALED[source.op_type].items():
            array = constant(inputs[place])
            assert array is not None
            of_rows = factor[:, None] if name == "weight" else factor
            inputs[place] = build.weight(array * of_rows, name)
        attributes = {name: entry.value for name, entry in source.attributes.items()}
        (result,) = build.node(source.op_type, inputs, [shape], attributes)  # type: ignore
        build.replace(node.outputs[0], result)


# Canonical operators that a factor can be folded into: the constants that it scales, by their place.
_SCALED = {
    "LayerNorm": {1: "gamma", 2: "beta"},
    "RMSNorm": {1: "gamma"},
    "Linear": {1: "weight", 2: "bias"},
    "Experts": {5: "weight", 6: "bias"},
    "GatedExperts": {5: "weight", 6: "bias"},
}


def _only_read(value: ir.Value) -> bool:
    """Whether ``value`` and what it is a reshaped form of have one reader each."""
    for trace in traces(value):
        if not same_elements(trace):
            break
        if len(trace.root.uses()) != 1 or trace.root.is_graph_output():
            return False
    return True


def split_linear(model: ir.Model) -> None:
    """Give each selection of columns of a Linear (a packed projection) a Linear of its own."""
    for node in list(model.graph):
        if not is_op(node, "Split", "Slice", "Gather"):
            continue
        for output in node.outputs:
            part = select_rows(output) if output.uses() or output.is_graph_output() else None
            if part is None or part.is_whole or made_by(part.root, "Linear") is None:
                continue
            shape, rows = static_shape(output), gather_rows(model, node, part)
            if shape is None or rows is None:
                continue
            build = Builder(model, node, part.nodes)
            build.replace(output, scatter_rows(build, rows, part, shape))


def fuse_multiply(model: ir.Model) -> None:
    """Replace the product of two values that Linears or functions make by ``Multiply``.

    Forms
    -----
    Multiply
        - ``Mul`` of a Linear and a function of another one, in either order (GLU, SwiGLU, GEGLU), the
          two packed in one Linear or apart
    """
    for node in list(model.graph):
        factors = [made_by(value, "Linear", "Pointwise") for value in node.inputs]
        if not is_op(node, "Mul") or None in factors:
            continue
        a, b = node.inputs
        assert a is not None and b is not None
        shape = token_shape(a)
        if shape is None or static_shape(a) != static_shape(b):
            continue
        build = Builder(model, node, [node])
        operands = [build.resolve(value, shape) for value in (a, b)]
        (result,) = build.node("Multiply", operands, [shape])
        build.replace(node.outputs[0], result)
