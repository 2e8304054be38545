"""Route and Experts: the mixture-of-experts layer, in whatever form it was exported.

Seed: a TopK or ArgMax on router logits. Region: everything between (x, logits) and the first value
of x's size through which every result of the routing passes. The products with constants inside the
region name the expert weights (`moe_weights`); running the region and comparing with the canonical
form proves or rejects the proposal (`moe_proof`), so the loop over experts, the one-hot combination
and the gather of stacked weights need no pattern each.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import REASON
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.linear import LinearMatch, match_linear
from moeware.compiler.fuse.moe_proof import Proof, prove
from moeware.compiler.fuse.rebuild import Builder, flat_root
from moeware.compiler.fuse.region import inputs_of, region
from moeware.compiler.fuse.routers import (
    CHOICES,
    RouterForm,
    match_router,
    plain_forms,
    router_logits,
)
from moeware.compiler.fuse.trace import (
    LAYOUT,
    attribute,
    constant,
    is_op,
    operand,
    size,
    static_shape,
)

_NO_ROUTER = (
    "a router that chooses otherwise than by softmax or sigmoid of one linear gate, corrected by "
    "constants or limited to the best groups, or as a sparse mixer does, is not supported; route by "
    "softmax and top-k"
)
_NO_EXPERTS = (
    "what follows this choice computes no weighted sum of two-layer or gated experts; write them with "
    "one known function, weighted by the softmax without bounds or thresholds"
)
_OTHER_TOKENS = (
    "the router of this choice reads what no experts read, where it must be a linear map of their "
    "tokens; route by one Linear of these, without layers, norms or pooling of its own"
)
_OVERWRITTEN = (
    "ScatterElements overwrites the results of tokens with several experts (the TorchScript exporter "
    "writes index_add so, which is silently wrong); export with dynamo=True"
)


def fuse_moe(model: ir.Model) -> None:
    """Replace each proven mixture of experts by ``Route`` and ``Experts`` or ``GatedExperts``.

    Forms
    -----
    Route
        - ``TopK`` of a linear gate's logits, of their ``Softmax``, or a ``Softmax`` of the chosen;
          weights divided by their sum or not
        - one ``TopK`` or ``ArgMax`` after another, of what is left (GShard)
        - a limited number of tokens for each expert, places counted by ``CumSum`` or a product, token
          by token (Switch Transformer), or the first choices of all before any second one (GShard,
          V-MoE)
        - ``TopK`` of their ``Sigmoid``, with a constant added for the choice or not
        - ``TopK`` among the experts of the best groups, a group's score being its largest, or the sum
          of its two largest (DeepSeek-V2, -V3)
        - ``ArgMax`` of the logits, and again of those left, each weighted by a ``Softmax`` over those
          within a proportion of it (sparse mixer: Phi-3.5-MoE)
    Experts, GatedExperts
        - a loop over the experts with a mask weight (``Equal``, ``Cast`` or ``Where``, ``Mul``)
        - a loop with ``NonZero``, ``GatherND`` and an addition by ``ScatterND`` (index_add)
        - one-hot or scattered weights and ``Einsum`` or ``MatMul`` over stacked experts
        - a ``Gather`` of each token's stacked weights, of all choices or one by one, then ``MatMul``
          or ``Einsum``
        - all experts on all tokens, and a ``GatherElements`` of the chosen results
        - tokens brought to the places of experts and back, by ``Einsum`` with one-hot tensors, or by
          ``ScatterND`` and ``Gather`` (expert capacity)
    """
    for node in list(model.graph):
        reason = _fuse(model, node) if is_op(node, *CHOICES) and _decides(node) else None
        if reason is not None:
            node.metadata_props[REASON] = reason


def refuse_baked_counts(model: ir.Model) -> None:
    """Refuse a Split with constant sizes of tokens that were sorted by expert.

    Tracing ``x.split(counts.tolist())`` records the counts of the example input; the graph is
    silently wrong for every other input.
    """
    after_routers = {
        node
        for router in model.graph
        if is_op(router, "TopK") and len(router.outputs) > 1
        for node in _descendants(router.outputs[1])
    }
    for sort in model.graph:
        shape = sort.outputs[0].shape
        # One list of all choices is sorted; the next block's router looks at each token by itself.
        if not is_op(sort, "TopK") or sort not in after_routers or shape is None or len(shape) != 1:
            continue
        for node in _descendants(sort.outputs[1]):
            sizes = constant(operand(node, 1)) if is_op(node, "Split") else None
            if sizes is None or attribute(node, "axis", 0) != 0:
                continue
            # They are the rows of all frames of the example.
            if isinstance(shape[0], int) and sizes.sum() % shape[0]:
                continue
            raise CompileError(
                f"Node {node.name!r} must not split sorted tokens into the constant sizes "
                f"{sizes.tolist()}: they are the expert counts of the example input and "
                f"wrong for any other; export the experts as a loop with a mask weight, "
                f"as an einsum over stacked weights or as a gather of them"
            )


def _descendants(value: ir.Value) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    stack = [value]
    while stack:
        for node in stack.pop().consumers():
            if node not in found:
                found[node] = None
                stack += node.outputs
    return list(found)


def _decides(choice: ir.Node) -> bool:
    """Whether ``choice`` may choose among products: those that an output of the graph depends on, as no
    longer on those of a replaced region."""
    after = [each for value in choice.outputs for each in _descendants(value)]
    return any(value.is_graph_output() for each in after for value in each.outputs) and (
        is_op(choice, "TopK") or any(is_op(each, "MatMul", "Gemm", "Einsum") for each in after))


def _no_experts(choice: ir.Node, router: LinearMatch) -> str:
    """Why what follows the choice of a router was proven to be no mixture."""
    if any(map(_overwrites, _descendants(choice.outputs[-1]))):
        return _OVERWRITTEN
    return _NO_EXPERTS if _has_other_products(router) else _OTHER_TOKENS


def _has_other_products(router: LinearMatch) -> bool:
    """Whether another product than the router's is of what it reads."""
    values = [flat_root(router.x)]
    for value in values:
        for node in value.consumers():
            if is_op(node, *LAYOUT, "ScatterND", "ScatterElements"):
                values += node.outputs
            elif is_op(node, "MatMul", "Gemm", "Einsum") and node not in router.nodes:
                return True
    return False


def _overwrites(node: ir.Node) -> bool:
    """Whether ``node`` writes several rows to one place, of which the last remains."""
    rows = constant(operand(node, 1)) if is_op(node, "ScatterElements") else None
    if rows is None or rows.ndim != 2 or attribute(node, "reduction", "none") != "none":
        return False
    return attribute(node, "axis", 0) == 0 and len(np.unique(rows[:, 0])) < len(rows)


def _fuse(model: ir.Model, choice: ir.Node) -> str | None:
    """Replace the mixture behind ``choice``; why it was proven to be none, if it is a router's."""
    found = _router(choice) if is_op(choice, "TopK") else None
    k = constant(operand(choice, 1))
    if is_op(choice, "TopK") and (k is None or k.size != 1 or attribute(choice, "largest", 1) != 1):
        return _NO_ROUTER if found is None else _no_experts(choice, found[1])
    if found is not None and k is not None:
        logits, layer = found
        forms = plain_forms(len(layer.weight), int(k.reshape(())))
        if _fuse_routed(model, logits, layer, forms):
            return None
    match, linear = match_router(model, choice), router_logits(choice)
    if match is None and found is None:
        # The largest alone, or the first of several that weights and places follow from together.
        if is_op(choice, "ArgMax") and linear is not None and _fuse_routed(
            model, *linear, plain_forms(len(linear[1].weight), 1)
        ):
            return None
        return _NO_ROUTER if is_op(choice, "TopK") or linear is not None else None
    if match is None or not _fuse_routed(model, match.logits, match.layer, [match.form]):
        return _no_experts(choice, match.layer if match is not None else found[1])
    return None


def _fuse_routed(
    model: ir.Model, logits: ir.Value, router: LinearMatch, forms: Sequence[RouterForm]
) -> bool:
    """Replace the mixture that ``logits`` decide by one of ``forms``; whether one was proven."""
    features = router.weight.shape[1]
    if static_shape(router.x) is None:
        return False
    x_size = size(router.x)
    if x_size <= 0 or x_size % features:
        return False
    tokens = x_size // features
    for y in cuts(model, logits):
        if size(y) not in (x_size, -1) or y is logits:
            continue
        for x in _expert_inputs(router.x, y, logits, x_size):
            proof = prove(model, x, logits, y, features, forms)
            if proof is not None:
                replace_moe(model, x, y, router, tokens, proof)
                return True
    return False


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


def replace_moe(
    model: ir.Model,
    x: ir.Value,
    y: ir.Value,
    router: LinearMatch,
    tokens: int,
    proof: Proof,
) -> None:
    """Put Route and Experts in the place of the region that ends in ``y``."""
    last = y.producer()
    assert last is not None
    features = router.weight.shape[1]
    shape, chosen = (1, tokens, features), (1, tokens, proof.router.attributes["k"])
    weights = proof.weights
    after_route = _descendants(router.nodes[-1].outputs[0])
    routing = [node for node in proof.nodes if node in after_route and _is_routing(node)]
    build = Builder(model, last, [*router.nodes, *routing])
    inputs = [
        build.resolve(router.x, shape),
        build.weight(router.weight),
        build.weight(router.bias, "bias"),
        build.weight(proof.router.correction, "correction"),
    ]
    indices, factors = build.node(
        "Route",
        inputs,
        [chosen, chosen],
        proof.router.attributes,
        [ir.DataType.INT64, ir.DataType.FLOAT],
    )
    build = Builder(model, last, [node for node in proof.nodes if node not in routing])
    inputs = [build.resolve(x, shape), indices, factors]
    names = ("w1", "b1", "w2", "b2") if weights.w3 is None else ("w1", "b1", "w2", "b2", "w3", "b3")
    inputs += [build.weight(getattr(weights, name), name) for name in names]
    operator = "Experts" if weights.w3 is None else "GatedExperts"
    (result,) = build.node(operator, inputs, [shape], {"function": proof.function})
    build.replace(y, result)


def _is_routing(node: ir.Node) -> bool:
    """Whether ``node`` works on scores alone; the rest of the region belongs to Experts."""
    return is_op(node, "Softmax", "TopK", "ArgMax", "ReduceMax", "ReduceSum", "Div", "Clip")
