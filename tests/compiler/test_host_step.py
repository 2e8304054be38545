"""Host steps compute what the model's file says, whatever its names and attributes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import moeware
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.to_onnx import to_onnx
from moeware.hw.arch.program import HostStep
from moeware.runtime.session import Session

from .ordeal import CONFIG
from .test_damage import write

SHAPE = (3, 4)


def node(name, operator, *inputs, **attributes):
    """A node whose name is that of its result."""
    return helper.make_node(operator, inputs, [name], name=name, **attributes)


def check(path, nodes, constants, frames=3):
    """Compile a valid model from ``x`` to ``y`` to host steps alone; they give its results."""
    path = write(path, nodes, constants, shape=("batch", *SHAPE), result=("batch", *SHAPE))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    x = np.random.default_rng(0).normal(size=(frames, *SHAPE)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path.read_bytes(), options)
    wanted = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(frames)])
    program = moeware.compile(path, CONFIG, {"x": x})
    assert all(isinstance(step, HostStep) for step in program.steps)
    (found,) = Session(program, "torch").run(None, {"x": x})
    lowered = onnxruntime.InferenceSession(to_onnx(fuse(load(path))).SerializeToString(), options)
    for result in (found, lowered.run(None, {"x": x})[0]):
        # Both are float32 by the same kernels, in another order at most.
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


FORMS = {
    "an epsilon of zero": [node("y", "LayerNormalization", "x", "gamma", axis=-1, epsilon=0.0)],
    "the mean of an axis that is none": [
        node("mean", "ReduceMean", "x", "none", keepdims=1),
        node("y", "Sub", "mean", "x"),
    ],
    # ONNX Runtime fuses these to a norm over the last axis.
    "a norm of a sum over two axes": [
        node("sum", "Add", "x", "x"),
        node("y", "LayerNormalization", "sum", "gamma", axis=1),
    ],
    "between other nodes": [
        node("sine", "Sin", "x"),
        node("sum", "Add", "x", "sine"),
        node("norm", "LayerNormalization", "sum", "gamma", axis=-2),
        node("y", "Cos", "norm"),
    ],
    "a norm over all axes": [
        node("sum", "Add", "x", "x"),
        node("y", "LayerNormalization", "sum", "gamma", axis=0),
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_unusual_attributes_compute_what_they_say(tmp_path, name):
    """No rule takes them for what it knows, and no fusion on the host either."""
    constants = {"gamma": np.array([1, 2, 3, 4], np.float32), "none": np.zeros(0, np.int64)}
    check(tmp_path / "m.onnx", FORMS[name], constants)


def products(count):
    """``count`` Linears between plain nodes, and their weights."""
    draw = np.random.default_rng(1)
    names = [f"product{number}" for number in range(count)]
    nodes = [node("sine", "Sin", "x")]
    for before, name in zip(["sine", *names], names):
        nodes.append(node(name, "MatMul", before, f"{name}_weight"))
    nodes.append(node("y", "Cos", names[-1]))
    return nodes, {f"{name}_weight": draw.normal(size=(4, 4)).astype(np.float32) for name in names}


@pytest.mark.parametrize("count", [1, 3, 6])
def test_constants_of_a_host_step_are_apart(tmp_path, count):
    """A Linear on the host has its weight twice, and one of them goes before the frames' axis comes."""
    check(tmp_path / "m.onnx", *products(count))


# Names that the lowering itself would give.
NAMES = ["constant", *(f"constant/{number}" for number in range(8)), "lowered", "lowered/1",
         "lowered/2", "x/frame", "y/frame", "x/inner", "y/inner"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_constants_and_values_of_a_model_keep_theirs(tmp_path, name):
    nodes, constants = products(2)
    last = nodes.pop()
    bound = np.array([-0.5, 0.5, 0, 1], np.float32)
    as_constant = [node("most", "Max", last.input[0], name), node("y", "Cos", "most")]
    check(tmp_path / "m.onnx", [*nodes, *as_constant], constants | {name: bound})
    as_value = [node(name, "Max", last.input[0], "bound"), node("y", "Cos", name)]
    check(tmp_path / "m.onnx", [*nodes, *as_value], constants | {"bound": bound})
