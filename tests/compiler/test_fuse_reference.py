"""What the reference evaluator records, and what it refuses."""

import numpy as np
import pytest

from moeware.compiler.canonical import verify
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from tests.compiler import exports


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "m.onnx"
    built = exports.vit(mixer=exports.Moe("gather"))
    return fuse(load(exports.export(built, path, opset=17, dynamo=False)))

# Sums of float32 of order one, taken in another order: a few units of 2**-23 for each addition.
SUM = 1e-5


def test_records_experts_with_their_rows(model):
    record = {}
    image = exports.example(3)
    outputs = evaluate(model, {"image": image}, record.__setitem__)
    assert outputs["logits"].shape == (3, exports.CLASSES)
    assert (record["logits"] == outputs["logits"]).all()
    indices, weights = record["Route_0.indices"], record["Route_0.weights"]
    logits = record["Route_0/logits"]
    assert (np.sort(indices) == np.sort(np.argsort(-logits)[..., : exports.TOP_K])).all()
    assert np.allclose(weights.sum(-1), 1, atol=SUM)
    total = np.zeros((3 * 7, exports.DIM), np.float32)
    for expert in range(exports.EXPERTS):
        rows = record.get(f"Experts_0/expert{expert}/rows", np.zeros(0, np.int64))
        assert set(rows) == set(np.nonzero((indices == expert).any(-1).reshape(-1))[0])
        if not len(rows):
            continue
        assert record[f"Experts_0/expert{expert}/hidden"].shape == (len(rows), exports.HIDDEN)
        assert record[f"Experts_0/expert{expert}/activation"].shape == (len(rows), exports.HIDDEN)
        factor = (weights * (indices == expert)).sum(-1).reshape(-1)[rows]
        total[rows] += factor[:, None] * record[f"Experts_0/expert{expert}/output"]
    assert (total == record["Experts_0"].reshape(total.shape)).all()


def test_frames_are_independent(model):
    image = exports.example(4)
    together = evaluate(model, {"image": image})["logits"]
    single = [evaluate(model, {"image": image[i : i + 1]})["logits"] for i in range(4)]
    assert np.allclose(together, np.concatenate(single), atol=SUM)


@pytest.mark.parametrize("feeds", [{}, {"image": np.zeros((1, 3, 8, 11), np.float32)}])
def test_refuses_wrong_feeds(model, feeds):
    with pytest.raises(CompileError, match="'image' must have shape"):
        evaluate(model, feeds)


def test_verifier_names_node_and_rule(model):
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    heads = attention.attributes["heads"]
    try:
        attention.attributes["heads"] = type(heads)("heads", heads.type, 3)
        with pytest.raises(CompileError, match="Attention_0.*kv_heads divides heads"):
            verify(model)
    finally:
        attention.attributes["heads"] = heads
    verify(model)


def test_a_number_stays_one(tmp_path):
    """An index without axes takes one away; as a list of one it would leave an axis of 1."""
    (tmp_path / "m.onnxtxt").write_text("""<ir_version: 8, opset_import: ["" : 17]>
        model (float[1, 4, 3] x) => (float[1, 3] y)
        <int64 second = {1}> { y = Gather <axis: int = 1> (x, second) }""")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    model = load(tmp_path / "m.onnxtxt")
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], x[:, 1])
