"""Functions are looked for near their cores, however many there are behind one another."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from moeware.compiler.fuse import fuse, pointwise
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from tests.compiler.exports import export_module, run_onnx


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
    plain = pointwise.runner
    monkeypatch.setattr(pointwise, "runner", lambda *arguments: runs.append(1) or plain(*arguments))
    model = fuse(load(path))
    assert len(runs) <= 2 * 40
    assert sum(node.op_type == "Pointwise" for node in model.graph) == 40
    x = np.random.default_rng(1).normal(size=(1, 5, 4)).astype(np.float32)
    (found,), (wanted,) = evaluate(model, {"v0": x}).values(), run_onnx(path, v0=x)
    assert np.abs(found - wanted).max() < 1e-6  # float32 of two libraries


def found_in(tmp_path, function, shape):
    """The function that `function` of a Linear is read as, or None; ``shape``: of its argument."""
    class Applied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, shape[-1])

        def forward(self, x):
            return function(self.linear(x))

    path = export_module(Applied(), (torch.ones(*shape[:-1], 4),), tmp_path / "m.onnx", 17, False)
    nodes = [node for node in fuse(load(path)).graph if node.op_type == "Pointwise"]
    return nodes[0].attributes["function"].value if nodes else None


WRITTEN = {
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "relu": lambda x: x.clamp(min=0),
    "hard_swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 11, 97)], ids=["few", "many"])
def test_written_out(tmp_path, name, shape):
    assert found_in(tmp_path, WRITTEN[name], shape) == name


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 11, 97)], ids=["few", "many"])
@pytest.mark.parametrize("limit", [6, 50])
def test_a_function_with_a_limit_is_another(tmp_path, limit, shape):
    assert found_in(tmp_path, lambda x: x.clamp(0, limit), shape) is None
