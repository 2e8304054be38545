"""Attention: the fused operator and every MatMul-Softmax-MatMul, packed projections included."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.heads import Heads, gather_rows, select_heads
from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.region import region, runner
from moeware.compiler.fuse.trace import attribute, constant, forward, is_op, operand, static_shape


def fuse_attention(model: ir.Model) -> None:
    """Replace each softmax attention without a data-dependent mask by ``Attention``.

    Forms
    -----
    Attention
        - ``Attention`` of the standard (opset 23 on), 3 or 4 axes; without mask, past or softcap
        - ``MatMul``, ``Softmax``, ``MatMul``, the scale on queries, keys, both or the scores, a
          constant causal mask or none
        - queries, keys and values from one packed Linear or from three, split in any way; keys and
          values shared by heads that are repeated; values of another size than keys
    """
    for node in list(model.graph):
        if node.graph is None:
            continue
        if is_op(node, "Attention"):
            _fuse_operator(model, node)
        elif is_op(node, "Softmax"):
            _fuse_products(model, node)


def _fuse_operator(model: ir.Model, node: ir.Node) -> None:
    output, *others = node.outputs
    if any(value.uses() or value.is_graph_output() for value in others):
        return
    if any(value is not None for value in node.inputs[4:]) or attribute(node, "softcap", 0.0):
        return
    found = []
    for index, name in enumerate(("q_num_heads", "kv_num_heads", "kv_num_heads")):
        value = operand(node, index)
        if value is None or value.const_value is not None:  # as of a learned query
            return
        found.append(select_heads(value, attribute(node, name, 0)))
    q, k, v = found
    shape = static_shape(output)
    if q is None or k is None or v is None or shape is None:
        return
    causal = _causal(node, (q.tokens, k.tokens))
    if causal is None:
        return
    dim = q.columns.shape[1]
    scale = _snap((attribute(node, "scale", 0.0) or dim**-0.5) * q.scale * k.scale, dim)
    if len(shape) == 3:
        _replace(model, q, k, v, output, scale, causal, (node,))
        return
    merged = _merged(output, len(q.columns), q.tokens, v.columns.shape[1])
    if merged is not None:
        _replace(model, q, k, v, merged[0], scale, causal, (node, *merged[1]))


def _causal(node: ir.Node, shape: tuple[int, int]) -> int | None:
    """1 where the operator's mask hides later keys, 0 where it hides none, else None."""
    mask, seen = operand(node, 3), np.ones(shape, bool)
    if mask is not None:
        array = constant(mask)
        if array is None or array.ndim < 2 or array.shape[-1] != shape[1]:
            return None
        if array.dtype != bool:
            hidden = array <= _HIDDEN
            if not (hidden | (array == 0)).all():
                return None
            array = ~hidden
        rows = np.broadcast_to(array, (*array.shape[:-2], *shape)).reshape(-1, *shape)
        if (rows != rows[:1]).any():
            return None
        seen = rows[0]
    if attribute(node, "is_causal", 0):
        seen = seen & np.tri(*shape, dtype=bool)
    for causal, wanted in enumerate((np.ones(shape, bool), np.tri(*shape, dtype=bool))):
        if (seen == wanted).all():
            return causal
    return None


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
    shape, out_shape = static_shape(scores), static_shape(weighing.outputs[0])
    if shape is None or out_shape is None:
        return
    q, k = select_heads(left, lead=shape[:-2]), select_heads(right, lead=shape[:-2], transposed=True)
    v = select_heads(values, lead=out_shape[:-2])
    if q is None or k is None or v is None:
        return
    if q.columns.shape[1] != k.columns.shape[1]:
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


# Softmax gives no weight to a score that a mask lowers by so much, whatever the model.
_HIDDEN = -1e4

_USUAL, _CLEAR = 3.0, 6.0  # deviation of scores, and of scores times their scale

_BETWEEN = (
    "Mul", "Div", "Add", "Sub", "Where", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "IsNaN",
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
    call = runner(model, {scores: np.zeros(shape, np.float32)}, [weights])
    drawn = np.random.default_rng(3).normal(size=shape).astype(np.float32)

    def weights_of(sample: np.ndarray) -> np.ndarray | None:
        results = call and call({scores: sample})
        return results[0].reshape(-1, *shape[-2:]).astype(np.float64) if results else None

    usual = weights_of(drawn * _USUAL)
    if usual is None:
        return None
    flat = drawn.reshape(usual.shape).astype(np.float64)
    # Masked or not, the last row sees every key: its log weights have the slope of the scale.
    logs = np.log(np.maximum(usual[:, -1], 1e-300))
    steps = _USUAL * (flat[:, -1] - flat[:, -1].mean(-1, keepdims=True))
    slope = (steps * logs).sum() / (steps * steps).sum() if shape[-1] > 1 else 1.0
    scale = _snap(float(slope), dim)
    # Small weights, too, which some models drop.
    spread = np.float32(min(_CLEAR / max(abs(scale), 1e-6), 1e6))
    clear = weights_of(drawn * spread)
    for causal in (0, 1):
        seen = np.tri(*shape[-2:]).astype(bool) if causal else np.ones(shape[-2:], bool)
        if clear is not None and _is_softmax(usual, flat * _USUAL * scale, seen) and _is_softmax(
            clear, flat * spread * scale, seen
        ):
            return scale, causal, nodes
    return None


def _is_softmax(weights: np.ndarray, scores: np.ndarray, seen: np.ndarray) -> bool:
    masked = np.where(seen, scores, -np.inf)
    exponents = np.exp(masked - masked.max(-1, keepdims=True))
    expected = exponents / exponents.sum(-1, keepdims=True)
    # In proportion, as each of many keys has a small weight; 1e-9 is as good as hidden.
    return np.allclose(weights, expected, rtol=1e-4, atol=1e-9)


def _snap(scale: float, dim: int) -> float:
    """The exact scale that a rounded one stands for, where it is a usual one."""
    for exact in (1.0, dim**-0.5, dim**-0.25):
        if abs(scale - exact) < 1e-4 * exact:
            return exact
    return scale


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
    q: Heads,
    k: Heads,
    v: Heads,
    output: ir.Value,
    scale: float,
    causal: int,
    nodes: tuple[ir.Node, ...],
) -> None:
    k, v = _share(k, v)
    heads, kv_heads = len(q.columns), len(k.columns)
    last = output.producer()
    if last is None or heads % kv_heads or len(v.columns) != kv_heads:
        return
    if k.tokens != v.tokens or q.columns.shape[1] != k.columns.shape[1]:
        return
    # Scores do not depend on an order of channels that queries and keys share.
    order = np.argsort(k.columns[0])
    q, k = (replace(part, columns=part.columns[:, order]) for part in (q, k))
    parts = (q, k, v)
    inputs = [
        gather_rows(model, last, part, part.scale if part is v else 1.0) for part in parts
    ]
    if None in inputs:
        return
    replaced = [node for part in parts for node in part.nodes]
    build = Builder(model, last, dict.fromkeys([*replaced, *nodes]))
    attributes = {"heads": heads, "kv_heads": kv_heads, "scale": float(scale), "causal": causal}
    shape = (1, q.tokens, heads * v.columns.shape[1])
    (result,) = build.node("Attention", inputs, [shape], attributes)
    build.replace(output, result)


def _share(k: Heads, v: Heads) -> tuple[Heads, Heads]:
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
