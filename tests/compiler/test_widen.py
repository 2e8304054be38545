"""Files in half precision are read as the same weights in float32."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.reference import evaluate
from moeware.runtime.session import Session
from tests.compiler import language_models
from tests.compiler.exports import Moe, example, export_module, run_onnx, vit
from tests.compiler.test_models import EVEN

HALVES = (torch.float16, torch.bfloat16)
ROUNDING = 1e-5  # of float32 sums in another order, relative to the largest value
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def types_in(model) -> set[str]:
    return {value.dtype.name for node in model.graph for value in (*node.inputs, *node.outputs) if value}


@pytest.mark.parametrize("dtype, dynamo, opset", [
    (torch.float16, True, 20), (torch.float16, False, 17), (torch.bfloat16, True, 23)])
def test_a_vit_of_half_precision_compiles(tmp_path, dtype, dynamo, opset):
    model = vit(mixer=Moe()).to(dtype)
    path = export_module(model, (torch.from_numpy(example()).to(dtype),), tmp_path / "m.onnx", opset,
                         dynamo, input_names=["image"])
    canonical = fuse(load(path))
    assert not types_in(canonical) & {"FLOAT16", "BFLOAT16"}
    assert not any(part.kind == "host" for part in partition(canonical).steps)
    images = example(3, 1)
    with torch.no_grad():
        wanted = copy.deepcopy(model).float()(torch.from_numpy(images)).numpy()
    found, = evaluate(canonical, {"image": images}).values()
    assert np.abs(found - wanted).max() <= ROUNDING * np.abs(wanted).max()

    program = compile_model(path, EVEN, {"image": example(16, 2).astype(np.float16)})
    session = Session(program, "torch")
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    answer, = session.run(None, {"image": images})
    assert np.abs(answer - wanted).max() < 0.1 * np.abs(wanted).max()  # of 8 bits


@pytest.mark.parametrize("name, dtype, opset", [
    ("olmoe", torch.bfloat16, 20), ("phi-moe", torch.float16, 24)])
def test_a_language_model_of_half_precision_is_read(tmp_path, name, dtype, opset):
    """As checkpoints are; transformers computes norms, routers and softmax in float32 all the same.
    The exporter folds cosines and sines to half precision, which the module in float32 does not have."""
    model = language_models.build(name).to(dtype)
    canonical = fuse(load(language_models.export(model, tmp_path / "m.onnx", opset)))
    ids = np.random.default_rng(2).integers(0, language_models.VOCABULARY, (1, 9))
    with torch.no_grad():
        wanted = model.float()(torch.from_numpy(ids)).numpy()
    found, = evaluate(canonical, {"ids": ids}).values()
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= torch.finfo(dtype).eps * np.abs(wanted).max()
    host = [node for part in partition(canonical).steps if part.kind == "host" for node in part.nodes]
    assert [node.op_type for node in host] == ["Gather"]


def write(path, nodes, constants, half):
    graph = helper.make_graph(
        nodes, "half", [helper.make_tensor_value_info("x", half, [1, 3, 4])],
        [helper.make_tensor_value_info("y", half, [1, 3, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize("half", HALF)
def test_every_place_of_a_type_is_found(tmp_path, half):
    """Casts there and back, constants in attributes, a branch with constants of its own."""
    one = helper.make_tensor("one", half, [1], [1.0])
    branches = {
        name: helper.make_graph(
            [helper.make_node("Constant", [], [f"{name}_k"], value=helper.make_tensor("k", half, [], [k])),
             helper.make_node("Mul", ["b", f"{name}_k"], [f"{name}_y"])],
            name, [], [helper.make_tensor_value_info(f"{name}_y", half, [1, 3, 4])])
        for name, k in (("then_branch", 2.0), ("else_branch", 3.0))}
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Exp", ["f"], ["e"]),
        helper.make_node("CastLike", ["e", "x"], ["h"]),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["ones"], value=one),
        helper.make_node("Add", ["h", "ones"], ["a"]),
        helper.make_node("Cast", ["c"], ["d"], to=half),
        helper.make_node("Mul", ["a", "d"], ["b"]),
        helper.make_node("ReduceSum", ["f"], ["t"], keepdims=0),
        helper.make_node("Greater", ["t", "zero"], ["p"]),
        helper.make_node("If", ["p"], ["y"], **branches),
    ]
    c = np.array([1, -2, 3, -4], np.float32)
    path = write(tmp_path / "m.onnx", nodes, {"c": c, "zero": np.float32(0)}, half)
    model = load(path)
    assert not types_in(model) & {"FLOAT16", "BFLOAT16"}
    for sign in (1, -1):
        x = sign * np.abs(np.random.default_rng(3).normal(size=(1, 3, 4))).astype(np.float32)
        found, = evaluate(fuse(load(path)), {"x": x}).values()
        wanted = (np.exp(x) + 1) * c * (2 if sign > 0 else 3)
        assert np.abs(found - wanted).max() <= ROUNDING * np.abs(wanted).max()


def test_types_that_do_not_go_together_are_refused(tmp_path):
    """A damaged file, not one to be guessed at: ONNX Runtime refuses it, too."""
    path = write(tmp_path / "m.onnx", [helper.make_node("Add", ["x", "c"], ["y"], name="sum")],
                 {"c": np.ones(4, np.float32)}, TensorProto.FLOAT16)
    with pytest.raises(Exception, match="Type Error"):
        run_onnx(path, x=np.zeros((1, 3, 4), np.float16))
    with pytest.raises(CompileError, match="Node 'sum' .* inconsistent type"):
        load(path)
