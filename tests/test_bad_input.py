"""Bad input at the command line: one line that names the thing, status 1, nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moeware import cli
from moeware.hw.arch.program import Program
from moeware.runtime import board_device, device

from .hw.arch.configs import CONFIGS, config
from .runtime.reference import Graph

DIM, PATCHES, CLASSES = 4, 4, 3


def model(*, opset: int = 18, image=("batch", 1, 4, 4), weight: float = 0.5,
          elements: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Patches of 2 x 2, a normalisation, a branch, the mean of the tokens, a head."""
    draw = np.random.default_rng(0)
    arrays = {"kernel": draw.normal(size=(DIM, 1, 2, 2)), "gamma": np.ones(DIM),
              "beta": np.zeros(DIM), "branch": draw.normal(size=(DIM, DIM)),
              "head": draw.normal(size=(DIM, CLASSES))}
    arrays["branch"][1, 2] = weight
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["maps"], strides=[2, 2]),
        helper.make_node("Reshape", ["maps", "rows"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["x"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["y"]),
        helper.make_node("MatMul", ["y", "branch"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["stream"]),
        helper.make_node("LayerNormalization", ["stream", "gamma", "beta"], ["normal"]),
        helper.make_node("ReduceMean", ["normal", "axis"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "head"], ["logits"])]
    weights = [numpy_helper.from_array(array.astype(np.float32), name)
               for name, array in arrays.items()]
    weights += [numpy_helper.from_array(np.array(value, np.int64), name)
                for name, value in (("rows", [0, DIM, -1]), ("axis", [1]))]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", elements, image)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])], weights)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", opset)])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Good files, and bad ones made from them."""
    folder = tmp_path_factory.mktemp("pristine")
    draw = np.random.default_rng(1)
    images = draw.normal(size=(9, 1, 4, 4)).astype(np.float32)
    onnx.save(model(), folder / "good.onnx")
    raw = (folder / "good.onnx").read_bytes()
    (folder / "text.onnx").write_text("this is no model\n")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "truncated.onnx").write_bytes(raw[:len(raw) // 2])
    onnx.save(model(), folder / "external.onnx", save_as_external_data=True, size_threshold=0,
              location="weights.bin")
    os.unlink(folder / "weights.bin")
    onnx.save(model(), folder / "short.onnx", save_as_external_data=True, size_threshold=0,
              location="short.bin")
    (folder / "short.bin").write_bytes((folder / "short.bin").read_bytes()[:40])
    onnx.save(model(image=("batch", 1, "height", 4)), folder / "dynamic.onnx")
    onnx.save(model(image=(8, 1, 4, 4)), folder / "batch8.onnx")
    onnx.save(model(opset=11), folder / "old.onnx")
    onnx.save(model(opset=99), folder / "new.onnx")
    onnx.save(model(weight=np.nan), folder / "nan.onnx")
    onnx.save(model(weight=np.inf), folder / "infinite.onnx")
    onnx.save(model(elements=TensorProto.DOUBLE), folder / "double.onnx")
    np.savez(folder / "images.npz", image=images)
    np.savez(folder / "shape.npz", image=images[:, :, :2])
    np.savez(folder / "flat.npz", image=images.reshape(-1))
    np.savez(folder / "strings.npz", image=np.array(["a", "b"] * 8).reshape(1, 1, 4, 4))
    np.savez(folder / "none.npz", image=images[:0])
    np.savez(folder / "nan.npz", image=np.where(images > 1, np.nan, images))
    np.savez(folder / "huge.npz", image=images * np.float32(1e30))
    np.savez(folder / "names.npz", left=images, right=images)
    np.savez(folder / "nothing.npz")
    (folder / "text.npz").write_text("no archive")
    (folder / "cut.npz").write_bytes((folder / "images.npz").read_bytes()[:300])
    (folder / "folder").mkdir()
    for name, sizes in (("config", {}), ("small", {"activation_words": 4}),
                        ("narrow", {"residual_words": 4}), ("few", {"max_rows": 2})):
        chosen = config(2, 4, 2, 2, 2, 8, activation_banks=1, **sizes)
        (folder / f"{name}.json").write_text(json.dumps(chosen.to_dict()))
    (folder / "odd.json").write_text(json.dumps(CONFIGS[0].to_dict() | {"depth": 0}))
    graph = Graph(0)
    graph.linear(graph.input(2, 3), 4)
    graph.program("linear0").save(folder / "good.moe")
    raw = (folder / "good.moe").read_bytes()
    (folder / "cut.moe").write_bytes(raw[:-20])
    (folder / "flipped.moe").write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    (folder / "zero.moe").write_bytes(b"")
    good = np.ones((3, 2, 3), np.float32)
    for name, arrays in (("feeds", {"input0": good}), ("feed-name", {"input1": good, "x": good}),
                         ("feed-shape", {"input0": good[:, :1]}),
                         ("feed-type", {"input0": good.astype(np.int32)}),
                         ("feed-none", {"input0": good[:0]}),
                         ("feed-nan", {"input0": good * np.float32(np.nan)})):
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def compiling(model: str = "good.onnx", configuration: str = "config.json",
              samples: str = "images.npz", output: str = "out.moe") -> list[str]:
    return ["compile", model, "--config", configuration, "--calibration", samples, "-o", output]


def running(program: str = "good.moe", feeds: str = "feeds.npz", *more: str) -> list[str]:
    return ["run", program, feeds, "--device", "torch", *more, "-o", "out.npz"]


CASES = {
    "no model": (compiling("absent.onnx"), "Model file must exist, not 'absent.onnx'"),
    "folder as model": (compiling("folder"), "Model file must exist, not 'folder'"),
    "text": (compiling("text.onnx"), "Model text.onnx must be a complete ONNX file"),
    "empty": (compiling("empty.onnx"), "Model empty.onnx must be an ONNX file with a graph"),
    "truncated": (compiling("truncated.onnx"), ("Model truncated.onnx must be a complete ONNX file, "
                  "not one that is truncated")),
    "external data": (compiling("external.onnx"), ("must be beside the model, but 'weights.bin' is "
                      "missing")),
    "short external data": (compiling("short.onnx"), "must be readable from 'short.bin'"),
    "dynamic": (compiling("dynamic.onnx"), ("Axis 2 of graph input 'image' must be fixed, not dynamic "
                "(height)")),
    "batch of 8": (compiling("batch8.onnx"), ("Batch axis of graph input 'image' must be dynamic or 1, "
                   "not 8")),
    "old opset": (compiling("old.onnx"), "Opset of ai.onnx must be between 17 and 24, not 11"),
    "new opset": (compiling("new.onnx"), "Opset of ai.onnx must be between 17 and 24, not 99"),
    "nan": (compiling("nan.onnx"), "Initializer 'branch' must be finite, not hold 1 NaN values"),
    "infinite": (compiling("infinite.onnx"), ("Initializer 'branch' must be finite, not hold 1 "
                 "infinite values")),
    "wrong types": (compiling("double.onnx"), "Node 'Conv_0' (Conv) must have operands"),
    "check text": (["check", "text.onnx"], "Model text.onnx must be a complete ONNX file"),
    "no samples": (compiling(samples="absent.npz"), "Calibration data absent.npz must be"),
    "samples of no kind": (compiling(samples="text.npz"), "Calibration data text.npz must be"),
    "cut samples": (compiling(samples="cut.npz"), "Calibration data cut.npz must be"),
    "samples of wrong shape": (compiling(samples="shape.npz"), ("Calibration data 'image' must have "
                               "the shape [frames, 1, 4, 4], not [9, 1, 2, 4]")),
    "flat samples": (compiling(samples="flat.npz"), "Calibration data 'image' must have the shape"),
    "strings": (compiling(samples="strings.npz"), "Calibration data 'image' must be numbers"),
    "no frames": (compiling(samples="none.npz"), ("Calibration data 'image' must have at least one "
                  "frame")),
    "no arrays": (compiling(samples="nothing.npz"), ("Calibration data nothing.npz must hold an array "
                  "'image'")),
    "other arrays": (compiling(samples="names.npz"), ("must hold an array 'image' or 'calibration', "
                     "not ['left', 'right']")),
    "empty folder": (compiling(samples="folder"), "folder must hold .npy files of the one input"),
    "nan samples": (compiling(samples="nan.npz"), "Calibration data 'image' must be finite"),
    "huge samples": (compiling(samples="huge.npz"), "must stay finite on the calibration data"),
    "no board": (compiling(configuration="absent"), "Board must be one of"),
    "no configuration": (compiling(configuration="absent.json"), ("Configuration absent.json must be a "
                         "readable JSON file")),
    "bad field": (compiling(configuration="odd.json"), ("Config.depth must be an integer between 1 and "
                  "64, not 0")),
    "small activations": (compiling(configuration="small.json"), ("words must fit in the activation "
                          "memory of 4 words beside")),
    "small residual": (compiling(configuration="narrow.json"), ("words must fit in the residual "
                       "memory of 4 words")),
    "few rows": (compiling(configuration="few.json"), ("The keys of MeanTokens_0 takes 4, 2 more than "
                 "Config.max_rows = 2")),
    "no such folder": (compiling(output="absent/out.moe"), "absent"),
    "program into a folder": (compiling(output="folder"), "folder"),
    "wrong stage": ([*compiling(), "--stop", "fly"], "Stage must be one of load, "),
    "no dump": ([*compiling(), "--start", "tile"], "Starting at 'tile' must have a dump folder"),
    "empty dump": ([*compiling(), "--start", "tile", "--dump", "folder"], ("Dump folder folder must "
                   "hold the stage 'quantise'")),
    "file as dump": ([*compiling(), "--dump", "good.moe"], "File exists: 'good.moe'"),
    "no program": (running("absent.moe"), "No such file or directory: 'absent.moe'"),
    "folder as program": (running("folder"), "Is a directory: 'folder'"),
    "empty program": (running("zero.moe"), "zero.moe must start with"),
    "array as program": (running("feeds.npz"), "feeds.npz must start with"),
    "model as program": (running("good.onnx"), "compile the model once and open the program"),
    "cut program": (running("cut.moe"), "cut.moe is truncated or damaged"),
    "flipped program": (running("flipped.moe"), "flipped.moe is truncated or damaged"),
    "no feeds": (running(feeds="absent.npz"), "No such file or directory: 'absent.npz'"),
    "feeds of no kind": (running(feeds="text.npz"), "Inputs text.npz must be a .npz or .npy file"),
    "cut feeds": (running(feeds="cut.npz"), "Inputs cut.npz must be a .npz or .npy file"),
    "folder as feeds": (running(feeds="folder"), "Is a directory: 'folder'"),
    "feed of another name": (running(feeds="feed-name.npz"), "must have the array 'input0'"),
    "feed of wrong shape": (running(feeds="feed-shape.npz"), ("Feed 'input0' must have the shape "
                            "['batch', 2, 3], not [3, 1, 3]")),
    "feed of wrong type": (running(feeds="feed-type.npz"), ("Feed 'input0' must be a numpy array of "
                           "float32")),
    "feed without frames": (running(feeds="feed-none.npz"), ("Feed 'input0' must have at least one "
                            "frame")),
    "feed of nan": (running(feeds="feed-nan.npz"), "Feed 'input0' must be numbers, not hold NaN"),
    "no frames asked for": (running("good.moe", "feeds.npz", "--frames", "0"), "at least one"),
    "negative frames": (running("good.moe", "feeds.npz", "--frames", "-1"), "at least one"),
    "outputs into nowhere": ([*running(), "-o", "absent/out.npz"], "absent"),
    "outputs into a folder": ([*running(), "-o", "folder"], "folder"),
}


@pytest.fixture
def folder(pristine, tmp_path, monkeypatch) -> Path:
    """A copy of `pristine`, to which a previous run has written its outputs."""
    copy = tmp_path / "work"
    shutil.copytree(pristine, copy)
    for name in ("out.moe", "out.npz"):
        (copy / name).write_text("from before")
    monkeypatch.chdir(copy)
    monkeypatch.setattr(board_device, "find_ports", list)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
            for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(folder, capsys, case):
    arguments, message = CASES[case]
    before = contents(folder)
    assert cli.main(arguments) == 1
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if not line.startswith("moeware: good.moe")]
    assert not out and "Traceback" not in error
    assert lines[-1].startswith("moeware: error: ") and message in lines[-1], error
    assert contents(folder) == before


def test_good_input_replaces_what_was_there(folder, capsys):
    assert cli.main(compiling()) == 0, capsys.readouterr().err
    assert cli.main(running()) == 0
    assert Program.load("out.moe").placement.startswith("fpga")
    assert np.load("out.npz")["linear0"].shape == (3, 2, 4)


class OtherBoard:
    """A board that was built for another configuration."""

    name, counters = "board", []
    config = config(1, 2, 2, 1, 1, 2)


def test_a_program_of_another_configuration_names_both(folder, capsys, monkeypatch):
    monkeypatch.setitem(device._factories, "board", lambda config, **options: OtherBoard())
    before = contents(folder)
    arguments = running()
    arguments[arguments.index("torch")] = "board"
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    for digest in (OtherBoard.config.digest, Program.load("good.moe").config.digest):
        assert f"{digest:#010x}" in error
    assert error.startswith("moeware: error: Configuration of board must have the digest")
    assert contents(folder) == before


@pytest.mark.parametrize("arguments", [compiling(), running()], ids=["compile", "run"])
def test_a_write_that_fails_leaves_the_file_as_it_was(folder, capsys, monkeypatch, arguments):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    monkeypatch.setattr(os, "replace", full)
    before = contents(folder)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("moeware: error: ") and f"No space left on device: '{arguments[-1]}'" in error
    assert contents(folder) == before
