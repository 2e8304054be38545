"""Statistics of the float model on real inputs: what every tensor looks like, which experts work."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import ROUTED, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.influence import influence
from moeware.compiler.reference import evaluate

__all__ = ["FEW_TOKENS", "Calibration", "calibrate", "check_samples", "load_samples", "merged"]

KEPT_ROWS = 4096  # token rows of a tensor that are kept for choosing its grid
BATCH = 32  # frames evaluated at once
FEW_TOKENS = 8  # an expert that saw fewer is reported


@dataclass
class Calibration:
    """Samples of every tensor of the canonical graph.

    samples : float32 [rows, features] by value name, at most `KEPT_ROWS` rows spread over the data; of
    each expert so many, too, however rarely it is chosen (see `reference.evaluate`), the rows that
    enter it among them, ``{node}/expert{e}/input``, and ``/weight`` [rows, 1], what the square of an
    error in its result counts for: the square of the gate weight times the row's `influence`;
    tokens : tokens that reached each expert, int64 [experts] by the name of their node;
    frames : calibration inputs seen.
    """

    samples: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    frames: int = 0

    def rows(self, name: str) -> np.ndarray:
        """Samples of a tensor; raises `CompileError` where there are none, or infinite ones."""
        if name not in self.samples:
            raise CompileError(f"Tensor {name!r} must be reached by the calibration data: give "
                               "inputs that exercise the whole model")
        if not np.isfinite(self.samples[name]).all():
            raise CompileError(f"Tensor {name!r} must stay finite on the calibration data, not "
                               "overflow: calibrate with data of the model's real range")
        return self.samples[name]

    @property
    def starved(self) -> list[str]:
        """Experts with fewer than `FEW_TOKENS` calibration tokens, as ``node/expert3: 0 tokens``."""
        return [f"{node}/expert{expert}: {count} tokens" for node, counts in self.tokens.items()
                for expert, count in enumerate(counts.tolist()) if count < FEW_TOKENS]


def merged(calibrations: Sequence[Calibration]) -> Calibration:
    """One calibration of several variants of a model on the same inputs: their samples together,
    and once where they are equal."""
    result = Calibration(frames=calibrations[0].frames)
    for name in dict.fromkeys(name for each in calibrations for name in each.samples):
        found: list[np.ndarray] = []
        for each in calibrations:
            rows = each.samples.get(name)
            if rows is not None and not any(np.array_equal(rows, other) for other in found):
                found.append(rows)
        result.samples[name] = np.concatenate(found)
    for name in calibrations[0].tokens:
        result.tokens[name] = sum(each.tokens[name] for each in calibrations)
    return result


def load_samples(path: str | os.PathLike, inputs: list[tuple[str, tuple[int, ...], str]],
                 choices: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Calibration inputs from an ``.npz`` file or a folder of ``.npy`` files.

    inputs : (name, shape without the batch axis, type) of the model. An array is taken for an input
    if it has its name; a model with one input also takes an array called ``calibration``, or the
    only one there is. The files of a folder are frames of the one input, in the order of their names.
    choices : names of arrays to leave out, as every value of these inputs is calibrated for.

    Raises
    ------
    CompileError
        Nothing there, a wrong name, shape or type, values that are not finite.
    """
    path = Path(path)
    names = [name for name, _, _ in inputs]
    try:
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            if not files or len(inputs) != 1:
                raise CompileError(f"{path} must hold .npy files of the one input of the model, not "
                                   f"{len(files)} files for the inputs {names}")
            frames = [np.load(file, allow_pickle=False) for file in files]
            single = tuple(inputs[0][1])
            arrays = {names[0]: np.concatenate([f[None] if f.shape == single else f for f in frames])}
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files if name not in choices}
    except CompileError:
        raise
    except Exception as error:  # numpy raises many kinds for a file that is not an array
        raise CompileError(f"Calibration data {path} must be an .npz file or a folder of .npy files: "
                           f"{error}") from error
    if len(inputs) == 1 and names[0] not in arrays:
        key = "calibration" if "calibration" in arrays else next(iter(arrays), None)
        if key is None or (key != "calibration" and len(arrays) > 1):
            raise CompileError(f"Calibration data {path} must hold an array {names[0]!r} or "
                               f"'calibration', not {sorted(arrays)}")
        arrays = {names[0]: arrays[key]}
    return check_samples(arrays, inputs)


def check_samples(arrays: Mapping[str, np.ndarray], inputs: list[tuple[str, tuple[int, ...], str]]
                  ) -> dict[str, np.ndarray]:
    """The arrays of the inputs [frames, ...], in the inputs' types.

    Raises
    ------
    CompileError
        An input without an array, a wrong shape or type, values that are not finite.
    """
    samples = {}
    for name, dims, kind in inputs:
        if name not in arrays:
            raise CompileError(f"Calibration data must hold an array {name!r}, not only "
                               f"{sorted(arrays)}")
        samples[name] = _checked(name, np.asarray(arrays[name]), tuple(dims), kind)
    if len({len(array) for array in samples.values()}) > 1:
        raise CompileError(f"Calibration arrays must have one number of frames, not "
                           f"{ {name: len(array) for name, array in samples.items()} }")
    return samples


def _checked(name: str, array: np.ndarray, dims: tuple[int, ...], kind: str) -> np.ndarray:
    if array.shape[1:] != dims or array.ndim != len(dims) + 1:
        raise CompileError(f"Calibration data {name!r} must have the shape [frames, "
                           f"{', '.join(map(str, dims))}], not {list(array.shape)}")
    if not len(array):
        raise CompileError(f"Calibration data {name!r} must have at least one frame, not 0")
    if array.dtype.kind not in "fiub":
        raise CompileError(f"Calibration data {name!r} must be numbers, not {array.dtype}")
    if not np.isfinite(array).all():
        raise CompileError(f"Calibration data {name!r} must be finite: it holds NaN or infinity")
    element = kind.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(element, element))
    limits = None if dtype.kind in "fb" else np.iinfo(dtype)
    if limits and (array.dtype.kind == "f" or not limits.min <= array.min() <= array.max() <= limits.max):
        raise CompileError(f"Calibration data {name!r} must be {dtype} as the model's input, not "
                           f"{array.dtype} from {array.min()} to {array.max()}")
    return array.astype(dtype)


def calibrate(model: ir.Model, samples: dict[str, np.ndarray], progress=None) -> Calibration:
    """Run the float model on the samples and keep what quantisation needs.

    model : canonical; samples : as `check_samples` returns them; progress : called with the
    number of frames done.
    """
    result = Calibration(frames=len(next(iter(samples.values()))))
    stride: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {}

    def record(name: str, array: np.ndarray) -> None:
        if array.dtype.kind != "f" or array.ndim < 2 or not array.size:
            return
        rows = array.reshape(-1, array.shape[-1])
        if name not in stride:
            stride[name] = max(1, len(rows) * result.frames // (BATCH * KEPT_ROWS))
        parts.setdefault(name, []).append(rows[::stride[name]].copy())

    experts = {node.outputs[0].name: node for node in model.graph if node.op_type in ROUTED}
    for node in experts.values():
        result.tokens[node.name] = np.zeros(shape(node.inputs[3])[0], np.int64)
    heard = influence(model, samples)
    routed = {value.name for node in experts.values() for value in node.inputs[:3]}
    for start in range(0, result.frames, BATCH):
        feeds = {name: array[start:start + BATCH] for name, array in samples.items()}
        seen: dict[str, np.ndarray] = {}

        def keep(name: str, array: np.ndarray) -> None:
            if name in routed:
                seen[name] = array
            record(name, array)

        for name, array in feeds.items():
            keep(name, array.astype(np.float32))
        evaluate(model, feeds, record=keep)
        for node in experts.values():
            x, chosen, gates = (seen[value.name].reshape(-1, seen[value.name].shape[-1])
                                for value in node.inputs[:3])
            counts = result.tokens[node.name]
            counts += np.bincount(chosen.ravel(), minlength=len(counts))
            for expert in range(len(counts)):
                rows, slots = np.nonzero(chosen == expert)
                record(f"{node.name}/expert{expert}/input", x[rows])
                weight = gates[rows, slots]**2 * heard[node.name][rows % len(heard[node.name])]
                record(f"{node.name}/expert{expert}/weight", weight[:, None])
        if progress:
            progress(len(next(iter(feeds.values()))))
    for name, arrays in parts.items():
        result.samples[name] = np.concatenate(arrays)[:4 * KEPT_ROWS]
    return result
