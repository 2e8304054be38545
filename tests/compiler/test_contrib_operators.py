"""Files that ONNX Runtime's optimisers wrote become what the exported file becomes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.transformers.optimizer import optimize_model
from torch import nn

from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from tests.compiler import exports, language_models
from tests.compiler.exports import DIM, HEADS, Mlp, Moe, PackedAttention, SeparateAttention, vit
from tests.compiler.fused import check, operators_of

MODELS = {
    "packed": lambda: vit(PackedAttention("manual")),
    "separate": lambda: vit(SeparateAttention(), mixer=Mlp(nn.SiLU())),
    "loop": lambda: vit(mixer=Moe("loop")),
    "gather": lambda: vit(mixer=Moe("gather")),
}


def extended(source, path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
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


def test_what_an_expansion_does_not_cover_stays(tmp_path):
    """A mask of keys that is another one from input to input."""
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        model (float[1, 4, 6] x, int32[1, 4] mask) => (float[1, 4, 6] y)
        <float[6, 18] packed = {%s}, float[18] three = {%s}>
        { y = com.microsoft.Attention <num_heads: int = 2> (x, packed, three, mask) }"""
    values = torch.arange(126).div(40).tolist()
    text %= tuple(", ".join(map(str, part)) for part in (values[:108], values[108:]))
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    (node,) = fuse(load(tmp_path / "m.onnx")).graph
    assert (node.domain, node.op_type) == ("com.microsoft", "Attention")
