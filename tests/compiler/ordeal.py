"""Compile damaged files, each in a process of its own, and judge how that ends.

``python -m tests.compiler.ordeal FIRST LAST`` prints a line of JSON for each seed. The process, which
has imported everything, forks for each case, so that a case costs its compilation alone and cannot
harm the next. `verdicts` is that from another process.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

import moeware
from moeware import cli
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.pipeline import model_ports
from moeware.compiler.reference import evaluate
from moeware.hw.arch.config import ConfigError
from moeware.hw.arch.program import HostStep

from ..hw.arch.configs import config
from . import exports, genai
from .damage import Case, case
from .fork import ENDS, forked

__all__ = ["Verdict", "verdicts"]

ROOT = Path(__file__).parents[2]
MODELS = {
    "dense": exports.vit,
    "loop": lambda: exports.vit(mixer=exports.Moe("loop")),
    "gather": lambda: exports.vit(mixer=exports.Moe("gather", "all"), pool="mean"),
    "where": lambda: exports.vit(exports.SeparateAttention(True), exports.Moe("where")),
}
BUILDER = genai.Sizes(layers=1, tokens=4, bits=4, block=16, zeros="packed", tied=True, experts=3,
                      expert_bits=4)
TEXTS = ("gelu_erf", "layer_norm_rsqrt", "masked_attention", "post_norm")
CONFIG = config(2, 4, 2, 2, 2, 8, activation_banks=1)
TOLERANCE = 1e-4
CHECKED_EVERY = 5  # cases that go through the command line instead

# An error that says so is one that nobody foresaw.
_UNFORESEEN = re.compile(r"fault of|report the model|not one that fails|fail with \w+Error|bad_alloc|Memory")


@dataclass
class Verdict:
    """How a case ended.

    outcome : "refused", "compiled and equal", "compiled" (ONNX Runtime does not run the file) or
    "failed"; seconds : of processor, all threads; megabytes : most resident memory of the process,
    what all imports take included.
    """

    seed: int
    kind: str
    model: str
    outcome: str
    message: str
    seconds: float
    megabytes: float


def verdicts(first: int, last: int) -> Iterator[Verdict]:
    """Those of the seeds `first` to `last`, by another process: this one may have threads."""
    command = [sys.executable, "-m", "tests.compiler.ordeal", str(first), str(last)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Verdict(**json.loads(line))
    assert process.returncode == 0, f"{command} ends with status {process.returncode}"


def models() -> dict[str, onnx.ModelProto]:
    """Valid models: dense, mixtures in three forms, a language model of ONNX Runtime's operators, and
    single operators."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the text format
        for name, build in MODELS.items():
            path = exports.export(build(), Path(folder) / "model.onnx", opset=17, dynamo=False)
            found[name] = onnx.load(path)
        found["builder"] = onnx.load(genai.write(Path(folder) / "builder.onnx", BUILDER))
        for name in TEXTS:
            found[name] = onnx.load(Path(__file__).parent / "cases" / f"{name}.onnxtxt")
    return found


def judge(each: Case) -> Verdict:
    """Compile `each` in a fork of this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "inside"
        folder.mkdir()
        for path in (folder / "weights.bin", Path(name) / "outside.bin"):
            path.write_bytes(bytes(64))
        with (folder / "sparse.bin").open("wb") as file:
            file.truncate(3 << 30)
        path = folder / each.name
        path.write_bytes(each.data)
        compiling = check if each.seed % CHECKED_EVERY == 0 else compile_and_compare
        outcome, message, seconds, megabytes = forked(lambda: compiling(path, each))
    return Verdict(each.seed, each.kind, each.model, outcome, message, seconds, megabytes)


def compile_and_compare(path: Path, each: Case) -> Iterator[tuple[str, str]]:
    """What is known, as soon as it is: later lines replace earlier ones."""
    yield "failed", ENDS
    try:
        model = fuse(load(path))
        feeds = {name: _sample(dims, kind) for name, dims, kind in model_ports(model)[0]}
        program = moeware.compile(path, CONFIG, feeds)
    except (CompileError, ConfigError) as error:
        yield refusal(str(error))
        return
    yield "compiled", ""
    frame = {name: array[:1] for name, array in feeds.items()}
    try:
        wanted = _onnxruntime(path, frame)
    except Exception as error:  # noqa: BLE001 - it raises many types
        yield "compiled", f"ONNX Runtime: {error}"
        return
    yield "failed", "cannot run what it compiled"
    yield equality(list(evaluate(model, frame).values()), wanted)
    results = moeware.Session(program, "torch").run(None, frame)
    if all(isinstance(step, HostStep) for step in program.steps):
        yield equality(results, wanted)
    elif not all(np.isfinite(result).all() and result.shape == want.shape
                 for result, want in zip(results, wanted, strict=True)):
        yield "failed", "is a program that gives no numbers"


def _onnxruntime(path: Path, frame: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the file computes by the definition of its operators: without fusions, as some do not
    mind an unusual attribute, and whatever is recorded of names and shapes beside them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.name = ""
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, frame)


def equality(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[str, str]:
    """Equal where the model is finite, and not finite where it is not."""
    for value, want in zip(found, wanted, strict=True):
        if value.shape != want.shape:
            return "failed", f"gives the shape {value.shape}, not {want.shape}"
        finite = np.isfinite(want)
        if (finite != np.isfinite(value)).any():
            return "failed", "is finite in other places"
        difference = np.abs(value[finite].astype(float) - want[finite]).max(initial=0)
        scale = np.abs(want[finite]).max(initial=1e-30)
        if difference > TOLERANCE * scale:
            return "failed", f"gives another result, by {difference / scale:.2g}"
    return "compiled and equal", ""


def check(path: Path, each: Case) -> Iterator[tuple[str, str]]:
    """The same of ``moeware check``, which says whether a file is good, not what it computes."""
    yield "failed", ENDS
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(["check", str(path)])
    error = said.getvalue()
    if status == 0:
        yield "compiled", ""
    elif error.startswith("moeware: error: "):
        yield refusal(error.removeprefix("moeware: error: "))
    else:
        yield "failed", f"status {status}: {error}"


def refusal(message: str) -> tuple[str, str]:
    """A message must name a thing in quotes or a file, the rule and a remedy."""
    # A thing is in quotes, a file, or a node that the compiler has numbered; where a configuration
    # is too small, the rule is its size.
    rule = re.search(" must | more than Config", message) and re.search(
        r"'|\.onnx|Opset|`|\w_\d", message)
    if not rule or not re.search(r"; |: ", message) or _UNFORESEEN.search(message):
        return "failed", f"says only: {message}"
    return "refused", message


def _sample(dims: tuple[int, ...], kind: str) -> np.ndarray:
    draw = np.random.default_rng(3)
    shape = (4, *dims)
    element = kind.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": np.float32, "double": np.float64}.get(element, element)
    if np.dtype(dtype).kind == "f":
        return draw.normal(size=shape).astype(dtype)
    return draw.integers(0, 2, shape).astype(dtype)


def main(first: str, last: str) -> None:
    torch.set_num_threads(1)
    valid = models()
    for seed in range(int(first), int(last)):
        print(json.dumps(asdict(judge(case(seed, valid)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
