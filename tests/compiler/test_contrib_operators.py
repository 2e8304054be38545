"""Files that ONNX Runtime's optimisers wrote become what the exported file becomes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.optimizer import optimize_model
from torch import nn

from moeware.compiler.contrib import expand_operators
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.macs import macs
from moeware.compiler.partition import partition
from tests.compiler import exports, genai, language_models
from tests.compiler.exports import DIM, HEADS, Mlp, Moe, PackedAttention, SeparateAttention, vit
from tests.compiler.fused import check, operators_of
from tests.compiler.test_partition import run_steps

MODELS = {
    "packed": lambda: vit(PackedAttention("manual")),
    "separate": lambda: vit(SeparateAttention(), mixer=Mlp(nn.SiLU())),
    "loop": lambda: vit(mixer=Moe("loop")),
    "gather": lambda: vit(mixer=Moe("gather")),
}


def extended(source, path, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def for_transformers(source, path):
    model = optimize_model(str(source), "vit", num_heads=HEADS, hidden_size=DIM, opt_level=0)
    model.save_model_to_file(str(path))


@pytest.mark.parametrize("optimise", [extended, for_transformers])
@pytest.mark.parametrize("name", MODELS)
def test_optimised_file(tmp_path, name, optimise):
    source = exports.export(MODELS[name](), tmp_path / "m.onnx", 17, dynamo=False)
    optimise(source, tmp_path / "optimised.onnx")
    assert any(node.domain for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    check(tmp_path / "optimised.onnx", operators_of(fuse(load(source))), frames=1)


def test_values_whose_shapes_the_optimiser_does_not_record(tmp_path):
    source = exports.export(vit(mixer=Mlp()), tmp_path / "m.onnx", 18, dynamic=False)
    extended(source, tmp_path / "optimised.onnx")
    check(tmp_path / "optimised.onnx", operators_of(fuse(load(source))), frames=1)


def test_a_layout_of_one_processor_is_refused_with_the_remedy(tmp_path):
    """Written here, as ONNX Runtime has such a layout for some processors only."""
    node = onnx.helper.make_node("ReorderInput", ["x"], ["y"], "reorder", domain="com.microsoft.nchwc")
    with pytest.raises(CompileError, match="'reorder' .*must be portable, .*ORT_ENABLE_EXTENDED"):
        load(built(tmp_path / "m.onnx", [node]))


def test_optimised_language_model(tmp_path):
    model = language_models.build("qwen2-moe")
    source = language_models.export(model, tmp_path / "m.onnx", 20)
    extended(source, tmp_path / "optimised.onnx")
    found = check(tmp_path / "optimised.onnx", frames=1)
    assert sorted(operators_of(found)) == sorted(operators_of(fuse(load(source))))


# Operator: inputs, attributes and which of up to four results are read.
CASES = {
    "Gelu": ("x", "", "y"),
    "BiasGelu": ("x, row", "", "y"),
    "FastGelu": ("x, row", "", "y"),
    "QuickGelu": ("x", "<alpha: float = 1.5>", "y"),
    "FusedMatMul": ("x, image", "<transB: int = 1, alpha: float = 0.3>", "y"),
    "FusedGemm": ("rows, square, row", '<activation: string = "Relu", alpha: float = 0.5>', "y"),
    "SkipLayerNormalization": ("x, image, row, row, row", "<epsilon: float = 0.01>", "y, , , sum"),
    "SkipSimplifiedLayerNormalization": ("x, image, row", "<epsilon: float = 0.01>", "y"),
    "Attention": ("x, packed, three", "<num_heads: int = 2, unidirectional: int = 1>", "y"),
    "MultiHeadAttention": ("x, x, image, three", "<num_heads: int = 2, scale: float = 0.2>", "y"),
}
CONSTANTS = {"row": (6,), "square": (6, 6), "packed": (6, 18), "three": (18,)}


@pytest.mark.parametrize("operator", CASES)
@pytest.mark.parametrize("opset", [17, 21])
def test_operator(tmp_path, operator, opset):
    inputs, attributes, results = CASES[operator]
    shape = {"FusedMatMul": "1, 4, 4", "FusedGemm": "4, 6"}.get(operator, "1, 4, 6")
    flat = "rows = Squeeze (x, first)" if "rows" in inputs else ""
    last = "total = Add (y, sum)" if "sum" in results else "total = Identity (y)"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        model (float[1, 4, 6] x, float[1, 4, 6] image) => (float[{shape}] total)
        <int64[1] first = {{0}}>
        {{ same = Add (x, image) {flat} {results} = com.microsoft.{operator} {attributes} ({inputs})
           {last} }}""")
    generator = np.random.default_rng(3)
    for name, shape in CONSTANTS.items():
        array = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    assert not any(node.domain for node in loaded.graph)
    check(tmp_path / "m.onnx", frames=1)


def built(path, nodes, *, shape=(1, 4, 6), **constants):
    """A model of ``nodes`` from ``x`` to ``y``; constants by name."""
    tensors = [onnx.numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "built", [info("x", 1, shape)], [info("y", 1, (1, 4, 6))], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
    return path


def own(operator, inputs, outputs, **attributes):
    return onnx.helper.make_node(operator, inputs, outputs, operator, domain="com.microsoft", **attributes)


def test_packed_heads_of_two_sizes(tmp_path):
    """Values of another size than keys, and a bias of scores that hides later keys."""
    random = np.random.default_rng(4)
    arrays = {name: random.normal(size=size).astype(np.float32)
              for name, size in (("w", (6, 28)), ("b", (28,)), ("o", (12, 6)))}
    bias = np.triu(np.full((1, 1, 4, 4), np.finfo(np.float32).min, np.float32), 1)
    nodes = [own("Attention", ["x", "w", "b", "", "", "bias"], ["a"], num_heads=2,
                 qkv_hidden_sizes=[8, 8, 12]), onnx.helper.make_node("MatMul", ["a", "o"], ["y"])]
    found = check(built(tmp_path / "m.onnx", nodes, bias=bias, **arrays), frames=1)
    (attention,) = [node for node in found.graph if node.op_type == "Attention"]
    assert attention.attributes["causal"].value == 1


@pytest.mark.parametrize("operator,attributes", [
    ("GroupQueryAttention", {"num_heads": 2, "kv_num_heads": "2"}),
    ("MoE", {"activation_type": 1}), ("FusedMatMul", {"alpha": 2}),
    ("MatMulNBits", {"K": 6.0, "N": 6, "bits": 4, "block_size": 16}),
])
def test_attribute_of_another_type(tmp_path, operator, attributes):
    path = built(tmp_path / "m.onnx", [own(operator, ["x", "x", "x"], ["y"], **attributes)])
    with pytest.raises(CompileError, match=rf"of node '{operator}' .* must be \w+, not \w+; repair"):
        load(path)


def test_a_switch_is_on_or_off(tmp_path):
    nodes = [own("GroupQueryAttention", ["x", "x", "x"], ["y"], num_heads=2, kv_num_heads=2, do_rotary=3)]
    with pytest.raises(CompileError, match="'do_rotary' of node 'GroupQueryAttention' .* 0 or 1, not 3"):
        load(built(tmp_path / "m.onnx", nodes))


def test_contradiction_behind_an_operator_that_onnx_does_not_know(tmp_path):
    nodes = [own("GroupQueryAttention", ["x", "x", "x", "", "", "last", "count"], ["a"], num_heads=2,
                 kv_num_heads=2), onnx.helper.make_node("MatMul", ["a", "w"], ["y"], "after")]
    path = built(tmp_path / "m.onnx", nodes, w=np.ones((5, 6), np.float32), last=np.int32([3]),
                 count=np.int32(4))
    with pytest.raises(CompileError, match=r"Node 'after' \(MatMul\) must have operands and attributes"):
        load(path)


def test_sizes_that_explode_beside_such_an_operator(tmp_path):
    """A vector of as many elements would be made to infer what is gathered of it."""
    make = onnx.helper.make_node
    nodes = [make("Mul", ["size", "size"], ["large"]), make("ConstantOfShape", ["large"], ["fill"], "fill"),
             make("Exp", ["fill"], ["e"]), make("Reshape", ["e", "flat"], ["vector"]),
             make("Gather", ["vector", "first"], ["one"]), make("Add", ["x", "one"], ["sum"]),
             own("GroupQueryAttention", ["sum", "sum", "sum", "", "", "last", "count"], ["y"],
                 num_heads=2, kv_num_heads=2)]
    path = built(tmp_path / "m.onnx", nodes, size=np.int64([1 << 10, 1 << 5]), flat=np.int64([-1]),
                 first=np.int64(0), last=np.int32([3]), count=np.int32(4))
    with pytest.raises(CompileError, match=r"'fill' \(ConstantOfShape\) must have at most"):
        load(path)


@pytest.mark.parametrize("rows", [3, 4])
def test_rotation_needs_a_row_for_each_position(tmp_path, rows):
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["q"]),
             own("RotaryEmbedding", ["q", "places", "cos", "sin"], ["y"])]
    random = np.random.default_rng(5)
    path = built(tmp_path / "m.onnx", nodes, w=random.normal(size=(6, 6)).astype(np.float32),
                 places=np.arange(4)[None], cos=np.ones((rows, 3), np.float32),
                 sin=np.zeros((rows, 3), np.float32))
    found = operators_of(fuse(load(path)))
    assert ("Rotary" in found, "RotaryEmbedding" in found) == (rows == 4, rows == 3)


def test_an_output_of_another_type_than_its_value(tmp_path):
    path = built(tmp_path / "m.onnx", [own("FastGelu", ["x"], ["z"])], y=np.arange(4))
    with pytest.raises(CompileError, match=r"outputs \['x', 'y'\] must have the types of their values"):
        load(path)


def test_ranks_are_inferred_behind_other_operators_of_its_own(tmp_path):
    """Files of ONNX Runtime hold no shapes."""
    onnx.save(onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        model (float[1, 4, 6] x) => (float[1, 2, 4, 4] y)
        <float[6] gamma = {1, 2, 3, 4, 5, 6}, int64[4] heads = {1, 4, 2, 3}>
        { rows = SimplifiedLayerNormalization (x, gamma) apart = Reshape (rows, heads)
          q = Transpose <perm = [0, 2, 1, 3]> (apart)
          y = com.microsoft.FusedMatMul <transB: int = 1, alpha: float = 0.3> (q, q) }"""),
        tmp_path / "m.onnx")
    assert not any(node.domain for node in load(tmp_path / "m.onnx").graph)
    check(tmp_path / "m.onnx", frames=1)


@pytest.mark.parametrize("operator", ["Attention", "MultiHeadAttention"])
def test_what_an_expansion_does_not_cover_stays(tmp_path, operator):
    """A mask of keys that is another one from input to input."""
    random = np.random.default_rng(4)
    arrays = {name: random.normal(size=size).astype(np.float32)
              for name, size in (("w", (6, 18)), ("b", (18,)), ("o", (6, 6)))}
    inputs = ["x", "w", "b", "mask"] if operator == "Attention" else ["x", "x", "x", "b", "mask"]
    nodes = [onnx.helper.make_node("ReduceMax", ["x", "last"], ["m"], keepdims=0),
             onnx.helper.make_node("Greater", ["m", "half"], ["g"]),
             onnx.helper.make_node("Cast", ["g"], ["mask"], to=onnx.TensorProto.INT32),
             own(operator, inputs, ["a"], num_heads=2), onnx.helper.make_node("MatMul", ["a", "o"], ["y"])]
    path = built(tmp_path / "m.onnx", nodes, last=np.int64([-1]), half=np.float32(0.5), **arrays)
    model = fuse(load(path))
    (node,) = (node for node in model.graph if node.domain == "com.microsoft")
    parts = partition(model)
    assert "without a mask of padding" in parts.reasons[operator].rule
    products = 4 * 6 * 18 if operator == "Attention" else 0
    assert macs(node) == products + 2 * 4 * 4 * 6
    run_steps(model, parts, {"x": random.normal(size=(1, 4, 6)).astype(np.float32)})


@pytest.mark.parametrize("sizes", [
    genai.Sizes(layers=1, rotary="apart", packed=False, attention="multi", kv_heads=4, function="FastGelu"),
    genai.Sizes(layers=1, bits=4, tied=True),
], ids=["floats", "stored"])  # fmt: skip
def test_half_precision_is_computed_in_float(tmp_path, sizes):
    """As the kernels do; an epsilon is none of half precision."""
    source = onnx.load(str(genai.write(tmp_path / "m.onnx", sizes)))
    half = convert_float_to_float16(source, keep_io_types=False, disable_shape_infer=True,
                                    op_block_list=[])
    ids = {"input_ids": np.random.default_rng(7).integers(0, genai.VOCABULARY, (1, sizes.tokens))}
    (wanted,) = onnxruntime.InferenceSession(half.SerializeToString()).run(None, ids)
    expand_operators(half)
    assert not {"SkipSimplifiedLayerNormalization", "MultiHeadAttention", "FastGelu"} & {
        node.op_type for node in half.graph.node}
    (found,) = onnxruntime.InferenceSession(half.SerializeToString()).run(None, ids)
    # Some roundings to half precision, of 2**-11 each, in other places.
    assert found.dtype == wanted.dtype == np.float16
    assert np.abs(found.astype(float) - wanted).max() < 4e-3 * np.abs(wanted).max()
