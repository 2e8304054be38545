"""What stands between QuantizeLinear and DequantizeLinear, and what is no pair of them."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType
from torch import nn

from moeware.cli import main
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.kept import Grid, Kept
from moeware.compiler.kept_weights import survey, usable_integers
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.reference import evaluate
from moeware.runtime.session import Session
from moeware.sim.golden import GoldenDevice

from . import exports
from .quantised import quantise_file, quantised_step
from .test_models import EVEN

FLOATS = {"s": np.float32(0.1), "t": np.float32(0.2)}
INTEGERS = {"z": np.int8(5), "u": np.uint8(100), "h": np.uint16(300)}


def text(tmp_path, body: str, opset=21, result="y", **arrays):
    """A model of image [1, 4, 6] in ONNX text, with the arrays as initializers."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        g (float[1, 4, 6] x) => (float {result}) {{ {body} }}""")
    every = {name: array for name, array in (FLOATS | INTEGERS | arrays).items() if name in body}
    model.graph.initializer.extend(
        each if isinstance(each, onnx.TensorProto) else numpy_helper.from_array(np.array(each), name)
        for name, each in every.items())
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_pair_leaves_its_grid(tmp_path):
    model = load(text(tmp_path, """
        a = Neg(x) b = QuantizeLinear(a, s, z) c = DequantizeLinear(b, s, z) y = Neg(c)"""))
    assert operators(model) == ["Neg", "Neg"]
    assert Kept.of(model).grids == {"a": Grid(("a",), float(np.float32(0.1)), -133, 122)}


def test_an_output_keeps_its_name(tmp_path):
    model = load(text(tmp_path, """
        a = Neg(x) b = QuantizeLinear(a, s, u) y = DequantizeLinear(b, s, u)"""))
    assert operators(model) == ["Neg"] and model.graph.outputs[0].name == "y"
    assert Kept.of(model).grids["y"].names == ("a",)


def test_layout_between_the_halves_moves_floats(tmp_path):
    model = load(text(tmp_path, """
        a = Neg(x) b = QuantizeLinear(a, s, z) c = Transpose <perm = [0, 2, 1]> (b)
        d = DequantizeLinear(c, s, z) y = Neg(d)"""))
    assert operators(model) == ["Neg", "Transpose", "Neg"]
    assert all(node.outputs[0].dtype.name == "FLOAT" for node in model.graph)


def test_a_clip_between_the_halves_narrows_the_grid(tmp_path):
    model = load(text(tmp_path, """
        a = Neg(x) b = QuantizeLinear(a, s, z) c = Clip(b, low, high)
        d = DequantizeLinear(c, s, z) y = Neg(d)""", low=np.int8(0), high=np.int8(127)))
    assert operators(model) == ["Neg", "Neg"]
    grid = Kept.of(model).grids["a"]
    assert (grid.least, grid.most) == (-5, 122)


PAIR = "b = QuantizeLinear(a, s, n) c = DequantizeLinear(b, s, n) y = Neg(c)"


@pytest.mark.parametrize("lowest", [np.uint8(0), np.int8(-128)])
@pytest.mark.parametrize("before", [
    "a = MatMul(x, w)", "d = MatMul(x, w) a = Add(d, p)", "d = Neg(x) a = Transpose(d)",
    "d = MatMul(x, w) e = QuantizeLinear(d, s, z) f = DequantizeLinear(e, s, z) a = Add(f, p)"])
def test_a_relu_that_is_but_saturation_comes_back(tmp_path, before, lowest):
    """onnxruntime's quantiser leaves out a Relu before integers that start at 0."""
    path = text(tmp_path, f"{before} {PAIR}", n=lowest, w=-np.eye(6, dtype=np.float32),
                p=np.full(6, 0.5, np.float32))
    model = load(path)
    assert operators(model)[-2:] == ["Relu", "Neg"]
    relu = model.graph[-2]
    assert Kept.of(model).grids == Kept.of(model).grids | {relu.outputs[0].name: Grid(
        ("a",), float(np.float32(0.1)), 0, 255)}
    x = np.random.default_rng(1).normal(size=(1, 4, 6)).astype(np.float32)
    ours, = evaluate(fuse(model), {"x": x}).values()
    assert np.abs(ours - exports.run_onnx(path, x=x)[0]).max() <= 0.1001  # of two roundings


@pytest.mark.parametrize("before", [
    "a = Softmax(x)", "a = Mul(x, x)", "d = Mul(x, x) a = Add(d, p)", "d = Pow(x, v) a = ReduceMean(d)",
    "d = QuantizeLinear(x, s, z) e = DequantizeLinear(d, s, z) f = DequantizeLinear(d, s, z) "
    "a = Mul(e, f)", "d = Softmax(x) a = MatMul(d, w)", "d = Erf(x) a = Add(d, o)",
    "d = Erf(x) e = QuantizeLinear(d, s, z) f = DequantizeLinear(e, s, z) a = Add(f, o)"])
def test_what_is_positive_by_itself_needs_no_relu(tmp_path, before):
    model = load(text(tmp_path, f"{before} {PAIR}", n=np.uint8(0), v=np.float32(2),
                      o=np.float32(1), w=np.eye(6, dtype=np.float32), p=np.full(6, 0.5, np.float32)))
    assert "Relu" not in operators(model) and "QuantizeLinear" not in operators(model)


def test_samples_that_were_all_0_say_nothing(tmp_path):
    """As of an expert that no calibration token reached."""
    model = load(text(tmp_path, f"a = MatMul(x, w) {PAIR.replace('s, n', 'e, n')}", n=np.uint8(0),
                      e=np.float32(1), w=np.eye(6, dtype=np.float32)))
    assert operators(model) == ["MatMul", "Neg"]


def test_an_image_saturates_as_it_enters(tmp_path):
    model = load(text(tmp_path, PAIR.replace("(a", "(x"), n=np.uint8(0)))
    assert operators(model) == ["Neg"]


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("activation", [QuantType.QInt8, QuantType.QUInt8])
def test_a_relu_that_the_quantiser_left_out(tmp_path, form, activation):
    torch.manual_seed(3)
    path = exports.export(exports.vit(mixer=exports.Mlp(nn.ReLU())), tmp_path / "model.onnx")
    path = quantise_file(path, exports.example(16, 1), form=form, activation=activation)
    assert "Relu" not in {node.op_type for node in onnx.load(str(path)).graph.node}
    step, kept = quantised_step(path, exports.example(16, 1))
    assert any(getattr(op, "table", None) is not None for op in step.operations)
    assert not kept.noted[kept.grids["Pointwise_0"].names[0]]


@pytest.mark.parametrize("body", [
    "b = QuantizeLinear(x, s, z) c = DequantizeLinear(b, t, z) y = Neg(c)",
    "b = QuantizeLinear(x, s, z) c = DequantizeLinear(b, s, w) y = Neg(c)",
    "b = QuantizeLinear(x, s, z) d = Cast <to = 1> (b) c = DequantizeLinear(b, s, z) y = Add(c, d)",
    "m = ReduceMax <keepdims = 0> (x) b = QuantizeLinear(x, m, z) y = DequantizeLinear(b, m, z)",
    "b = QuantizeLinear(x, s, z) y = DequantizeLinear(b, s, z)",
], ids=["scales", "zero points", "another reader", "a computed scale", "nothing but a pair"])
def test_what_is_no_pair_stays_and_says_why(tmp_path, body):
    model = load(text(tmp_path, body, w=np.int8(6)))
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(model))
    assert any("QDQ format" in str(reason) for reason in partition(fuse(model)).reasons.values())
    assert not Kept.of(model).grids


def test_dynamic_quantisation_stays_on_the_host(tmp_path):
    model = fuse(load(text(tmp_path, """
        b, m, n = DynamicQuantizeLinear(x) c = MatMulInteger(b, w, n) d = Cast <to = 1> (c)
        y = Mul(d, m)""", w=np.ones((6, 6), np.int8))))
    reasons = partition(model).reasons.values()
    assert sum("QDQ format" in str(reason) for reason in reasons) == 2


@pytest.mark.parametrize("body, reason", [
    ("b = QuantizeLinear(x, s, h) c = DequantizeLinear(b, s, h) y = Neg(c)", "UINT16"),
    ("b = QuantizeLinear <axis = 2> (x, v, k) c = DequantizeLinear <axis = 2> (b, v, k) y = Neg(c)",
     "a scale for each channel of an activation"),
    ("b = QuantizeLinear(x, s, z) c = DequantizeLinear(b, s, z) d = QuantizeLinear(x, t, z) "
     "e = DequantizeLinear(d, t, z) y = Add(c, e)", "another grid"),
], ids=["16 bits", "per channel", "two grids"])
def test_grids_that_the_accelerator_has_not_are_reported(tmp_path, body, reason):
    model = load(text(tmp_path, body, v=np.full(6, 0.1, np.float32), k=np.zeros(6, np.int8)))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(model))
    assert reason in Kept.of(model).lost["x"]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("body", ["a = Neg(x) b = QuantizeLinear(a, e, z) y = DequantizeLinear(b, e, z)",
                                  "b = DequantizeLinear(w, e) y = MatMul(x, b)"])
def test_scales_are_positive(tmp_path, body, scale):
    path = text(tmp_path, body, e=np.float32(scale), w=np.ones((6, 6), np.int8))
    with pytest.raises(CompileError, match=r"Scale of node .* positive|must be finite"):
        load(path)


WEIGHT = np.random.default_rng(3).integers(-127, 128, (6, 8)).astype(np.int8)
SCALES = np.random.default_rng(4).uniform(1e-3, 1e-2, 8).astype(np.float32)


@pytest.mark.parametrize("body", [
    "b = DequantizeLinear <axis = 1> (w, e) y = MatMul(x, b)",
    "a = Transpose(w) b = DequantizeLinear <axis = 0> (a, e) c = Transpose(b) y = MatMul(x, c)",
    "b = DequantizeLinear <axis = 1> (w, e) f = Reshape(x, r) c = Gemm(f, b) y = Unsqueeze(c, o)",
    "b = DequantizeLinear <axis = 1> (w, e) y = Einsum <equation = \"bnd,dh->bnh\"> (x, b)",
    "q = QuantizeLinear <axis = 1> (v, e, k) b = DequantizeLinear <axis = 1> (q, e, k) "
    "y = MatMul(x, b)",
], ids=["matmul", "transposed", "gemm", "einsum", "fake quantised"])
def test_a_weight_keeps_integers_and_scales_to_the_last_bit(tmp_path, body):
    model = fuse(load(text(tmp_path, body, w=WEIGHT, e=SCALES, r=np.array([4, 6]), o=np.array([0]),
                           k=np.zeros(8, np.int8), v=WEIGHT * SCALES)))
    linear, = (node for node in model.graph if node.op_type == "Linear")
    kept = Kept.of(model)
    integers, steps = usable_integers(kept, linear.inputs[1].const_value.numpy())
    np.testing.assert_array_equal(integers, WEIGHT.T)
    np.testing.assert_array_equal(steps.astype(np.float32), SCALES)
    assert kept.report() == {"scales": 1, "kept": 1, "others": {}}


@pytest.mark.parametrize("kind, zero, reason", [
    (np.int8, 3, ""), (np.uint8, 128, ""), (np.uint8, 100, "9 bits"), (np.int8, -30, "9 bits")])
def test_weights_with_a_zero_point(tmp_path, kind, zero, reason):
    stored = np.arange(48).reshape(6, 8) * 5 % 250
    stored = (stored - (128 if kind is np.int8 else 0)).clip(-90 if zero == 3 else -128, 255)
    stored = stored.astype(kind)
    model = fuse(load(text(tmp_path, "b = DequantizeLinear(w, s, k) y = MatMul(x, b)", w=stored,
                           k=kind(zero))))
    linear, = (node for node in model.graph if node.op_type == "Linear")
    kept = Kept.of(model)
    found = usable_integers(kept, linear.inputs[1].const_value.numpy())
    assert reason in kept.noted["w"] and bool(reason) == bool(kept.noted["w"])
    if not reason:
        np.testing.assert_array_equal(found[0], stored.T.astype(int) - zero)


@pytest.mark.parametrize("select", [
    "g = Gather(w, i)", "f = Gather(w, i) g = Squeeze(f, o)"])
def test_weights_chosen_before_they_become_floats(tmp_path, select):
    """As the quantiser writes a gather of experts' weights in integers."""
    stored = np.random.default_rng(3).integers(-127, 128, (5, 6, 8)).astype(np.int8)
    index = np.array([2] if "o" in select else 2)
    body = f"i = ArgMax <axis = 0, keepdims = {index.ndim}> (v) {select} b = DequantizeLinear(g, s) "
    path = text(tmp_path, "d = ReduceMax <keepdims = 0> (x) v = Add(c, d) " + body + "y = MatMul(x, b)",
                w=stored, o=np.array([0]), c=np.arange(5, dtype=np.float32))
    model = load(path)
    assert "DequantizeLinear" not in operators(model)
    assert Kept.of(model).weights == {"w": [float(np.float32(0.1))]}
    gather = next(node for node in model.graph if node.op_type == "Gather")
    np.testing.assert_array_equal(gather.inputs[0].const_value.numpy(), stored * np.float32(0.1))


def test_blocks_of_weights_become_floats(tmp_path):
    scales = np.array([[0.1] * 8, [0.2] * 8], np.float32)
    model = fuse(load(text(tmp_path, """b = DequantizeLinear <axis = 0, block_size = 3> (w, e)
                           y = MatMul(x, b)""", w=WEIGHT, e=scales)))
    linear, = (node for node in model.graph if node.op_type == "Linear")
    np.testing.assert_array_equal(linear.inputs[1].const_value.numpy(),
                                  (WEIGHT * scales.repeat(3, 0)).T)
    assert "blocks" in Kept.of(model).lost["w"]


def test_weights_of_4_bits(tmp_path):
    four = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (6, 8), (WEIGHT % 15 - 7).ravel())
    model = fuse(load(text(tmp_path, "b = DequantizeLinear <axis = 1> (w, e) y = MatMul(x, b)",
                           w=four, e=SCALES)))
    linear, = (node for node in model.graph if node.op_type == "Linear")
    integers, _ = Kept.of(model).integers(linear.inputs[1].const_value.numpy())
    np.testing.assert_array_equal(integers, (WEIGHT % 15 - 7).T)


def test_integers_of_other_weights_are_not_made_up():
    kept = Kept(weights={"w": SCALES.tolist()})
    rng = np.random.default_rng(5)
    exact = (WEIGHT.T * SCALES[:, None]).astype(np.float32)
    exact[3] = 0
    integers, steps = kept.integers(exact)
    assert (integers[3] == 0).all() and steps[3] == 0
    np.testing.assert_array_equal(integers[4], WEIGHT.T[4])
    one = exact.copy()  # the largest of a row gives its scale away, the others must agree
    one[0, np.abs(one[0]).argsort()[0]] *= np.nextafter(np.float32(1), np.float32(2))
    for changed in (one, exact + rng.normal(size=exact.shape).astype(np.float32) * 1e-6,
                    rng.normal(size=exact.shape).astype(np.float32), exact * np.float32(1.1)):
        assert kept.integers(changed.astype(np.float32)) is None
    assert Kept().integers(exact) is None


@pytest.mark.parametrize("grid, samples, places, offset", [
    ((-128, 127), [-500, 500], ("middle",), 0.0),  # saturates where the file does
    ((-120, 135), [-500, 500], ("any",), 8.0),
    ((-120, 135), [-119, 120], ("middle", "any"), 0.0),
    ((-120, 135), [-119, 130], ("middle", "any"), 8.0),
    ((-120, 135), [-119, 130], ("middle",), None),
    ((-120, 135), [-121, 100], ("middle",), None),
    ((0, 127), [0, 127], ("any", "middle"), 128.0),
    ((0, 127), [0, 200], ("any", "middle"), None),
    ((-30000, 35535), [0, 1], ("any",), None),
])
def test_places_of_a_grid(grid, samples, places, offset):
    found, reason = Grid(("x",), 0.5, *grid).offset(np.array(samples) * 0.5, places)
    assert found == (None if offset is None else offset * 0.5)
    assert bool(reason) == (offset is None)


class FakeLinear(nn.Linear):
    """As quantisation-aware training exports it: weights per channel, inputs per tensor."""

    def forward(self, x):
        scale = self.weight.detach().abs().amax(1) / 127
        weight = torch.fake_quantize_per_channel_affine(
            self.weight, scale, torch.zeros(len(scale), dtype=torch.int32), 0, -128, 127)
        return nn.functional.linear(torch.fake_quantize_per_tensor_affine(x, 0.031, 7, -128, 127),
                                    weight, self.bias)


def test_quantisation_aware_training_keeps_its_scales(tmp_path):
    made = exports.vit()
    for module in list(made.modules()):
        if type(module) is nn.Linear and module is not made.linear:
            module.__class__ = FakeLinear
    path = exports.export(made, tmp_path / "model.onnx", opset=17, dynamo=False)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {
        node.op_type for node in onnx.load(path).graph.node}
    _, kept = quantised_step(path, exports.example(16, 1))
    others = {name for names in kept.report()["others"].values() for name in names}
    assert len(kept.weights) == 5 and not set(kept.weights) & others
    inputs = ["LayerNorm_0", "LayerNorm_1", "Attention_0", "Pointwise_0"]
    assert all(kept.grids[name].step == np.float32(0.031) for name in inputs)
    assert kept.report()["kept"] >= 9


def test_shared_weights_are_one_scale(tmp_path):
    model = fuse(load(text(tmp_path, """
        a = DequantizeLinear <axis = 1> (w, e) b = DequantizeLinear <axis = 1> (w, e)
        c = MatMul(x, a) d = MatMul(x, b) f = Tanh(d) y = Add(c, f)""", w=WEIGHT, e=SCALES)))
    kept = Kept.of(model)
    for node in model.graph:
        if node.op_type == "Linear":
            integers, _ = usable_integers(kept, node.inputs[1].const_value.numpy())
            np.testing.assert_array_equal(integers, WEIGHT.T)
    assert kept.report()["scales"] == 1


@pytest.mark.parametrize("options", [dict(), dict(per_channel=True, symmetric=True),
                                     dict(activation=QuantType.QUInt8)])
def test_qoperator_files_are_read_like_qdq_files(tmp_path, options):
    path = exports.export(exports.vit(), tmp_path / "model.onnx")
    images, steps = exports.example(16, 1), []
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        step, kept = quantised_step(quantise_file(path, images, form=form, **options), images)
        steps.append([op for op in step.operations if hasattr(op, "weight")])
        assert len(set(kept.weights) - {n for r in kept.report()["others"].values() for n in r}) == 6
    for one, other in zip(*steps, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


def test_a_dump_keeps_the_scales(tmp_path):
    path = exports.export(exports.vit(), tmp_path / "model.onnx")
    images = exports.example(16, 1)
    path = quantise_file(path, images, per_channel=True)
    program = compile_model(path, EVEN, {"image": images}, dump=tmp_path / "dump")
    again = compile_model(path, EVEN, {"image": images}, dump=tmp_path / "dump", start="quantise")
    assert again.metadata["kept"] == program.metadata["kept"] and program.metadata["kept"]["kept"] > 15
    assert again.image == program.image


def test_what_check_says_beforehand(tmp_path):
    path = quantise_file(exports.export(exports.vit(), tmp_path / "model.onnx"),
                         exports.example(16, 1), per_channel=True, symmetric=True)
    model = fuse(load(path))
    kept = Kept.of(model)
    survey(kept, partition(model).steps)
    program = compile_model(path, EVEN, {"image": exports.example(16, 1)})
    assert kept.report() == program.metadata["kept"]
    found, = Session(program, GoldenDevice()).run(None, {"image": exports.example(2, 4)})
    assert np.isfinite(found).all()


def test_a_float_model_has_no_scales(tmp_path):
    model = fuse(load(exports.export(exports.vit(), tmp_path / "model.onnx")))
    assert Kept.of(model) == Kept() and not model.metadata_props.get("moeware.kept")


def test_check_lists_the_reasons(tmp_path, capsys):
    path = quantise_file(exports.export(exports.vit(), tmp_path / "model.onnx"),
                         exports.example(16, 1), symmetric=True)
    assert main(["check", str(path)]) == 0
    _, total, *reasons = capsys.readouterr().out.splitlines()
    words = total.split()
    assert total.startswith("can keep ") and 20 <= int(words[2]) < int(words[4])
    assert any("residual stream has 16 bits, on one grid: add_" in line for line in reasons)
