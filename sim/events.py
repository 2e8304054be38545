"""The log of what happens in simulated gateware, as harness.cpp writes it."""

import numpy as np
from amaranth.lib import data

from moeware.hw.arch.isa import Engine
from moeware.hw.events import EngineEvents, Events

__all__ = ["STRETCH", "WORKING", "engine_event", "runs"]

# A stretch of cycles from `cycle` to the next one's. `events` are those of its first cycle, and of
# all the others but for what is counted; a stretch with a pulse is one cycle long.
STRETCH = np.dtype([("cycle", "<u8"), ("events", "<u8"), ("stalled", "<u4", len(Engine)),
                    ("working", "<u4", 8)], align=True)
WORKING = ("linear", "attention", "bus")  # bits of the index of `working`


def _bits(struct, name: str) -> tuple[int, int]:
    field = data.Layout.cast(struct)[name]
    return field.offset, field.width


def event(log: np.ndarray, name: str) -> np.ndarray:
    """Of each stretch, a field of `Events`."""
    offset, width = _bits(Events, name)
    return log["events"] >> np.uint64(offset) & np.uint64((1 << width) - 1)


def engine_event(log: np.ndarray, engine: Engine, name: str) -> np.ndarray:
    """Of each stretch, int64, a field of an engine's `EngineEvents`."""
    first, _ = _bits(Events, "engines")
    offset, width = _bits(EngineEvents, name)
    offset += first + engine * data.Layout.cast(EngineEvents).size
    return (log["events"] >> np.uint64(offset) & np.uint64((1 << width) - 1)).astype(np.int64)


def runs(log: np.ndarray) -> list[np.ndarray]:
    """The part of each run, from START on; cycles count from the run's first one, 0."""
    starts = np.flatnonzero(event(log, "start"))
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(log)]):
        part = log[start + 1:stop].copy()
        part["cycle"] -= log["cycle"][start] + np.uint64(1)
        parts.append(part)
    return parts
