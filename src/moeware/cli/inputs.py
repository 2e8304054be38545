"""Inputs of a model from files, outputs to files."""

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moeware.hw.arch.program import Program

__all__ = ["mean_counters", "read_inputs", "write_outputs"]


def read_inputs(path: str, program: Program, *, array: str | None = None,
                first: int = 0, frames: int | None = None,
                choice: Mapping[str, int] | None = None) -> dict[str, np.ndarray | int]:
    """Feeds for a session: arrays [frames, ...] by input name.

    path : an ``.npz`` file with an array for each input, or, for a model of one input, an ``.npy``
    file or an ``.npz`` file whose only array, or whose array called `array`, it is; frames : take
    only so many, from `first` on; choice : values of the program's choices, which count more than
    arrays of their names.

    Raises
    ------
    ValueError
        Not such a file, an input without an array, or no frames.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"Frames to run must be at least one, not {frames}")
    names = [name for name, _, _ in program.inputs]
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"Inputs {path} must be a .npz or .npy file of numpy arrays: "
                         f"{error}") from error
    chosen = {name: arrays.pop(name) for name in program.choices if name in arrays}
    chosen |= choice or {}
    if array is not None and array not in arrays:
        raise ValueError(f"Array of {path} must be one of {sorted(arrays)}, not {array!r}")
    if len(names) == 1 and names[0] not in arrays:
        if array is None and len(arrays) != 1:
            raise ValueError(f"Inputs {path} must have the array {names[0]!r}, not "
                             f"{sorted(arrays)}: choose one with --array")
        arrays = {names[0]: arrays[array] if array is not None else next(iter(arrays.values()))}
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"Inputs {path} must have arrays for {names}, but lack {missing}")
    last = None if frames is None else first + frames
    return {name: arrays[name][first:last] for name in names} | chosen


def write_outputs(path: str, outputs: dict[str, np.ndarray]) -> None:
    """Write arrays to an ``.npz`` file; an existing one is replaced only by a complete new one."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **outputs)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def mean_counters(frames: list[dict[str, int]]) -> dict[str, float]:
    """Counters of an average frame; empty where a device has none."""
    return {name: sum(frame[name] for frame in frames) / len(frames)
            for name in (frames[0] if frames else ())}
