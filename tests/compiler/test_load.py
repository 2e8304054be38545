"""Every fault of a model file ends in a CompileError that names it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from moeware.compiler.errors import CompileError
from moeware.compiler.load import load
from tests.compiler import exports

CASES = Path(__file__).parent / "cases"


def write(path, weight=None, dims=("batch", 4), opset=20, operator="MatMul"):
    """A model of one node on ``x`` and an initializer ``weight``; returns ``path``."""
    weight = np.ones((4, 3), np.float32) if weight is None else weight
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "weight"], ["y"], name="node")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", "features"))],
        [numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
    return path


def refuse(path, *words):
    with pytest.raises(CompileError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


def test_loads_one_frame(tmp_path):
    model = load(write(tmp_path / "m.onnx"))
    assert list(model.graph.inputs[0].shape) == [1, 4]
    assert list(model.graph.outputs[0].shape) == [1, 3]


def test_folds_what_depends_on_no_input(tmp_path):
    path = exports.export(exports.vit(), tmp_path / "m.onnx", opset=17, dynamo=False)
    operators = {node.op_type for node in load(path).graph}
    assert not operators & {"Shape", "Constant", "ConstantOfShape", "Expand", "Where"}


def test_missing_file(tmp_path):
    refuse(tmp_path / "absent.onnx", "must exist", "absent.onnx")


def test_not_onnx(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"PK\x03\x04 this is a zip archive")
    refuse(path, "another format")
    path.write_bytes(b"")
    refuse(path, "with a graph")


def test_numbers_that_are_too_large_for_a_text(tmp_path):
    path = tmp_path / "m.onnxtxt"
    path.write_text(f'<ir_version: 8, opset_import: ["" : 17]> g (float[1, {"9" * 30}] x) => (float[1] y) {{}}')
    refuse(path, "complete ONNX file")


@pytest.mark.parametrize("operator", ["Expand", "Reshape"])
def test_a_shape_that_is_no_vector(tmp_path, operator):
    path = tmp_path / "m.onnxtxt"
    path.write_text(f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] y)
        <int64 shape = {{4}}> {{ a = {operator} (x, shape) y = Neg (a) }}""")
    refuse(path, operator)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(tmp_path, part):
    path = write(tmp_path / "m.onnx", np.ones((4, 300), np.float32))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refuse(path, "truncated")


def test_external_data_missing(tmp_path):
    path = write(tmp_path / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert load(path).graph.initializers["weight"].const_value.numpy().sum() == 12
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:7])
    refuse(path, "'weight'", "w.bin")
    (tmp_path / "w.bin").unlink()
    refuse(path, "'weight'", "w.bin", "missing")


def test_dynamic_dimension(tmp_path):
    refuse(write(tmp_path / "m.onnx", dims=("batch", "width")), "Axis 1", "'x'", "width")


def test_fixed_batch(tmp_path):
    refuse(write(tmp_path / "m.onnx", dims=(2, 4)), "Batch axis", "'x'", "not 2")


@pytest.mark.parametrize("dims", [None, ()])
def test_input_without_batch_axis(tmp_path, dims):
    refuse(write(tmp_path / "m.onnx", np.ones(3, np.float32), dims, operator="Add"), "'x'", "batch")


@pytest.mark.parametrize("opset", [16, 25])
def test_opset(tmp_path, opset):
    refuse(write(tmp_path / "m.onnx", opset=opset), "Opset", str(opset))


@pytest.mark.parametrize("value,word", [(np.nan, "NaN"), (np.inf, "infinite")])
def test_weights_must_be_finite(tmp_path, value, word):
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    weight[2, 1] = value
    refuse(write(tmp_path / "m.onnx", weight), "'weight'", f"1 {word}")


def test_mask_may_be_infinite(tmp_path):
    mask = np.where(np.eye(4, dtype=bool), 0, -np.inf).astype(np.float32)
    assert load(write(tmp_path / "m.onnx", mask, operator="Add"))


def test_mask_may_hold_a_bias_by_position(tmp_path):
    mask = np.where(np.tri(4, dtype=bool), -np.arange(4), -np.inf).astype(np.float32)
    assert load(write(tmp_path / "m.onnx", mask, operator="Add"))
    refuse(write(tmp_path / "m.onnx", mask), "'weight'", "6 infinite")
    refuse(write(tmp_path / "m.onnx", -mask, operator="Add"), "'weight'", "6 infinite")
    mask[3, 0] = np.nan
    refuse(write(tmp_path / "m.onnx", mask, operator="Add"), "'weight'", "7 NaN")


def test_zero_size(tmp_path):
    refuse(write(tmp_path / "m.onnx", np.ones((4, 0), np.float32)), "'weight'", "(4, 0)")
    refuse(write(tmp_path / "m.onnx", dims=("batch", 0)), "Axis 1", "'x'")


def test_operator_without_definition(tmp_path):
    refuse(write(tmp_path / "m.onnx", operator="Unheard"), "checker", "Unheard")


def test_shapes_that_contradict(tmp_path):
    refuse(write(tmp_path / "m.onnx", np.ones((5, 3), np.float32)), "'node' (MatMul)", "fit together")


def test_baked_expert_counts_are_refused(tmp_path):
    model = exports.vit(mixer=exports.Moe("sorted_split"))
    path = exports.export(model, tmp_path / "m.onnx", 17, dynamo=False)
    refuse(path, "Split", "constant sizes", "export the experts as a loop")


@pytest.mark.parametrize("k", [2, 3])
def test_packed_attention_behind_several_mixtures_is_no_split_of_tokens(tmp_path, k):
    """Its Split on axis 0 takes queries, keys and values apart, behind the TopK of two routers."""
    blocks = [exports.Block(exports.PackedAttention(), exports.Moe(k=k), lambda: nn.LayerNorm(exports.DIM))
              for _ in range(3)]
    path = exports.export(exports.Vit(*blocks), tmp_path / "m.onnx", 17, dynamo=False)
    assert any(node.op_type == "Split" for node in onnx.load(path).graph.node)
    load(path)


def test_baked_expert_counts_behind_another_mixture_are_refused(tmp_path):
    blocks = [exports.Block(exports.PackedAttention(), mixer, lambda: nn.LayerNorm(exports.DIM))
              for mixer in (exports.Moe(), exports.Moe("sorted_split"))]
    path = exports.export(exports.Vit(*blocks), tmp_path / "m.onnx", 17, dynamo=False)
    refuse(path, "mixer/Split", "constant sizes")
