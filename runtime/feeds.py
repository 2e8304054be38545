"""What a caller hands to a session, checked against what the model takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeware.hw.arch.program import Program

__all__ = ["FeedError", "NodeArg", "check_feeds", "check_names", "take_choice"]

_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int8)": np.int8,
           "tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
           "tensor(bool)": np.bool_}


class FeedError(ValueError):
    """A feed or an output name that the model does not have, or a feed of another type or shape."""


@dataclass(frozen=True)
class NodeArg:
    """An input or output of the model, as in ONNX Runtime; the first axis is the batch, but for a
    choice (see `Program`), which has the shape []."""

    name: str
    shape: list[str | int]
    type: str


def check_names(program: Program, names: Sequence[str] | None) -> list[str]:
    """Names of the outputs to return: all for None or an empty list."""
    known = [name for name, _, _ in program.outputs]
    for name in names or ():
        if name not in known:
            raise FeedError(f"Output name must be one of {known}, not {name!r}")
    return list(names or known)


def take_choice(program: Program, feeds: Mapping[str, object]
                ) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The values of the program's choices (integers, or arrays that hold one), and the other feeds.

    Raises
    ------
    FeedError
        A choice is missing, is not one integer, or not one that the program was compiled for.
    """
    choice: dict[str, int] = {}
    for name, allowed in program.choices.items():
        if name not in feeds:
            raise FeedError(f"Feeds must have the input {name!r} (one of {allowed}), not only "
                            f"{sorted(feeds)}")
        value = np.asarray(feeds[name])
        if value.dtype.kind not in "iu" or value.size != 1:
            raise FeedError(f"Feed {name!r} must be one integer for the whole run (one of "
                            f"{allowed}), not {value.dtype} {list(value.shape)}: run frames of "
                            "different values one after another")
        choice[name] = int(value.item())
        if choice[name] not in allowed:
            raise FeedError(f"Feed {name!r} must be one of {allowed}, not {choice[name]}: compile "
                            "the model with this choice, too")
    return choice, {name: value for name, value in feeds.items() if name not in choice}


def check_feeds(program: Program, feeds: Mapping[str, np.ndarray]) -> int:
    """That `feeds` has each input as an array [frames, *shape] of its type, for one number of
    frames of at least one; returns that number.

    Raises
    ------
    FeedError
    """
    known = [name for name, _, _ in program.inputs]
    for name in feeds:
        if name not in known:
            raise FeedError(f"Feed must be one of the inputs {[*known, *program.choices]}, not "
                            f"{name!r}")
    frames: int | None = None
    for name, shape, kind in program.inputs:
        expected = f"{kind} ['batch', {', '.join(map(str, shape))}]"
        if name not in feeds:
            raise FeedError(f"Feeds must have the input {name!r} ({expected}), not only "
                            f"{sorted(feeds)}")
        value = feeds[name]
        if not isinstance(value, np.ndarray) or value.dtype != _DTYPES[kind]:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise FeedError(f"Feed {name!r} must be a numpy array of {np.dtype(_DTYPES[kind])} "
                            f"({expected}), not {found}: convert it with "
                            f"numpy.asarray(value, numpy.{np.dtype(_DTYPES[kind])})")
        if value.ndim != 1 + len(shape) or value.shape[1:] != tuple(shape):
            raise FeedError(f"Feed {name!r} must have the shape ['batch', "
                            f"{', '.join(map(str, shape))}], not {list(value.shape)}")
        if not len(value):
            raise FeedError(f"Feed {name!r} must have at least one frame, not the shape "
                            f"{list(value.shape)}")
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise FeedError(f"Feed {name!r} must be numbers, not hold NaN, which no integer stands "
                            "for")
        if frames is not None and len(value) != frames:
            raise FeedError(f"Feeds must have one batch size, not {frames} and, for {name!r}, "
                            f"{len(value)}")
        frames = len(value)
    return frames or 1
