"""Compile damaged files, each in a process of its own, and judge how that ends.

``python -m tests.compiler.ordeal FOLDER SEED [SEED ...]`` prints a line of JSON for each seed.
``FOLDER`` holds the valid models. A process that has imported everything forks for each case, so
that a case costs its compilation alone and cannot harm the next.
"""

import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from .damage import Case, case

__all__ = ["Verdict", "judge", "read_models"]

SECONDS, WALL_SECONDS, MEGABYTES = 10, 30, 1024
CONFIG = config(2, 4, 2, 2, 2, 8, activation_banks=1)
TOLERANCE = 1e-4
CHECKED_EVERY = 5  # cases that go through the command line instead

# An error that says so is one that nobody foresaw.
_UNFORESEEN = re.compile(r"fault of|report the model|not one that fails with|not fail with \w+Error|bad_alloc|Memory")


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


def read_models(folder: Path) -> dict[str, onnx.ModelProto]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the text format
        return {path.stem: onnx.load(path) for path in sorted(folder.iterdir())}


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
        outcome, message, seconds, megabytes = _forked(lambda: compiling(path, each))
    return Verdict(each.seed, each.kind, each.model, outcome, message, seconds, megabytes)


def compile_and_compare(path: Path, each: Case) -> Iterator[tuple[str, str]]:
    """What is known, as soon as it is: later lines replace earlier ones."""
    yield "failed", "ends the process"
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
    if all(isinstance(step, HostStep) for step in program.steps):
        yield equality(moeware.Session(program, "torch").run(None, frame), wanted)


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
    yield "failed", "ends the process"
    error, sys.stderr, sys.stdout = sys.stderr, tempfile.TemporaryFile("w+"), open(os.devnull, "w")
    status = cli.main(["check", str(path)])
    sys.stderr.seek(0)
    error, sys.stderr = sys.stderr.read(), error
    if status == 0:
        yield "compiled", ""
    elif error.startswith("moeware: error: "):
        yield refusal(error.removeprefix("moeware: error: "))
    else:
        yield "failed", f"status {status}: {error}"


def refusal(message: str) -> tuple[str, str]:
    """A message must name a thing in quotes or a file, the rule and a remedy."""
    rule = " must " in message and re.search(r"'|\.onnx|Opset|`", message)
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


def _forked(compiling: Callable[[], Iterator[tuple[str, str]]]) -> tuple[str, str, float, float]:
    """(outcome, message, seconds, megabytes) of what `compiling` gives in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _limit_memory()
        with os.fdopen(writing, "w", buffering=1) as file:
            try:
                for outcome, message in compiling():
                    usage = resource.getrusage(resource.RUSAGE_SELF)
                    line = [outcome, message[:2000], usage.ru_utime + usage.ru_stime,
                            usage.ru_maxrss / 1024]
                    file.write(json.dumps(line) + "\n")
            except BaseException:  # noqa: BLE001 - whatever comes is a failure
                usage = resource.getrusage(resource.RUSAGE_SELF)
                line = ["failed", traceback.format_exc()[-2000:], usage.ru_utime + usage.ru_stime,
                        usage.ru_maxrss / 1024]
                file.write(json.dumps(line) + "\n")
        os._exit(0)
    os.close(writing)
    lines, ended = _read(reading)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    outcome, message, seconds, megabytes = json.loads(lines[-1])
    if outcome == "failed" and message == "ends the process":
        # A refusal before any result: all of the process counts.
        seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        message = f"ends the process with status {status}"
    if not ended:
        outcome, message = "failed", f"takes more than {WALL_SECONDS} s ({message})"
    elif seconds > SECONDS or megabytes > MEGABYTES:
        outcome, message = "failed", f"takes {seconds:.1f} s, {megabytes:.0f} MB ({message})"
    return outcome, message, seconds, megabytes


def _read(reading: int) -> tuple[list[str], bool]:
    """Lines until the pipe closes, and whether it did in time."""
    parts, deadline = [], time.monotonic() + WALL_SECONDS
    while select.select([reading], [], [], max(deadline - time.monotonic(), 0))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            os.close(reading)
            return b"".join(parts).decode().splitlines(), True
        parts.append(part)
    os.close(reading)
    return b"".join(parts).decode().splitlines(), False


def _limit_memory() -> None:
    """A bound on addresses, so that what takes too much memory does not take it from others."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(folder: str, *seeds: str) -> None:
    torch.set_num_threads(1)
    models = read_models(Path(folder))
    for seed in map(int, seeds):
        print(json.dumps(asdict(judge(case(seed, models)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
