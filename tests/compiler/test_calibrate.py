import numpy as np
import pytest

from moeware.compiler.calibrate import calibrate, load_samples
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load

from .exports import Moe, export, vit

INPUTS = [("image", (1, 8, 8), "tensor(float)")]


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_by_input_name_or_as_calibration(tmp_path):
    frames = np.zeros((3, 1, 8, 8), np.float32)
    for name in ("image", "calibration", "anything"):
        assert load_samples(save(tmp_path / f"{name}.npz", **{name: frames}), INPUTS)[
            "image"].shape == (3, 1, 8, 8)


def test_folder_of_frames_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        np.save(tmp_path / f"{number}.npy", np.full((1, 8, 8), number, np.float32))
    assert load_samples(tmp_path, INPUTS)["image"][:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("arrays, message", [
    ({"image": np.zeros((3, 8, 8))}, r"must have the shape \[frames, 1, 8, 8\], not \[3, 8, 8\]"),
    ({"image": np.zeros((0, 1, 8, 8))}, "at least one frame, not 0"),
    ({"image": np.full((1, 1, 8, 8), "a")}, "must be numbers, not <U1"),
    ({"image": np.full((1, 1, 8, 8), np.nan)}, "must be finite"),
    ({"x": np.zeros(1), "y": np.zeros(1)}, r"must hold an array 'image' or 'calibration', not \['x'"),
    ({}, "must hold an array 'image'"),
])
def test_bad_data_is_named(tmp_path, arrays, message):
    with pytest.raises(CompileError, match=message):
        load_samples(save(tmp_path / "c.npz", **arrays), INPUTS)


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_not_an_array_file(tmp_path, content):
    path = tmp_path / "c.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CompileError, match="must be an .npz file or a folder"):
        load_samples(path, INPUTS)


def test_empty_folder(tmp_path):
    with pytest.raises(CompileError, match="must hold .npy files .* not 0 files"):
        load_samples(tmp_path, INPUTS)


def test_every_tensor_is_sampled_and_experts_are_counted(tmp_path):
    model = fuse(load(export(vit(mixer=Moe("loop")), tmp_path / "m.onnx")))
    frames = np.random.default_rng(0).normal(size=(40, 3, 8, 12)).astype(np.float32)
    seen = []
    result = calibrate(model, {"image": frames}, progress=seen.append)
    assert seen == [32, 8] and result.frames == 40
    for node in model.graph:
        for value in node.outputs:
            if value.dtype.name == "FLOAT" and node.op_type != "Route":
                assert len(result.rows(value.name)) > 0
    experts = next(node for node in model.graph if node.op_type == "Experts")
    rows, chosen = experts.inputs[1].shape[1:]
    assert result.tokens[experts.name].sum() == 40 * rows * chosen


def test_starved_experts_are_reported(tmp_path):
    model = fuse(load(export(vit(mixer=Moe("loop")), tmp_path / "m.onnx")))
    result = calibrate(model, {"image": np.zeros((1, 3, 8, 12), np.float32)})
    assert result.starved and all("/expert" in line and "tokens" in line for line in result.starved)


def test_a_tensor_without_samples_is_named():
    from moeware.compiler.calibrate import Calibration
    with pytest.raises(CompileError, match="Tensor 'x' must be reached"):
        Calibration().rows("x")
