"""Functions are looked for near their cores, however many there are behind one another."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from moeware.compiler.fuse import fuse, pointwise
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from tests.compiler.exports import run_onnx


def chain(path, length):
    """``length`` times a sigmoid of the negative, of [1, 5, 4]."""
    operators = ("Neg", "Sigmoid") * length
    nodes = [helper.make_node(operator, [f"v{place}"], [f"v{place + 1}"], name=f"n{place}")
             for place, operator in enumerate(operators)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5, 4])
            for name in ("v0", f"v{len(operators)}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_each_core_is_tried_with_its_neighbours_alone(tmp_path, monkeypatch):
    path, runs = chain(tmp_path / "m.onnx", 40), []
    plain = pointwise.run
    monkeypatch.setattr(pointwise, "run", lambda *arguments: runs.append(1) or plain(*arguments))
    model = fuse(load(path))
    assert len(runs) <= 2 * 40
    assert sum(node.op_type == "Pointwise" for node in model.graph) == 40
    x = np.random.default_rng(1).normal(size=(1, 5, 4)).astype(np.float32)
    (found,), (wanted,) = evaluate(model, {"v0": x}).values(), run_onnx(path, v0=x)
    assert np.abs(found - wanted).max() < 1e-6  # float32 of two libraries
