"""Products and tables of stored integers become those of the floats that ONNX Runtime computes with."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from moeware.compiler.blocks import dequantised, unpacked
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.kept import Kept
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.reference import evaluate
from tests.compiler import genai
from tests.compiler.contrib import packed, quantised
from tests.compiler.fused import check, operators_of
from tests.compiler.test_partition import run_steps

TOKENS = 5


def product(path, bits, inputs, outputs, block, zeros="", *, bias=False, flat=False, opset=21, more=(),
            **attributes):
    """A file with a norm and a MatMulNBits. zeros : "packed", "floats" or none; flat : arrays of one
    axis; more : further inputs."""
    random = np.random.default_rng(1)
    weight = random.normal(size=(outputs, inputs)).astype(np.float32)
    integers, scale, zero = quantised(weight[None], bits, block, bool(zeros))
    whole = np.pad(integers[0], ((0, 0), (0, -inputs % block)))
    arrays = {"stored": packed(whole.reshape(outputs, -1, block), bits), "scales": scale[0]}
    if zeros:
        arrays["zeros"] = packed(zero[0], bits) if zeros == "packed" else (
            zero[0] + np.float32(0.25))
    names = ["y", *arrays, *([] if zeros else [""]), "", *(["bias"] if bias else [])]
    if flat:
        arrays |= {name: each.reshape(-1) for name, each in arrays.items() if name != "stored"}
    if bias:
        arrays["bias"] = random.normal(size=outputs).astype(np.float32)
    for place, array in more:
        names[place:] = [f"more_{place}"]
        arrays[f"more_{place}"] = array
    arrays["gamma"] = np.ones(inputs, np.float32)
    nodes = [helper.make_node("SimplifiedLayerNormalization", ["x", "gamma"], ["y"], "norm"),
             helper.make_node("MatMulNBits", names, ["z"], "product", domain="com.microsoft", K=inputs,
                              N=outputs, bits=bits, block_size=block, **attributes)]
    return save(path, nodes, ("x", (1, TOKENS, inputs)), ("z", (1, TOKENS, outputs)), arrays, opset)


def save(path, nodes, source, result, arrays, opset=21, kind=TensorProto.FLOAT):
    tensors = [each if isinstance(each, onnx.TensorProto) else numpy_helper.from_array(each, name)
               for name, each in arrays.items()]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info(source[0], kind, source[1])],
                              [helper.make_tensor_value_info(result[0], 1, result[1])], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), str(path))
    return path


# Bits, inputs, outputs, block, and the rest.
PRODUCTS = {
    "a block that ends early": ((4, 40, 7, 16), {}),
    "one output": ((4, 40, 1, 32, "packed"), {}),
    "an input beyond a block": ((8, 33, 3, 32, "packed"), {"bias": True}),
    "an odd number of blocks": ((4, 72, 5, 16, "packed"), {"bias": True}),
    "two bits": ((2, 70, 5, 16, "packed"), {}),
    "two bits in one block": ((2, 50, 5, 64), {}),
    "zeros between integers": ((4, 100, 5, 128, "floats"), {}),
    "arrays of one axis": ((4, 130, 5, 128, "packed"), {"flat": True}),
    "one input": ((4, 1, 4, 16, "packed"), {}),
    "an old opset": ((4, 48, 7, 16), {"opset": 17}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(tmp_path, name):
    layout, options = PRODUCTS[name]
    path = product(tmp_path / "m.onnx", *layout, **options)
    fused = check(path, ["RMSNorm", "Linear"], frames=1)
    lost = Kept.of(fused).lost
    assert list(lost) == ["stored"] and lost["stored"].startswith("blocks of weights have scales")


def test_rounded_activations_are_of_the_kernel(tmp_path):
    """accuracy_level=4 lets the kernel round to int8, which is no part of the model."""
    layout = (4, 64, 6, 32)
    exact, rounded = (product(tmp_path / f"{level}.onnx", *layout, accuracy_level=level)
                      for level in (0, 4))
    x = {"x": np.random.default_rng(2).normal(size=(1, TOKENS, 64)).astype(np.float32)}
    (found,) = evaluate(fuse(load(rounded)), x).values()
    (wanted,) = onnxruntime.InferenceSession(exact).run(None, x)
    # Sums of float32 in another order.
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


UNREAD = {
    "group indices": ({"more": [(4, np.zeros(48, np.int32))]}, True),
    "the packing of a provider": ({"weight_prepacked": 1}, False),
    "zero points of another number": ({"more": [(3, np.zeros(5, np.uint8))]}, False),
    "scales of another number": ({"more": [(2, np.ones((7, 2), np.float32))]}, False),
}


@pytest.mark.parametrize("name", UNREAD)
def test_unread(tmp_path, name):
    options, runs = UNREAD[name]
    fused = fuse(load(product(tmp_path / "m.onnx", 4, 48, 7, 16, "packed", **options)))
    assert operators_of(fused) == ["RMSNorm", "MatMulNBits"]
    parts = partition(fused)
    reason = parts.reasons["product"]
    assert "constants of 8, 4 or 2 bits in blocks" in reason.rule and "quantise" in reason.remedy
    if runs:
        run_steps(fused, parts, {"x": np.ones((1, TOKENS, 48), np.float32)})


@pytest.mark.parametrize("kind", ["uint8", "uint4", "int4"])
@pytest.mark.parametrize("zero", ["zeros", ""])
def test_table(tmp_path, kind, zero):
    rows, columns, block = 6, 40, 16
    random, blocks = np.random.default_rng(3), -(-columns // block)
    low = -8 if kind == "int4" else 0
    integers = random.integers(low, low + 16, (rows, columns))
    zeros = random.integers(low, low + 16, (rows, blocks))
    if kind == "uint8":
        stored = {"data": packed(integers, 4), "zeros": packed(zeros, 4)}
    else:
        number = getattr(TensorProto, kind.upper())
        stored = {name: helper.make_tensor(name, number, array.shape, array.reshape(-1))
                  for name, array in (("data", integers), ("zeros", zeros))}
    scales = random.normal(size=(rows, blocks)).astype(np.float32)
    node = helper.make_node("GatherBlockQuantized", ["data", "ids", "scales", zero], ["y"], "table",
                            domain="com.microsoft", block_size=block, bits=4, quantize_axis=1)
    path = save(tmp_path / "m.onnx", [node], ("ids", (1, TOKENS)), ("y", (1, TOKENS, columns)),
                {"data": stored["data"], "scales": scales, "zeros": stored["zeros"]},
                kind=TensorProto.INT64)
    check(path, ["plain Gather"], frames=1, ids=rows)


def quantised_file(path, **options):
    """A float file after ONNX Runtime's quantiser."""
    source = genai.write(path.with_name("float.onnx"), genai.Sizes(layers=1, inner=40))
    logging.disable(logging.ERROR)
    try:
        quantiser = MatMulNBitsQuantizer(onnx.load(str(source)), **options)
        quantiser.process()
    finally:
        logging.disable(logging.NOTSET)
    quantiser.model.save_model_to_file(str(path))
    return path


QUANTISERS = {
    "symmetric": {"block_size": 16, "is_symmetric": True},
    "zero points": {"block_size": 32, "is_symmetric": False},
    "eight bits": {"algo_config": DefaultWeightOnlyQuantConfig(32, is_symmetric=False, bits=8)},
    "half-quadratic": {"algo_config": HQQWeightOnlyQuantConfig(block_size=32, bits=4)},
    "embedding": {"block_size": 32, "is_symmetric": False, "op_types_to_quantize": ("MatMul", "Gather")},
    "dequantised": {"block_size": 16, "is_symmetric": False, "quant_format": QuantFormat.QDQ},
    "dequantised, symmetric": {"block_size": 16, "is_symmetric": True,
                               "quant_format": QuantFormat.QDQ},
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISERS)
def test_file_of_the_quantiser(tmp_path, name, monkeypatch):
    def as_written(path, **feeds):
        """Without the fusion of DequantizeLinear into kernels that round activations."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(path), options).run(None, feeds)

    monkeypatch.setattr("tests.compiler.exports.run_onnx", as_written)
    path = quantised_file(tmp_path / "m.onnx", **QUANTISERS[name])
    parts = partition(check(path, frames=1))
    assert [str(node.op_type) for step in parts.steps if step.kind == "host"
            for node in step.nodes] == ["Gather"]


def test_scale_of_blocks_must_be_finite(tmp_path):
    path = quantised_file(tmp_path / "m.onnx", **QUANTISERS["dequantised"])
    proto = onnx.load(str(path))
    scales = next(each for each in proto.graph.initializer if each.name.endswith("DQ_scales"))
    array = np.full(tuple(scales.dims), np.inf, np.float32)
    scales.CopyFrom(numpy_helper.from_array(array, scales.name))
    onnx.save(proto, str(path))
    with pytest.raises(CompileError, match=r"Scale of node .* must be finite, not inf"):
        load(path)


def test_unpacked_and_dequantised():
    integers = np.random.default_rng(4).integers(0, 4, (3, 8)).astype(np.uint8)
    assert (unpacked(packed(integers, 2), 2) == integers).all()
    scale, zero = np.array([[2.0, -1.0]]), np.array([[1, 3]])
    found = dequantised(np.array([[0, 1, 2, 3, 4]]), scale, zero, 3)
    assert found.dtype == np.float32 and found.tolist() == [[-2, 0, 2, 0, -1]]
