"""The operators of language models: their float semantics, and as standard ONNX."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moeware.compiler.canonical import DOMAIN, verify
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
