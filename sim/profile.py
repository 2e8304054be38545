"""Where the cycles of a run on simulated gateware go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.timeline import Timeline
from moeware.hw.arch.work import Work, works
from moeware.runtime.chosen import chosen_experts
from moeware.runtime.device import Progress

from .events import WORKING, engine_event
from .rtl import RtlDevice

__all__ = ["Profile", "ProfilingDevice", "profile"]

NOTHING = "no instruction"  # of an engine that has none, or that is about to start one


@dataclass
class Profile:
    """A run of one device step.

    counters : of the hardware; working : cycles by what works, "linear", "attention", "bus" or some
    of them joined by " + ", or "nothing"; idle : cycles in which neither array works, by what each
    of the engines does.
    """

    timeline: Timeline
    counters: dict[str, int]
    working: dict[str, int]
    idle: dict[str, int]

    def to_dict(self) -> dict:
        """JSON-able: the run as a whole, and its tables."""
        return {"counters": self.counters, "working": self.working, "idle": self.idle,
                **self.timeline.to_dict()}

    def share(self, what: str) -> float:
        """Share of the run's cycles in which `what` works."""
        return sum(cycles for name, cycles in self.working.items()
                   if what in name.split(" + ")) / self.timeline.cycles


def profile(program: Program, step: DeviceStep, log: np.ndarray, counters: dict[str, int],
            choices: Mapping[str, np.ndarray] | None = None) -> Profile:
    """What the log of a run (see `moeware.sim.events.runs`) says.

    choices : as `moeware.hw.arch.work.works` takes them; rows and products of experts need them.

    Raises
    ------
    ValueError
        The log is not that of a whole run of this step.
    """
    log = log[log["cycle"] < counters["cycles"]]
    found = works(program, step, choices)
    engines = np.array([work.engine for work in found], int)
    lengths = np.diff(np.append(log["cycle"].astype(np.int64), counters["cycles"]))
    start, done, waiting, stalled = (np.zeros(len(found), np.int64) for _ in range(4))
    waited_for = np.full(len(found), -1)
    skipped = np.zeros(len(found), bool)
    for engine in Engine:
        own = np.flatnonzero(engines == engine)
        begins = engine_event(log, engine, "started") | engine_event(log, engine, "skipped")
        ends = engine_event(log, engine, "done")
        cycle = log["cycle"].astype(np.int64)
        passed = engine_event(log, engine, "skipped")[begins == 1] == 1
        if begins.sum() != len(own) or ends.sum() != len(own) - passed.sum():
            raise ValueError(f"Log of a run must have {len(own)} starts of {engine.name}, not "
                             f"{begins.sum()} starts and {ends.sum()} ends")
        start[own], skipped[own] = cycle[begins == 1], passed
        done[own] = start[own]
        taken = own[~passed]
        done[taken] = cycle[ends == 1]

        oldest = np.cumsum(ends) - ends  # of those taken, in each stretch
        busy = engine_event(log, engine, "busy") & (oldest < len(taken))
        np.add.at(stalled, taken[oldest[busy == 1]], log["stalled"][busy == 1, engine])
        following = np.cumsum(begins) - begins
        waits = np.flatnonzero(engine_event(log, engine, "waiting") & (following < len(own)))
        np.add.at(waiting, own[following[waits]], lengths[waits])
        lacking = engine_event(log, engine, "lacking")
        for place in waits:  # the last one stays
            mask = int(lacking[place])
            waited_for[own[following[place]]] = (mask & -mask).bit_length() - 1
    _check(found, skipped, choices)
    found = [_as_run(work, bool(passed)) for work, passed in zip(found, skipped)]
    timeline = Timeline(program.config, found, start, done, waiting, waited_for, stalled,
                        counters["cycles"])
    return Profile(timeline, counters, _working(log, counters["cycles"]), _idle(log, lengths))


def _check(found: Sequence[Work], skipped: np.ndarray, choices) -> None:
    if choices is not None and any(work.skipped != passed for work, passed in zip(found, skipped)):
        raise ValueError("Chosen experts must be those of the logged run, but other experts have no "
                         "token there: choose from the same inputs")


def _as_run(work: Work, skipped: bool) -> Work:
    return work if work.skipped == skipped else Work(work.instruction, work.layer, skipped=skipped)


def _working(log: np.ndarray, cycles: int) -> dict[str, int]:
    """Cycles by what works."""
    totals = log["working"].astype(np.int64)
    # The last stretch goes on after the run, doing nothing.
    totals[-1, 0] -= totals.sum() - cycles + int(log["cycle"][0])
    names = [" + ".join(name for bit, name in enumerate(WORKING) if index >> bit & 1) or "nothing"
             for index in range(totals.shape[1])]
    return {name: int(total) for name, total in zip(names, totals.sum(0))}


def _idle(log: np.ndarray, lengths: np.ndarray) -> dict[str, int]:
    """Cycles in which neither array works, by what the engines do."""
    # Of a stretch in which an array stalls now and then: as many cycles as neither works.
    cycles = np.minimum(log["working"][:, [0, 4]].sum(1).astype(np.int64), lengths)
    states = np.stack([_states(log, engine) for engine in Engine])
    kinds, which = np.unique(states, axis=1, return_inverse=True)
    totals = np.bincount(which.ravel(), weights=cycles, minlength=kinds.shape[1]).astype(int)
    idle: dict[str, int] = {}
    for kind, total in zip(kinds.T[totals != 0], totals[totals != 0].tolist()):
        sentence = _sentence(kind)
        idle[sentence] = idle.get(sentence, 0) + total
    return dict(sorted(idle.items(), key=lambda item: -item[1]))


WORKS, IDLE = 0, 1  # then 2 + engine: waits for it


def _states(log: np.ndarray, engine: Engine) -> np.ndarray:
    lacking = engine_event(log, engine, "lacking")
    lowest = np.argmax(lacking[:, None] >> np.arange(len(Engine)) & 1, 1)
    state = np.where(engine_event(log, engine, "waiting") == 1, 2 + lowest, IDLE)
    return np.where(engine_event(log, engine, "busy") == 1, WORKS, state)


def _sentence(states: np.ndarray) -> str:
    """What the arrays wait for, and who is at work meanwhile."""
    parts = []
    for engine in (Engine.LINEAR, Engine.ATTENTION):
        state, name = int(states[engine]), engine.name.lower()
        parts.append({WORKS: f"{name} stalls", IDLE: f"{name} has {NOTHING}"}.get(
            state) or f"{name} waits for {Engine(state - 2).name.lower()}")
    others = [engine.name.lower() for engine in (Engine.LOAD, Engine.NORM, Engine.STORE)
              if states[engine] == WORKS]
    parts.append(f"busy: {', '.join(others)}" if others else "nobody busy")
    return "; ".join(parts)


class ProfilingDevice:
    """The RTL device that also keeps, in `profiles`, the profile of every frame and step it runs.

    Parameters
    ----------
    options : as `RtlDevice` takes them.
    """

    def __init__(self, config: Config, **options):
        self._device = RtlDevice(config, log_events=True, **options)
        self.name, self.config = self._device.name, config
        self.profiles: list[Profile] = []

    @property
    def counters(self) -> list[dict[str, int]]:
        return self._device.counters

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        results = self._device.run(program, step, inputs, probes=probes, progress=progress)
        choices = chosen_experts(program, step, inputs)
        self.profiles += [profile(program, step, *facts) for facts in
                          zip(self._device.logs, self._device.counters, choices, strict=True)]
        return results
