"""Route and Experts: the mixture-of-experts layer, in whatever form it was exported.

Seed: a TopK on router logits. Region: everything between (x, logits) and the first value of x's
size through which every result of the routing passes. The products with constants inside the
region name the expert weights (`moe_weights`); running the region on random x and logits and
comparing with the canonical form proves or rejects the proposal, so the loop over experts, the
one-hot combination and the gather of stacked weights need no pattern each.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.linear import LinearMatch, match_linear
from moeware.compiler.fuse.moe_weights import ExpertWeights, propose_weights
from moeware.compiler.fuse.rebuild import Builder, flat_root
from moeware.compiler.fuse.region import inputs_of, region, run
from moeware.compiler.fuse.trace import attribute, constant, is_op, operand, size, static_shape
from moeware.compiler.operators import FUNCTIONS

_NORMALISATIONS = ("chosen", "all")
# Relative difference that separates the rounding of float32 from another function.
TOLERANCE = 2e-4


def fuse_moe(model: ir.Model) -> None:
    """Replace each proven mixture of experts by ``Route`` and ``Experts``.

    Forms
    -----
    Route
        - ``TopK`` of a linear gate's logits, of their ``Softmax``, or a ``Softmax`` of the chosen;
          weights divided by their sum or not
    Experts
        - a loop over the experts with a mask weight (``Equal``, ``Cast`` or ``Where``, ``Mul``)
        - a loop with ``NonZero``, ``GatherND`` and an addition by ``ScatterND`` (index_add)
        - one-hot or scattered weights and ``Einsum`` or ``MatMul`` over stacked experts
        - a ``Gather`` of each token's stacked weights, then ``MatMul`` or ``Einsum``
        - all experts on all tokens, and a ``GatherElements`` of the chosen results
    """
    for node in list(model.graph):
        if node.graph is not None and is_op(node, "TopK"):
            _fuse(model, node)


def refuse_baked_counts(model: ir.Model) -> None:
    """Refuse a Split with constant sizes of tokens that were sorted by expert.

    Tracing ``x.split(counts.tolist())`` records the counts of the example input; the graph is
    silently wrong for every other input.
    """
    for router in model.graph:
        if not is_op(router, "TopK") or len(router.outputs) < 2:
            continue
        after_router = _descendants(router.outputs[1])
        for sort in after_router:
            if not is_op(sort, "TopK") or sort is router or _shape_of_k(sort) < 2:
                continue
            for node in _descendants(sort.outputs[1]):
                sizes = constant(operand(node, 1)) if is_op(node, "Split") else None
                if sizes is not None and attribute(node, "axis", 0) == 0:
                    raise CompileError(
                        f"Node {node.name!r} must not split sorted tokens into the constant sizes "
                        f"{sizes.tolist()}: they are the expert counts of the example input and "
                        f"wrong for any other; export the experts as a loop with a mask weight, "
                        f"as an einsum over stacked weights or as a gather of them"
                    )


def _shape_of_k(node: ir.Node) -> int:
    shape = static_shape(node.outputs[0])
    return shape[-1] if shape else 2


def _descendants(value: ir.Value) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    stack = [value]
    while stack:
        for node in stack.pop().consumers():
            if node not in found:
                found[node] = None
                stack += node.outputs
    return list(found)


def _fuse(model: ir.Model, top_k: ir.Node) -> None:
    found = _router(top_k)
    if found is None:
        return
    logits, router = found
    features = router.weight.shape[1]
    k = constant(operand(top_k, 1))
    shape = static_shape(flat_root(router.x))
    if k is None or k.size != 1 or shape is None or attribute(top_k, "largest", 1) != 1:
        return
    x_size = size(router.x)
    if x_size <= 0 or x_size % features:
        return
    tokens = x_size // features
    for y in cuts(model, logits):
        if size(y) not in (x_size, -1) or y is logits:
            continue
        for x in _expert_inputs(router.x, y, logits, x_size):
            proof = _prove(model, x, logits, y, router, int(k.reshape(())), tokens)
            if proof is not None:
                _replace(model, x, y, router, int(k.reshape(())), tokens, proof)
                return


def _router(top_k: ir.Node) -> tuple[ir.Value, LinearMatch] | None:
    """The logits behind ``top_k`` and the linear map that makes them."""
    value = top_k.inputs[0]
    for _ in range(6):
        if value is None or value.producer() is None:
            return None
        router = match_linear(value)
        if router is not None:
            return value, router
        node = value.producer()
        if not is_op(node, "Softmax", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"):
            return None
        assert node is not None
        value = node.inputs[0]
    return None


def cuts(model: ir.Model, start: ir.Value) -> Iterator[ir.Value]:
    """Values through which every path from ``start`` passes, nearest first."""
    order = {node: number for number, node in enumerate(model.graph)}
    open_uses = {start: len(start.uses())}
    nodes = sorted(_descendants(start), key=lambda node: order.get(node, -1))
    for node in nodes:
        if node not in order:  # inside a subgraph: its owner stands for it
            continue
        for value in inputs_of(node):
            if value in open_uses:
                open_uses[value] -= sum(1 for read in node.inputs if read is value) or 1
                if open_uses[value] <= 0:
                    del open_uses[value]
        for output in node.outputs:
            if output.uses() or output.is_graph_output():
                open_uses[output] = len(output.uses()) or 1
        if len(open_uses) == 1 and len(node.outputs) == 1 and node.outputs[0] in open_uses:
            yield node.outputs[0]


def _expert_inputs(
    router_x: ir.Value, y: ir.Value, logits: ir.Value, x_size: int
) -> Iterator[ir.Value]:
    """Values of x's size that close the region together with the logits; the router's x first."""
    root = flat_root(router_x)
    if not region([y], [root, logits])[1]:
        yield root
        return
    nodes, _ = region([y], [logits])
    candidates = [value for node in nodes for value in node.outputs if size(value) == x_size]
    for value in reversed(candidates):
        if value is not y and not region([y], [value, logits])[1]:
            yield value
            return


class _Proof:
    """What a proposal that computes the region's values consists of."""

    def __init__(self, weights: ExpertWeights, function: str, normalise: str, nodes: list):
        self.weights, self.function, self.normalise = weights, function, normalise
        self.nodes = nodes


def _prove(
    model: ir.Model,
    x: ir.Value,
    logits: ir.Value,
    y: ir.Value,
    router: LinearMatch,
    k: int,
    tokens: int,
) -> _Proof | None:
    inside = set(region([y], [x, logits])[0])
    nodes = [node for node in model.graph if node in inside]
    experts, features = router.weight.shape
    generator = np.random.default_rng(7)
    sample = generator.normal(size=static_shape(x)).astype(np.float32)
    scores = generator.normal(size=static_shape(logits)).astype(np.float32) * 2
    proposals = list(propose_weights(nodes, x, experts, features))
    if not proposals:
        return None
    results = run(model, {x: sample, logits: scores}, [y])
    if results is None or results[0].size != sample.size:
        return None
    expected = results[0].reshape(tokens, features)
    scale = np.abs(expected).max() + 1e-30
    rows = sample.reshape(tokens, features)
    combine = {name: _combine(scores.reshape(tokens, experts), k, name) for name in _NORMALISATIONS}
    for weights in proposals:
        for function in FUNCTIONS:
            each = _run_experts(rows, weights, function)
            for normalise, factors in combine.items():
                value = np.einsum("te,etd->td", factors, each)
                if np.abs(value - expected).max() < TOLERANCE * scale:
                    return _Proof(weights, function, normalise, nodes)
    return None


def _combine(scores: np.ndarray, k: int, normalise: str) -> np.ndarray:
    """Weight of each expert for each token, ``[tokens, experts]``; 0 where it is not chosen."""
    scores = scores.astype(np.float64)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    weights = exponents / exponents.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1, kind="stable")
    np.put_along_axis(weights, order[:, k:], 0.0, axis=-1)
    return weights / weights.sum(-1, keepdims=True) if normalise == "chosen" else weights


def _run_experts(rows: np.ndarray, weights: ExpertWeights, function: str) -> np.ndarray:
    """Every expert on every row, ``[experts, tokens, features]``."""
    w1, b1, w2, b2 = (
        torch.from_numpy(np.array(array))
        for array in (weights.w1, weights.b1, weights.w2, weights.b2)
    )
    hidden = torch.einsum("td,ehd->eth", torch.from_numpy(rows), w1) + b1[:, None]
    output = torch.einsum("eth,edh->etd", FUNCTIONS[function](hidden), w2) + b2[:, None]
    return output.numpy().astype(np.float64)


def _replace(
    model: ir.Model,
    x: ir.Value,
    y: ir.Value,
    router: LinearMatch,
    k: int,
    tokens: int,
    proof: _Proof,
) -> None:
    last = y.producer()
    assert last is not None
    features = router.weight.shape[1]
    shape, chosen = (1, tokens, features), (1, tokens, k)
    weights = proof.weights
    after_route = _descendants(router.nodes[-1].outputs[0])
    routing = [node for node in proof.nodes if node in after_route and _is_routing(node)]
    build = Builder(model, last, [*router.nodes, *routing])
    inputs = [
        build.resolve(router.x, shape),
        build.weight(router.weight),
        build.weight(router.bias, "bias"),
    ]
    indices, factors = build.node(
        "Route",
        inputs,
        [chosen, chosen],
        {"k": k, "normalise": proof.normalise},
        [ir.DataType.INT64, ir.DataType.FLOAT],
    )
    build = Builder(model, last, [node for node in proof.nodes if node not in routing])
    inputs = [build.resolve(x, shape), indices, factors]
    inputs += [build.weight(getattr(weights, name), name) for name in ("w1", "b1", "w2", "b2")]
    (result,) = build.node("Experts", inputs, [shape], {"function": proof.function})
    build.replace(y, result)


def _is_routing(node: ir.Node) -> bool:
    """Whether ``node`` works on scores alone; the rest of the region belongs to Experts."""
    return is_op(node, "Softmax", "TopK", "ReduceSum", "Div", "Clip")
