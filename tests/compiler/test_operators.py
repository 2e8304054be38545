"""The operators of language models: their float semantics, and as standard ONNX."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moeware.compiler.canonical import DOMAIN, PLAIN_ROUTE, verify
from moeware.compiler.errors import CompileError
from moeware.compiler.reference import evaluate
from moeware.compiler.to_onnx import to_onnx

# float32 sums of a few dozen terms of order one, in another order.
SUM = 1e-5
FRAMES = 3


def model(operator, inputs, weights, output, **attributes):
    """A canonical graph of one node; inputs and output: shapes of one frame, by name."""
    variables = [
        ir.val(name, dtype=ir.DataType.INT64 if name == "indices" else ir.DataType.FLOAT,
               shape=ir.Shape((1, *shape)))
        for name, shape in inputs.items()
    ]
    constants = []
    for name, array in weights.items():
        value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        constants.append(value)
    node = ir.node(operator, [*variables, *constants], attributes, domain=DOMAIN, name="node",
                   metadata_props={"sources": "[]"})
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape((1, *output))
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph(variables, node.outputs, nodes=[node], initializers=constants,
                     opset_imports={"": 20, DOMAIN: 1}, name="graph")
    return ir.Model(graph, ir_version=10)


def results(graph, feeds):
    """What the reference says, after holding it against ONNX Runtime on the lowered graph."""
    verify(graph)
    (found,) = evaluate(graph, feeds).values()
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    assert np.abs(session.run(None, feeds)[0] - found).max() < SUM
    return found


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2, 12])
def test_rms_norm_divides_each_group_by_its_own_root(groups):
    x, gamma = normal(FRAMES, 5, 12) * 3, normal(12, seed=1)
    found = results(model("RMSNorm", {"x": (5, 12)}, {"gamma": gamma}, (5, 12), epsilon=1e-2,
                          groups=groups), {"x": x})
    parts = x.reshape(FRAMES, 5, groups, -1).astype(np.float64)
    expected = parts / np.sqrt((parts ** 2).mean(-1, keepdims=True) + 1e-2)
    assert np.abs(found - expected.reshape(x.shape) * gamma).max() < SUM


def test_rotary_turns_pairs_as_complex_numbers():
    x, angle = normal(FRAMES, 4, 2 * 6), normal(4, 3, seed=1)
    found = results(model("Rotary", {"x": (4, 12)}, {"cos": np.cos(angle), "sin": np.sin(angle)},
                          (4, 12), heads=2), {"x": x})
    halves = x.reshape(FRAMES, 4, 2, 2, 3)
    turned = (halves[..., 0, :] + 1j * halves[..., 1, :]) * np.exp(1j * angle)[:, None]
    expected = np.stack([turned.real, turned.imag], -2).reshape(x.shape)
    assert np.abs(found - expected).max() < SUM


def test_multiply():
    a, b = normal(FRAMES, 4, 6), normal(FRAMES, 4, 6, seed=1)
    graph = model("Multiply", {"a": (4, 6), "b": (4, 6)}, {}, (4, 6))
    assert (results(graph, {"a": a, "b": b}) == a * b).all()


@pytest.mark.parametrize("experts,chosen", [(1, 1), (5, 2)])
def test_gated_experts_multiply_before_the_second_layer(experts, chosen):
    tokens, features, hidden = 4, 6, 7
    generator = np.random.default_rng(2)
    weights = {name: generator.normal(size=shape) for name, shape in {
        "w1": (experts, hidden, features), "b1": (experts, hidden),
        "w2": (experts, features, hidden), "b2": (experts, features),
        "w3": (experts, hidden, features), "b3": (experts, hidden)}.items()}
    x = normal(FRAMES, tokens, features)
    order = generator.permuted(np.tile(np.arange(experts), (FRAMES, tokens, 1)), axis=-1)
    indices, factors = order[..., :chosen], generator.random((FRAMES, tokens, chosen)).astype("f4")
    graph = model("GatedExperts",
                  {"x": (tokens, features), "indices": (tokens, chosen), "factors": (tokens, chosen)},
                  weights, (tokens, features), function="silu")
    found = results(graph, {"x": x, "indices": indices, "factors": factors})
    expected = np.zeros(x.shape)
    for place in np.ndindex(FRAMES, tokens, chosen):
        e, row = indices[place], x[place[:2]]
        gate = weights["w1"][e] @ row + weights["b1"][e]
        product = gate / (1 + np.exp(-gate)) * (weights["w3"][e] @ row + weights["b3"][e])
        expected[place[:2]] += factors[place] * (weights["w2"][e] @ product + weights["b2"][e])
    assert np.abs(found - expected).max() < 10 * SUM  # values up to ten


ROUTE = {"k": 2, "normalise": "chosen", **PLAIN_ROUTE}


def route(weights, **attributes):
    """A graph of one Route of x [5, 6], with what it chooses behind one another."""
    found = model("Route", {"x": (5, 6)}, weights, (5, attributes["k"]), **attributes)
    (node,) = found.graph
    factors = ir.val("weights", dtype=ir.DataType.FLOAT, shape=node.outputs[0].shape)
    replaced = ir.node("Route", node.inputs, attributes, domain=DOMAIN, num_outputs=2, name="node",
                       metadata_props={"sources": "[]"})
    for output, name, kind in zip(replaced.outputs, ("indices", "weights"),
                                  (ir.DataType.INT64, ir.DataType.FLOAT)):
        output.name, output.shape, output.dtype = name, factors.shape, kind
    found.graph.remove(node, safe=False)
    found.graph.append(replaced)
    found.graph.outputs[:] = replaced.outputs
    return found


def routed(graph: ir.Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, after ONNX Runtime gave the same for what the graph is lowered to."""
    indices, factors = evaluate(graph, {"x": x}).values()
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    again = session.run(None, {"x": x})
    assert (again[0] == indices).all() and np.abs(again[1] - factors).max() < SUM
    return indices, factors


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", ["chosen", "all"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("groups,chosen_groups,group_score", [
    (1, 1, "max"), (4, 2, "max"), (4, 2, "pair"), (2, 1, "pair"), (8, 3, "max")])
def test_route(score, normalise, corrected, groups, chosen_groups, group_score):
    weights = {"weight": normal(8, 6, seed=1), "bias": normal(8, seed=2),
               "correction": normal(8, seed=3) * corrected}
    attributes = ROUTE | {"score": score, "normalise": normalise, "groups": groups,
                          "chosen_groups": chosen_groups, "group_score": group_score}
    graph = route(weights, **attributes)
    verify(graph)
    x = normal(FRAMES, 5, 6)
    indices, factors = routed(graph, x)
    logits = x.astype(np.float64) @ weights["weight"].T + weights["bias"]
    for place in np.ndindex(FRAMES, 5):
        row = logits[place]
        scores = 1 / (1 + np.exp(-row)) if score == "sigmoid" else np.exp(row) / np.exp(row).sum()
        values = scores + weights["correction"]
        worth = np.sort(values.reshape(groups, -1))[:, -2 if group_score == "pair" else -1:].sum(-1)
        seen = np.isin(np.arange(8) // (8 // groups), np.argsort(-worth)[:chosen_groups])
        order = np.argsort(np.where(seen, -values, np.inf))[:2]
        assert indices[place].tolist() == order.tolist()
        expected = scores[order] / (scores[order].sum() if normalise == "chosen" else 1)
        assert np.abs(factors[place] - expected).max() < SUM


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("order", ["token", "choice", "priority"])
@pytest.mark.parametrize("score, normalise", [
    ("softmax", "chosen"), ("softmax", "all"), ("softmax", "kept"), ("sigmoid", "chosen"), ("sigmoid", "kept")])
@pytest.mark.parametrize("k, capacity", [(1, 1), (2, 1), (2, 2), (2, 4), (8, 3)])
def test_route_with_a_capacity(score, normalise, order, k, capacity, opset):
    """Place by place, on crowded experts; each frame by itself."""
    weights = {"weight": normal(8, 6, seed=1), "bias": normal(8, seed=2) + np.linspace(0, 9, 8),
               "correction": np.zeros(8)}
    free = ROUTE | {"score": score, "k": k, "normalise": "all" if normalise == "kept" else normalise}
    graph = route(weights, **free | {"normalise": normalise, "capacity": capacity, "order": order})
    graph.graph.opset_imports[""] = opset
    verify(graph)
    x = normal(FRAMES, 5, 6)
    indices, factors = routed(graph, x)
    same, expected = evaluate(route(weights, **free), {"x": x}).values()
    assert (same == indices).all()
    logits = x @ weights["weight"].T + weights["bias"]
    total = 1 if score == "sigmoid" else np.exp(logits).sum(-1, keepdims=True)
    largest = (np.exp(logits) / total).max(-1)
    dropped = 0
    for frame in range(FRAMES):
        turns = sorted(np.ndindex(5, k), key=lambda place: {
            "token": place, "choice": place[::-1],
            "priority": (place[1], -largest[frame, place[0]])}[order])
        taken = dict.fromkeys(range(8), 0)
        for place in turns:
            expert = indices[frame][place]
            if taken[expert] == capacity:
                expected[frame][place], dropped = 0, dropped + 1
            else:
                taken[expert] += 1
    if normalise == "kept":
        expected = expected / np.maximum(expected.sum(-1, keepdims=True), 1e-30)
    assert dropped and np.abs(factors - expected).max() < SUM


SPARSE = ROUTE | {"score": "sparse", "normalise": "all", "threshold": float(np.float32(0.02))}


@pytest.mark.parametrize("rows", ["apart", "near", "negative", "zero below", "zero above", "equal"])
@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_a_sparse_mixer_is_that_of_transformers(rows, jitter):
    """Logits are x itself: all of a row near the largest, all negative, with zero as the largest or
    the least, or some equal."""
    draw = np.random.default_rng(6)
    x = draw.normal(size=(FRAMES, 5, 6)) * 2
    if rows in ("near", "negative"):
        x = draw.uniform(1 - 4 * jitter, 1, x.shape) / jitter * (-1 if rows == "negative" else 1)
    elif rows == "equal":
        x = np.round(x) / 4
    elif rows != "apart":
        x = np.where(np.arange(6) == 3, 0, np.abs(x) * (1 if rows == "zero below" else -1))
    x = x.astype(np.float32)
    graph = route({"weight": np.eye(6), "bias": np.zeros(6), "correction": np.zeros(6)},
                  **SPARSE | {"threshold": float(np.float32(2 * jitter))})
    verify(graph)
    weights, experts = sparsemixer(torch.from_numpy(x), jitter_eps=jitter, training=False)
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    for indices, factors in (evaluate(graph, {"x": x}).values(), session.run(None, {"x": x})):
        assert (indices == experts.numpy()).all() and np.abs(factors - weights.numpy()).max() < SUM
    assert rows != "near" or (factors < 0.9).any()


def test_a_sparse_mixer_chooses_as_many_as_it_is_told():
    x = np.array([[[1, 1.01, -3, 1.015, 0, 0.9]] * 5], np.float32)
    for k in (1, 4, 6):
        graph = route({"weight": np.eye(6), "bias": np.zeros(6), "correction": np.zeros(6)},
                      **SPARSE | {"k": k})
        verify(graph)
        session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
        near = [[0.015, 0.005, 0], [0.01, 0], [0], [0], [0], [0]]  # distances that count
        for indices, factors in (evaluate(graph, {"x": x}).values(), session.run(None, {"x": x})):
            assert (indices == [3, 1, 0, 5, 4, 2][:k]).all()
            expected = [1 / np.exp(-np.array(each)).sum() for each in near[:k]]
            assert np.abs(factors - expected).max() < SUM


def test_equal_scores_are_chosen_by_index():
    weights = {"weight": np.zeros((8, 6)), "bias": np.zeros(8), "correction": np.zeros(8)}
    for form in ({}, {"score": "sigmoid", "groups": 4, "chosen_groups": 2, "group_score": "pair"}):
        indices, _ = evaluate(route(weights, **ROUTE | form), {"x": normal(FRAMES, 5, 6)}).values()
        assert (indices == [0, 1]).all()


@pytest.mark.parametrize("change,rule", [
    ({"groups": 3}, "groups divides"), ({"groups": 4, "chosen_groups": 5}, "chosen_groups is"),
    ({"k": 5, "groups": 4, "chosen_groups": 2}, "k is between"), ({"score": "relu"}, "score is one of"),
    ({"groups": 8, "chosen_groups": 2, "group_score": "pair"}, "pair"),
    ({"group_score": "mean"}, "group_score is one of"), ({"threshold": 0.5}, "0 unless score"),
    (SPARSE | {"threshold": 2.0}, "below 2"), (SPARSE | {"threshold": -0.5}, "at least 0"),
    (SPARSE | {"groups": 4, "chosen_groups": 2}, "no groups"),
    (SPARSE | {"normalise": "chosen"}, "sparse normalises all"),
    (SPARSE | {"capacity": 1}, "sparse has no capacity"), ({"capacity": 5}, "less than the tokens"),
    ({"capacity": -1}, "less than the tokens"), ({"normalise": "kept"}, "with a capacity, kept"),
    ({"order": "choice"}, "without a capacity"), ({"capacity": 1, "order": "last"}, "order is one of")])
def test_verifier_refuses_routes(change, rule):
    weights = {"weight": normal(8, 6), "bias": normal(8), "correction": normal(8)}
    with pytest.raises(CompileError, match=rule):
        verify(route(weights, **ROUTE | change))


@pytest.mark.parametrize("operator,inputs,weights,attributes,rule", [
    ("RMSNorm", {"x": (4, 6)}, {"gamma": normal(6)}, {"epsilon": 1e-5, "groups": 4}, "groups divides"),
    ("Rotary", {"x": (4, 6)}, {"cos": normal(4, 3), "sin": normal(4, 3)}, {"heads": 2}, "pairs"),
    ("Rotary", {"x": (4, 8)}, {"cos": normal(3, 2), "sin": normal(3, 2)}, {"heads": 2}, "cos and sin"),
    ("Multiply", {"a": (4, 6), "b": (3, 6)}, {}, {}, "one shape"),
])
def test_verifier_refuses(operator, inputs, weights, attributes, rule):
    output = next(iter(inputs.values()))
    with pytest.raises(CompileError, match=rule):
        verify(model(operator, inputs, weights, output, **attributes))
