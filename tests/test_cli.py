"""The command line: each command's facts, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import moeware
from moeware import cli
from moeware.cli import compile as compile_command
from moeware.cli import doctor, tables
from moeware.hw.arch.config import Config
from moeware.hw.arch.program import Program
from moeware.runtime import board_device, device
from moeware.runtime.drive import counter_names
from moeware.runtime.session import Session
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice

from .compiler.exports import DIM, Block, Moe, PackedAttention, Vit, export, randomise
from .runtime.reference import Graph

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CONFIG = Config(tokens=4, outputs=8, depth=8, queries=4, lanes=8, bus_bytes=8, activation_banks=4,
                activation_words=4096, residual_words=2048, weight_words=512, param_words=512,
                tables=4, row_words=64, max_rows=64, max_experts=16, max_chosen=4, queue=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The digits model with few samples, a configuration, and a small program of one layer."""
    folder = tmp_path_factory.mktemp("cli")
    with np.load(DIGITS / "digits_samples.npz") as samples:
        np.savez(folder / "samples.npz", calibration=samples["calibration"][:24],
                 images=samples["images"][:6], labels=samples["labels"][:6])
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    graph = Graph(0)
    graph.linear(graph.input(2, 3), 4)
    graph.program("linear0").save(folder / "layer.moe")
    np.savez(folder / "layer.npz", input0=np.ones((5, 2, 3), np.float32))
    np.save(folder / "layer.npy", np.ones((5, 2, 3), np.float32))
    return folder


@pytest.fixture
def moe(folder, capsys, monkeypatch):
    """Runs a command; returns its exit status, what it printed, and its errors."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(board_device, "find_ports", list)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(arguments)
        return status, *capsys.readouterr()
    return run


def facts(result: tuple[int, str, str]) -> dict:
    assert result[0] == 0, result[2]
    return json.loads(result[1])


def test_check_says_where_nodes_run(moe, folder):
    status, out, _ = moe("check", str(DIGITS / "digits.onnx"))
    assert status == 0 and "fpga 52/52 nodes, 100.0 % of MACs" in out
    assert moe("check", str(DIGITS / "digits.onnx"), "--config", "config.json")[1] == out
    assert "'nothing'" in moe("check", str(DIGITS / "digits.onnx"), "--config", "nothing")[2]
    (folder / "odd.onnxtxt").write_text(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 3, 4] x) => (float[n, 3, 4] y) '
        "{ y = Sin(x) }")
    status, out, _ = moe("check", "odd.onnxtxt")
    head, _, columns, *rows = out.splitlines()
    assert status == 0 and "fpga 0/1 nodes" in head and len(rows) == 2
    assert columns.split("  ")[0] == "node" and columns.endswith("what to change")
    assert "Sin has no form on the accelerator" in rows[0] and "leave it out of" in rows[0]
    assert moe("check", "odd.onnxtxt", "--strict")[0] == 1
    result = facts(moe("check", "odd.onnxtxt", "--json"))
    assert result["host_nodes"] == 1 == len(result["problems"])


def test_check_refuses_what_is_silently_wrong(moe, tmp_path):
    export(randomise(Vit(Block(PackedAttention(), Moe("sorted_split"), lambda: nn.LayerNorm(DIM)))),
           tmp_path / "m.onnx", opset=17, dynamo=False)
    status, out, error = moe("check", str(tmp_path / "m.onnx"))
    assert status == 1 and not out
    assert "counts of the example input and wrong for any other; export the experts as" in error


def test_run(moe, folder):
    result = facts(moe("run", "layer.moe", "layer.npz", "-o", "out.npz", "--json"))
    assert result["frames"] == 5 and result["outputs"] == {"linear0": [5, 2, 4]}
    assert result["device"] == "torch" and "(no board found)" in result["placement"]
    session = Session(Program.load(folder / "layer.moe"), "torch")
    expected = session.run(None, dict(np.load(folder / "layer.npz")))[0]
    with np.load(folder / "out.npz") as saved:
        np.testing.assert_array_equal(saved["linear0"], expected)
    status, out, _ = moe("run", "layer.moe", "layer.npy", "--frames", "2", "--device", "torch")
    assert status == 0 and "2 frames in" in out and "linear0 [2, 2, 4]" in out


def test_bits_of_experts(moe, folder):
    """An average, with its table; nested, with both widths from one file."""
    model = (str(DIGITS / "digits.onnx"), "--config", "config.json", "--calibration", "samples.npz")
    result = facts(moe("compile", *model, "--expert-bits", "3", "-o", "mixed.moe", "--json"))
    bits = result["metadata"]["expert_bits"]
    assert bits["wanted"] == 3 and bits["average"] <= 3 and list(bits["layers"]) == ["Experts_0", "Experts_1"]
    text = compile_command.text(result)
    assert "bits of experts' weights: 3.00 on average" in text and "with 2 bits for each" in text
    status, _, errors = moe("compile", *model, "--expert-bits", "1")
    assert status == 1 and "must be between 2 and 8, not 1" in errors and "Traceback" not in errors

    result = facts(moe("compile", *model, "--nested", "-o", "nested.moe", "--json"))
    assert result["upper_estimate"]["cycles"] < result["estimate"]["cycles"]
    assert "with --expert-bits 4:" in compile_command.text(result)
    images = ("samples.npz", "--array", "images")
    outputs = []
    for more in ((), ("--expert-bits", "8"), ("--expert-bits", "4")):
        facts(moe("run", "nested.moe", *images, *more, "--device", "torch", "-o", "out.npz", "--json"))
        outputs.append(np.load(folder / "out.npz")["logits"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert 0 < np.abs(outputs[2] - outputs[0]).max() < np.abs(outputs[0]).max() / 5
    noise = []
    for bits in ("8", "4"):
        result = facts(moe("compare", str(DIGITS / "digits.onnx"), "nested.moe", *images, "--frames", "9",
                           "--expert-bits", bits, "--json"))
        noise.append(next(layer["rms_error"] for layer in result["layers"]
                          if layer["layer"] == "Experts_0"))
    assert noise[0] < noise[1]
    status, _, errors = moe("run", "mixed.moe", *images, "--expert-bits", "4")
    assert status == 1 and "compile it so (--nested)" in errors


def test_starved_experts_come_with_a_remedy():
    found = {"program": "x.moe", "placement": "", "file_bytes": 1, "config_digest": "0x0", "image_bytes": 1,
             "dram_bytes": 1, "macs_per_frame": 1, "upper_estimate": None,
             "estimate": {"cycles": 1, "steps": [], "seconds": 1, "clock_hz": 1, "dram": "sdram"},
             "metadata": {"plans": [], "expert_bits": None, "kept": {"scales": 0},
                          "starved_experts": ["Experts_0/expert3: 0 tokens"]}}
    assert "reached: Experts_0/expert3: 0 tokens; " in compile_command.text(found)
    assert "Calibrate with more inputs" in compile_command.text(found)


def test_compile_simulate_and_demo(moe, folder, monkeypatch):
    model = str(DIGITS / "digits.onnx")
    result = facts(moe("compile", model, "--config", "config.json", "--calibration", "samples.npz",
                       "--trace", "--json"))
    assert result["program"] == "digits.moe" and (folder / "digits.moe").stat().st_size > 1000
    assert int(result["config_digest"], 0) == CONFIG.digest and result["macs_per_frame"] > 1e6
    estimate = result["estimate"]
    assert 0 < estimate["cycles"] == sum(step["cycles"] for step in estimate["steps"])
    assert "cycles a frame" in compile_command.text(result)
    images = ("samples.npz", "--array", "images")
    result = facts(moe("simulate", "digits.moe", *images, "--frames", "2", "--compare", "--json",
                       "--device", "golden", "--device", "torch"))
    assert result["comparison"]["equal"] and result["comparison"]["values"] > 50000
    assert result["devices"]["golden"]["counters"]["instructions"] > 50
    result = facts(moe("profile", "digits.moe", *images, "--frame", "1", "-o", "profile", "--json"))
    assert {"trace", "roofline"} <= set(result) and len(result["steps"]) == 1
    cycles, = result["estimated_cycles"]
    assert abs(cycles / result["steps"][0]["cycles"] - 1) < 0.05
    assert json.loads((folder / "profile" / "profile.json").read_text()) == result
    assert json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert (folder / "profile" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    out = moe("profile", "digits.moe", *images, "-o", "profile")[1]
    assert "Experts_0/expert0" in out and "neither array works in" in out
    status, out, _ = moe("simulate", "digits.moe", *images, "--device", "golden", "--device",
                         "torch", "--compare")
    assert status == 0 and "golden = PyTorch" in out and "0 differences" in out

    monkeypatch.setitem(device._factories, "rtl", lambda config: GoldenDevice())
    result = facts(moe("demo", "--model", model, "--samples", "samples.npz", "--config",
                       "config.json", "--frames", "1", "--out", "report", "--json"))
    assert result["rtl"]["equal"] and result["accuracy"]["images"] == 6
    assert 0.8 < min(result["expert_agreement"].values()) <= 1
    assert json.loads((folder / "report" / "report.json").read_text())["rtl"] == result["rtl"]
    assert (folder / "report" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_profile_of_a_board_is_its_counters(moe, folder, monkeypatch):
    class Board(TorchDevice):
        name = "a board"

        def run(self, *arguments, **options):
            results = super().run(*arguments, **options)
            self.counters = [dict.fromkeys(counter_names(), 12)]
            return results
    monkeypatch.setitem(device._factories, "board", lambda config, **options: Board())
    status, out, _ = moe("profile", "layer.moe", "layer.npz", "--device", "board", "-o", "counters")
    assert status == 0 and "12 instructions" in out and "executed by a board" in out
    assert [path.name for path in (folder / "counters").iterdir()] == ["profile.json"]


def test_a_comparison_that_fails_ends_with_status_1(moe, folder, monkeypatch):
    class Wrong(GoldenDevice):
        def run(self, program, step, inputs, **options):
            from moeware.runtime.torch_path import TorchDevice
            found = TorchDevice().run(program, step, inputs, **options)
            found["linear0"][1, 0, 2] += 1
            return found
    monkeypatch.setitem(device._factories, "golden", lambda config: Wrong())
    status, out, _ = moe("simulate", "layer.moe", "layer.npz", "--frames", "3", "--compare",
                         "--device", "torch", "--device", "golden")
    assert status == 1 and "1 difference" in out and "frame 1" in out and "channel 2" in out


@pytest.mark.parametrize("arguments, message", [
    (["run", "nothing.moe", "layer.npz"], "No such file"),
    (["run", "layer.npz", "layer.npz"], "must start with"),
    (["run", "layer.moe", "nothing.npz"], "No such file"),
    (["run", "layer.moe", "config.json"], "must be a .npz or .npy file"),
    (["run", "layer.moe", "samples.npz"], "choose one with --array"),
    (["run", "layer.moe", "samples.npz", "--array", "labels"], "numpy array of float32"),
    (["run", "layer.moe", "samples.npz", "--array", "other"], "must be one of"),
    (["run", "layer.moe", "layer.npz", "--device", "gpu"], "Device must be one of"),
    (["run", "layer.moe", "layer.npz", "--device", "board", "--strict"], "no board found"),
    (["check", "layer.npz"], "must be a complete ONNX file"),
    (["compile", "x.onnx", "--config", "layer.json", "--calibration", "samples.npz"], "Model file"),
    (["demo", "--model", "x.onnx"], "Demo must have the file x.onnx")])
def test_errors_are_one_line(moe, arguments, message):
    status, out, error = moe(*arguments)
    assert status == 1 and not out
    line = error.splitlines()[-1]
    assert line.startswith("moeware: error: ") and message in line and "Traceback" not in error


def test_configurations(folder, monkeypatch):
    assert moeware.find_config(CONFIG) is CONFIG
    assert moeware.find_config(folder / "config.json") == CONFIG
    (folder / "list.json").write_text("[]")
    (folder / "broken.json").write_text("{")
    (folder / "short.json").write_text('{"tokens": 4}')
    for name, message in (("list.json", "JSON object"), ("broken.json", "readable JSON"),
                          ("none.json", "readable JSON"), ("short.json", "exactly the fields")):
        with pytest.raises(ValueError, match=message):
            moeware.find_config(folder / name)


def test_a_session_on_an_onnx_file_needs_calibration():
    with pytest.raises(ValueError, match="config and calibration"):
        moeware.Session(DIGITS / "digits.onnx", "torch")


def test_faults_of_moeware_show_where_they_are(moe, monkeypatch):
    def broken(arguments):
        raise KeyError("bug")
    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(KeyError):
        moe("doctor")


def test_wrong_usage_ends_with_status_2(moe):
    for arguments in ([], ["fly"], ["run"]):
        with pytest.raises(SystemExit) as error:
            moe(*arguments)
        assert error.value.code == 2


def test_stopping_is_no_error(moe, monkeypatch):
    def stop(arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(doctor, "run", stop)
    assert moe("doctor")[::2] == (130, "moeware: stopped\n")


def test_doctor(moe, monkeypatch):
    status, out, _ = moe("doctor")
    assert status == 0 and "no board found" in out and moeware.__version__
    monkeypatch.setitem(doctor._ESSENTIAL, "not-a-package", "flying")
    status, out, _ = moe("doctor")
    assert status == 1 and "needed for flying" in out
    items = json.loads(moe("doctor", "--json")[1])["items"]
    assert [item["found"] for item in items if item["name"] == "not-a-package"] == [None]


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "moeware.cli", "--version"], capture_output=True,
                          text=True, check=False)
    assert done.stdout == f"moeware {moeware.__version__}\n" and done.returncode == 0


def test_tables():
    assert tables.table([["a", 10], ["long", 7]], right=[1]) == "a     10\nlong   7"
    counters = {"cycles": 200, "read_beats": 1000, **{
        f"{engine}_{state}": 50 for engine in ("load", "linear", "attention", "norm", "store")
        for state in ("busy", "waiting", "stalled")}}
    text = tables.counter_table(counters)
    assert text.startswith("200 cycles, 1,000 read beats\n")
    assert "linear" in text and "25.0%" in text


def test_build_and_deploy_by_the_name_of_the_board(moe, monkeypatch):
    from moeware.boards import build, deploy
    calls = []

    def fake_build(board, config, out, **options):
        calls.append((board.name, config, str(out), options["clock_hz"], options["seed"]))
        return {"board": board.name, "bitstream": f"{board.name}.bit", "clock_hz": 50_000_000,
                "fmax_mhz": {"clk": 51.5}, "seconds": 3.0,
                "utilisation": {"DP16KD": {"used": 52, "available": 208}}}

    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(deploy, "deploy", lambda bitstream, board: calls.append(
        (str(bitstream), board.name)))
    status, out, _ = moe("build", "--board", "ulx3s-85f", "--clock-mhz", "62.5")
    assert status == 0 and "51.5 MHz (clk)" in out and "25%" in out
    assert moe("build", "--config", "config.json", "--out", "there", "--seed", "4")[0] == 0
    assert moe("deploy")[0] == 0
    board = moeware.find_board("ulx3s-85f")
    assert calls == [
        ("ulx3s-85f", board.config, "build/ulx3s-85f", 62_500_000, None),
        ("ulx3s-85f", CONFIG, "there", None, 4),
        ("build/ulx3s-85f/ulx3s-85f.bit", "ulx3s-85f")]
