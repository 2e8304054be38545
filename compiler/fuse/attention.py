"""Attention: the fused operator and every MatMul-Softmax-MatMul, packed projections included."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN
from moeware.compiler.fuse.grids import inherit_traced
from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.region import region, run
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    forward,
    is_op,
    operand,
    size,
    static_shape,
    traces,
)


@dataclass(frozen=True)
class _Heads:
    """``value``, heads selected from a value of rows: head h is columns ``columns[h]`` of ``root``."""

    value: ir.Value
    root: ir.Value
    columns: np.ndarray  # [heads, dim]
    tokens: int
    scale: float
    nodes: tuple[ir.Node, ...]


def fuse_attention(model: ir.Model) -> None:
    """Replace each softmax attention without a data-dependent mask by ``Attention``."""
    for node in list(model.graph):
        if node.graph is None:
            continue
        if is_op(node, "Attention"):
            _fuse_operator(model, node)
        elif is_op(node, "Softmax"):
            _fuse_products(model, node)


def _fuse_operator(model: ir.Model, node: ir.Node) -> None:
    extra = [value for value in node.inputs[3:] if value is not None]
    if extra or len([output for output in node.outputs if output.uses()]) > 1:
        return
    if attribute(node, "softcap", 0.0):
        return
    found = []
    for index, name in enumerate(("q_num_heads", "kv_num_heads", "kv_num_heads")):
        value = operand(node, index)
        heads = attribute(node, name, 0)
        found.append(_select(value, heads) if value is not None else None)
    q, k, v = found
    if q is None or k is None or v is None:
        return
    q_scale = q.scale * k.scale
    output = node.outputs[0]
    shape = static_shape(output)
    if shape is None:
        return
    dim = q.columns.shape[1]
    scale = _snap((attribute(node, "scale", 0.0) or dim**-0.5) * q_scale, dim)
    causal = attribute(node, "is_causal", 0)
    if len(shape) == 3:
        _replace(model, q, k, v, output, scale, causal, (node,))
        return
    merged = _merged(output, len(q.columns), q.tokens, dim)
    if merged is not None:
        _replace(model, q, k, v, merged[0], scale, causal, (node, *merged[1]))


def _fuse_products(model: ir.Model, softmax: ir.Node) -> None:
    scores = _before(softmax)
    weighted = _after(softmax)
    if scores is None or weighted is None:
        return
    product, weighing = scores.producer(), weighted
    assert product is not None
    weights, values = weighing.inputs
    left, right = product.inputs
    assert weights is not None and values is not None and left is not None and right is not None
    q, k, v = _select(left), _select(right, transposed=True), _select(values)
    if q is None or k is None or v is None:
        return
    if not (q.columns.shape[1] == k.columns.shape[1] == v.columns.shape[1]):
        return
    found = _measure(model, scores, weights, q.columns.shape[1])
    merged = _merged(weighing.outputs[0], len(q.columns), q.tokens, v.columns.shape[1])
    if found is None or merged is None:
        return
    scale, causal, between = found
    scale = _snap(scale * q.scale * k.scale, q.columns.shape[1])
    nodes = (product, *between, weighing, *merged[1])
    _replace(model, q, k, v, merged[0], scale, causal, nodes)


def _before(softmax: ir.Node) -> ir.Value | None:
    """The product of two variables whose scores the softmax reads."""
    value = softmax.inputs[0]
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None:
            return None
        if is_op(node, "MatMul"):
            operands = [v for v in node.inputs if v is not None and v.const_value is None]
            return value if len(operands) == 2 else None
        variable = [v for v in node.inputs if v is not None and v.const_value is None]
        if not is_op(node, *_BETWEEN) or len(set(variable)) != 1:
            return None
        value = variable[0]
    return None


def _after(softmax: ir.Node) -> ir.Node | None:
    """The product that the weights of the softmax enter from the left."""
    stack, seen = [softmax.outputs[0]], 0
    while stack and seen < 12:
        value, seen = stack.pop(0), seen + 1
        for node in value.consumers():
            if is_op(node, "MatMul") and node.inputs[0] is value:
                return node
            if is_op(node, *_BETWEEN):
                stack += node.outputs
    return None


_BETWEEN = (
    "Mul", "Div", "Add", "Where", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "IsNaN",
    "Dropout", "Expand",
)  # fmt: skip


def _measure(
    model: ir.Model, scores: ir.Value, weights: ir.Value, dim: int
) -> tuple[float, int, list[ir.Node]] | None:
    """(scale, causal, nodes) with ``weights = softmax(scale * scores [masked])``, or None."""
    shape, out_shape = static_shape(scores), static_shape(weights)
    if shape is None or out_shape is None or np.prod(shape) != np.prod(out_shape):
        return None
    nodes, leaves = region([weights], [scores])
    if leaves:
        return None
    sample = np.random.default_rng(3).normal(size=shape).astype(np.float32) * 3
    results = run(model, {scores: sample}, [weights])
    if results is None:
        return None
    result = results[0].reshape(-1, *shape[-2:]).astype(np.float64)
    flat = sample.reshape(result.shape).astype(np.float64)
    # Masked or not, the last row sees every key: its log weights have the slope of the scale.
    logs = np.log(np.maximum(result[:, -1], 1e-300))
    steps = flat[:, -1] - flat[:, -1].mean(-1, keepdims=True)
    slope = (steps * logs).sum() / (steps * steps).sum() if shape[-1] > 1 else 1.0
    scale = _snap(float(slope), dim)
    for causal in (0, 1):
        masked = flat * scale
        if causal:
            masked = np.where(np.tri(*shape[-2:]).astype(bool), masked, -np.inf)
        exponents = np.exp(masked - masked.max(-1, keepdims=True))
        if np.abs(exponents / exponents.sum(-1, keepdims=True) - result).max() < 1e-5:
            return scale, causal, nodes
    return None


def _snap(scale: float, dim: int) -> float:
    """The exact scale that a rounded one stands for, where it is a usual one."""
    for exact in (1.0, dim**-0.5, dim**-0.25):
        if abs(scale - exact) < 1e-4 * exact:
            return exact
    return scale


def _select(value: ir.Value, heads: int = 0, transposed: bool = False) -> _Heads | None:
    """``value`` ([.., heads, tokens, dim], or packed rows where ``heads`` is given) as columns.

    ``transposed``: the last two axes are exchanged (the key side of the score product).
    """
    for trace in reversed(traces(value, scaled=True)):
        numbers = trace.numbers
        if heads and numbers.ndim == 3:
            numbers = numbers.reshape(numbers.shape[1], heads, -1).transpose(1, 0, 2)
        if transposed:
            numbers = numbers.swapaxes(-1, -2)
        tokens, dim = numbers.shape[-2:]
        numbers = numbers.reshape(-1, tokens, dim)
        columns = numbers[:, 0]
        total = size(trace.root)
        if total % tokens:
            continue
        width = total // tokens
        rows = np.arange(tokens)[None, :, None] * width
        if columns.max() < width and (numbers == rows + columns[:, None]).all():
            return _Heads(value, trace.root, columns, tokens, trace.scale, trace.nodes)
    return None


def _merged(
    output: ir.Value, heads: int, tokens: int, dim: int
) -> tuple[ir.Value, list[ir.Node]] | None:
    """The value that holds ``output`` ([.., heads, tokens, dim]) as rows of heads."""
    wanted = np.arange(heads * tokens * dim).reshape(heads, tokens, dim).transpose(1, 0, 2)
    for value, numbers, nodes in forward(output):
        merged = heads > 1 or numbers.shape[-1] == dim
        if merged and np.array_equal(numbers.reshape(-1), wanted.reshape(-1)):
            return value, nodes
    return None


def _replace(
    model: ir.Model,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    output: ir.Value,
    scale: float,
    causal: int,
    nodes: tuple[ir.Node, ...],
) -> None:
    k, v = _share(k, v)
    heads, kv_heads = len(q.columns), len(k.columns)
    last = output.producer()
    parts = (q, k, v)
    if last is None or heads % kv_heads or k.columns.shape != v.columns.shape:
        return
    if k.tokens != v.tokens or not all(_is_whole(part) or _linear(part) for part in parts):
        return
    inputs = [_rows(model, last, part, part.scale if part is v else 1.0) for part in parts]
    replaced = [node for part in parts for node in part.nodes]
    build = Builder(model, last, dict.fromkeys([*replaced, *nodes]))
    attributes = {"heads": heads, "kv_heads": kv_heads, "scale": float(scale), "causal": causal}
    (result,) = build.node("Attention", inputs, [(1, q.tokens, q.columns.size)], attributes)
    build.replace(output, result)


def _share(k: _Heads, v: _Heads) -> tuple[_Heads, _Heads]:
    """``k`` and ``v`` without the repetition that grouped queries were exported with."""
    heads = len(k.columns)
    for repeat in range(heads, 1, -1):
        if heads % repeat == 0 and len(v.columns) == heads:
            kept = [part.columns[::repeat] for part in (k, v)]
            if all(
                (np.repeat(columns, repeat, axis=0) == part.columns).all()
                for columns, part in zip(kept, (k, v))
            ):
                return replace(k, columns=kept[0]), replace(v, columns=kept[1])
    return k, v


def _is_whole(part: _Heads) -> bool:
    """Whether ``part`` is all columns of its root, in order."""
    width = size(part.root) // part.tokens
    columns = part.columns.reshape(-1)
    return len(columns) == width and bool((columns == np.arange(width)).all())


def _linear(part: _Heads) -> ir.Node | None:
    """The Linear that makes the rows of ``part``."""
    node = part.root.producer()
    if node is not None and node.domain == DOMAIN and node.op_type == "Linear":
        return node
    return None


def _rows(model: ir.Model, at: ir.Node, part: _Heads, factor: float) -> ir.Value:
    """``part`` as [1, tokens, heads * dim]: its root, or a Linear of the columns it selects."""
    columns = part.columns.reshape(-1)
    shape = (1, part.tokens, len(columns))
    node = _linear(part)
    if node is None or (_is_whole(part) and factor == 1.0):
        whole = Builder(model, at, []).resolve(part.root, shape)
        inherit_traced(part.value, whole, part.scale)
        return whole
    build = Builder(model, at, [node])
    x, weight, bias = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    assert x is not None and weight is not None and bias is not None
    inputs = [
        x,
        build.weight(weight[columns] * factor),
        build.weight(bias[columns] * factor, "bias"),
    ]
    features = static_shape(x)
    assert features is not None
    (result,) = build.node("Linear", inputs, [(*features[:-1], len(columns))])
    inherit_traced(part.value, result, part.scale / factor)
    return build.reshape(result, shape)
