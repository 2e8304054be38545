"""Models that come quantised: onnxruntime's static quantiser, quantisation-aware training, small text
models. Layers are compared with ONNX Runtime in integers.

ONNX Runtime computes ``round_half_even(float32(sum) / step)``, the accelerator
``floor(sum * multiplier / 2**shift + 1/2)`` with a multiplier of 16 bits. So results may differ by one
where the exact quotient lies at a tie, as near as the two are inexact: 2**-16 of the quotient for the
multiplier (it has 2**15 at least and is rounded by 1/2), and a rounding of 2**-24 of the sum of
magnitudes for each of the depth + 4 operations in float32. The zero point of a result is no whole
number of the accumulator's steps: it is rounded to one, half a step at most. `near_ties` is that rule.
"""


import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType
from torch import nn

from moeware.compiler.fuse import fuse
from moeware.compiler.kept_weights import kept_norm
from moeware.compiler.load import load
from moeware.compiler.pipeline import compile_model
from moeware.compiler.scales import encode_scales
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.runtime.session import Session
from moeware.sim.golden import GoldenDevice

from . import exports
from .quantised import quantise_file, quantised_step, values
from .test_models import EVEN

# Options of the quantiser, and the scales that it must be possible to keep with them.
SETTINGS = {
    "symmetric, per channel": dict(symmetric=True, per_channel=True),
    "symmetric, per tensor": dict(symmetric=True),
    "int8 with zero points": dict(per_channel=True),
    "uint8": dict(activation=QuantType.QUInt8, per_channel=True),
    "products alone": dict(activation=QuantType.QUInt8, types=["MatMul", "Gemm", "Conv"]),
    "7 bits": dict(activation=QuantType.QUInt8, reduce_range=True, per_channel=True),
}


class FlatMlp(exports.Mlp):
    """On rows without a batch axis: exporters write Gemm, whose bias comes before the rounding."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Quantised files of a ViT with random weights by setting, made once."""
    made = {}

    def get(setting: str, function=None, **options):
        key = (setting, str(function), str(options))
        if key not in made:
            path = tmp_path_factory.mktemp("qdq") / "model.onnx"
            exports.export(exports.vit(mixer=FlatMlp(function)), path, **options)
            made[key] = quantise_file(path, exports.example(16, 1), **SETTINGS[setting])
        return made[key]
    return get


def stored(path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each)
            for each in onnx.load(str(path)).graph.initializer}


def integers_of(path, tensor: str, images: np.ndarray) -> tuple[np.ndarray, float, int, int]:
    """What the file quantises a tensor to, int64 for each frame; its scale, zero point and least
    integer."""
    graph, arrays = onnx.load(str(path)).graph, stored(path)
    node = next(node for node in graph.node
                if node.op_type == "QuantizeLinear" and node.input[0] == tensor)
    found, = values(path, [node.output[0]], {"image": images})
    scale, zero = (arrays[name] for name in node.input[1:])
    found = found.reshape(len(images), -1, found.shape[-1])
    return found.astype(np.int64), float(scale), int(zero), np.iinfo(zero.dtype).min


def near_ties(exact: np.ndarray, magnitude: np.ndarray, rounded: np.ndarray, depth: int
              ) -> np.ndarray:
    """Where results may differ (see above), in steps of the result; magnitude : the sum of those of
    the products and the bias."""
    inexact = np.abs(exact) * 2.0**-16 + magnitude * (depth + 4) * 2.0**-24 + rounded
    return np.abs(exact - np.floor(exact) - 0.5) <= inexact


def operation(step, name: str):
    return next(op for op in step.operations if op.name == name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("opset, dynamo", [(17, False), (20, True)])
def test_a_linear_and_its_function_have_the_integers_of_onnxruntime(files, setting, opset, dynamo):
    path, images = files(setting, opset=opset, dynamo=dynamo), exports.example(24, 2)
    step, kept = quantised_step(path, exports.example(16, 1))
    linear = operation(step, "Linear_4")
    source, scale_in, zero_in, least_in = integers_of(path, kept.grids["LayerNorm_1"].names[-1], images)
    theirs, scale, zero, least = integers_of(path, kept.grids["Linear_4"].names[0], images)

    weight, weight_scales, bias = gemm(path, "Linear_4")
    np.testing.assert_array_equal(linear.weight, weight)
    moved = least_in + 128 - zero_in  # the zero point of the same integers as int8
    offset = (least + 128 - zero) * scale / (scale_in * weight_scales)  # of the result's grid
    np.testing.assert_array_equal(linear.affine.bias,
                                  np.rint(bias + moved * weight.sum(-1) - offset))
    multiplier, shift = encode_scales(scale_in * weight_scales / scale)
    np.testing.assert_array_equal(linear.affine.multiplier, multiplier)
    np.testing.assert_array_equal(linear.affine.shift, shift)

    accumulator = (source - least_in - 128) @ weight.T + linear.affine.bias
    ours = numerics.requantise(accumulator, linear.affine.multiplier, linear.affine.shift)
    theirs = theirs - least - 128
    products = source - zero_in
    unit = scale_in * weight_scales / scale
    exact = (products @ weight.T + bias) * unit
    magnitude = (np.abs(products) @ np.abs(weight).T + np.abs(bias)) * unit
    differ = ours != theirs
    assert np.abs(ours - theirs).max() <= 1
    rounded = 0.5 * unit * bool(offset.any())
    assert near_ties(exact, magnitude, rounded, exports.DIM)[differ].all()
    assert differ.sum() <= 0.005 * differ.size

    if dynamo or setting == "products alone":  # else the file rounds inside of its function, too
        found, _, _, least = integers_of(path, kept.grids["Pointwise_0"].names[0], images)
        np.testing.assert_array_equal(linear.table[theirs & 255], found - least - 128)


def gemm(path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [N, K] weight, float64 scales and int64 bias of a Gemm in the file, by the canonical layer
    that it becomes."""
    node = {node.name: node for node in fuse(load(path)).graph}[name]
    real, arrays = node.inputs[1].const_value.numpy(), stored(path)
    file = onnx.load(str(path)).graph.node
    made = {each.output[0]: each for each in file}
    for product in (each for each in file if each.op_type == "Gemm"):
        weight, scale = (arrays[each] for each in made[product.input[1]].input[:2])
        if weight.shape == real.shape and np.array_equal(
                real, weight.astype(np.float32) * scale.reshape(-1, *[1] * scale.ndim)):
            bias = arrays[made[product.input[2]].input[0]]
            return (weight.astype(np.int64), np.broadcast_to(scale.astype(np.float64), len(weight)),
                    bias.astype(np.int64))
    raise AssertionError(f"no Gemm is {name}")



@pytest.mark.parametrize("setting", SETTINGS)
def test_a_block_ends_in_the_integers_of_onnxruntime(files, setting):
    """Its result is wide here: rounded to the file's grid it is the file's, but where half a step of
    the stream decides."""
    path, images = files(setting), exports.example(24, 2)
    step, kept = quantised_step(path, exports.example(16, 1))
    linear, stream = operation(step, "Linear_5"), step.outputs[0]
    unit = next(op for op in step.operations if op.output == "Add_1")
    assert unit is linear and isinstance(linear, q.AddLinear)
    source, scale_in, zero_in, least_in = integers_of(path, kept.grids["Pointwise_0"].names[0], images)
    theirs, scale, zero, least = integers_of(path, kept.grids["Linear_5"].names[-1], images)
    weight, weight_scales, bias = gemm(path, "Linear_5")
    np.testing.assert_array_equal(linear.weight, weight)
    moved = least_in + 128 - zero_in
    np.testing.assert_array_equal(linear.affine.bias, bias + moved * weight.sum(-1))
    accumulator = (source - least_in - 128) @ weight.T + linear.affine.bias
    ours = numerics.requantise(accumulator, linear.affine.multiplier, linear.affine.shift, 16)
    step_of_stream = stream_step(linear, scale_in * weight_scales)
    products = source - zero_in
    per_step = scale_in * weight_scales / scale
    exact = (products @ weight.T + bias) * per_step
    magnitude = (np.abs(products) @ np.abs(weight).T + np.abs(bias)) * per_step
    differ = np.clip(np.rint(ours * step_of_stream / scale) + zero, least, least + 255) != theirs
    # Half a step of the stream, and what the multiplier that the step is read from is inexact.
    wide = 0.5 * step_of_stream / scale + np.abs(exact) * 2.0**-16
    assert near_ties(exact, magnitude, wide, exports.HIDDEN)[differ].all()
    assert differ.mean() < 0.02
    assert kept.noted[kept.grids["Linear_5"].names[-1]].startswith("what is added to the residual")
    assert stream.name == "logits"


def stream_step(linear, accumulator: np.ndarray) -> float:
    """Of the stream, by a layer's scale; of 16 bits, like a multiplier."""
    scale = linear.affine.multiplier / 2.0 ** linear.affine.shift
    return float(np.median(accumulator / scale))


@pytest.mark.parametrize("gamma", [0.7, -0.7, 0.0, 1e-9, -1e-4])
@pytest.mark.parametrize("beta", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("middle", [0, 17, -128])
@pytest.mark.parametrize("channels, one", [(1, 1024), (4096, 256)])
def test_a_norm_is_on_the_grid_of_the_file(gamma, beta, middle, channels, one):
    step = 0.021
    affine, gain, shift = kept_norm(np.full(channels, gamma), np.full(channels, beta), step, middle * step)
    normal = np.arange(-32 * one, 32 * one)
    found = numerics.requantise(normal + int(affine.bias[0]), int(affine.multiplier[0]),
                                int(affine.shift[0]))
    real = step * found * (1 if gain is None else gain[0]) + (0 if shift is None else shift[0])
    steps = np.rint(real / step) - middle  # as int8 of the file's grid
    assert np.abs(real / step - np.rint(real / step)).max() < 1e-9
    assert -128 <= steps.min() and steps.max() <= 127
    exact = (gamma * normal / one + beta) / step - middle
    wanted = np.clip(np.rint(exact), -128, 127)
    # The bias is rounded to a unit of normalised values, the multiplier to 16 bits; a gamma below
    # 2**-20 of beta is 2**-20 of it.
    inexact = 0.5 * max(abs(gamma), abs(beta - middle * step) / 2**20) / one / step
    inexact += 2.0**-15 * (np.abs(exact) + abs(beta) / step + 128) + (abs(gamma) < 1e-5) * 0.01
    ties = np.abs(exact - np.floor(exact) - 0.5) <= inexact
    np.testing.assert_array_equal(steps[~ties], wanted[~ties])
    assert np.abs(steps - wanted).max() <= 1 and ties.mean() < 0.2 or abs(gamma) < 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("opset, dynamo", [(17, False), (20, True)])
def test_a_vit_answers_like_its_file(files, setting, opset, dynamo, tmp_path):
    """Against ONNX Runtime on the quantised file. It rounds the residual stream, scores and
    probabilities to 8 bits where the file says so, the accelerator has 16 and 10 bits there: two
    answers differ by the roundings of both. So against the float model ours must be no farther than
    the file's own answer (and 1 % of the logits' spread, the error of int8 elsewhere), and from the
    file's no farther than both of these are from it.
    """
    path, images = files(setting, opset=opset, dynamo=dynamo), exports.example(48, 3)
    program = compile_model(path, EVEN, {"image": exports.example(16, 1)})
    ours, = Session(program, GoldenDevice()).run(None, {"image": images})
    np.testing.assert_array_equal(ours, Session(program, "torch").run(None, {"image": images})[0])
    real = exports.run_onnx(path.with_name("model.onnx"), image=images)[0]
    theirs = np.concatenate([exports.run_onnx(path, image=image[None])[0] for image in images])
    spread = real.std()
    lost, file_lost, apart = (np.sqrt(np.square(a - b).mean()) / spread
                              for a, b in ((ours, real), (theirs, real), (ours, theirs)))
    assert lost <= file_lost + 0.01 and apart <= np.hypot(lost, file_lost) + 0.01 < 0.08
    kept = program.metadata["kept"]
    assert kept["kept"] == kept["scales"] - sum(map(len, kept["others"].values()))
    assert not {name for reason, names in kept["others"].items() for name in names
                if reason == "no layer of the accelerator uses it"}


def test_all_weights_and_grids_that_have_a_place_are_kept(files):
    path = files("symmetric, per channel")
    _, kept = quantised_step(path, exports.example(16, 1))
    report = kept.report()
    others = {name for names in report["others"].values() for name in names}
    assert set(kept.weights) and not set(kept.weights) & others
    placed = ["image", "LayerNorm_0", "Linear_0", "Linear_1", "Linear_2", "Attention_0", "LayerNorm_1",
              "Linear_4", "Pointwise_0", "LayerNorm_2"]
    assert not {name for value in placed for name in kept.grids[value].names} & others


@pytest.mark.parametrize("per_channel", [False, True])
def test_experts_keep_their_integers(tmp_path, per_channel):
    path = exports.export(exports.vit(mixer=exports.Moe()), tmp_path / "model.onnx")
    path = quantise_file(path, exports.example(16, 1), per_channel=per_channel, prepare=False)
    step, kept = quantised_step(path, exports.example(16, 1))
    experts = operation(step, "Experts_0")
    found = {node.name: node for node in fuse(load(path)).graph}["Experts_0"]
    for place, weight in ((3, experts.up), (5, experts.down)):
        integers, _ = kept.integers(found.inputs[place].const_value.numpy())
        np.testing.assert_array_equal(weight, integers)
        for expert in weight:
            assert any(np.array_equal(expert, array) for array in stored(path).values())
    gate = next(name for name in kept.weights if "gate" in name)
    assert bool(kept.noted[gate]) == per_channel  # logits of a gate have one scale


@pytest.mark.parametrize("function", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
def test_other_functions(files, function):
    path = files("products alone", function)
    _, kept = quantised_step(path, exports.example(16, 1))
    assert kept.noted[kept.grids["Pointwise_0"].names[0]] == ""
