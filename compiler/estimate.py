"""Cycles of a program without its gateware: an event-driven model, instruction by instruction.

Instructions are fetched, dispatched and started as `hw.fetch` and `hw.sequencer` do it, tokens come
and go, bursts share the memory; what an engine does within an instruction is a formula. Engines are
taken not to disturb each other at the on-chip memories.
"""

from collections import deque
from collections.abc import Mapping

import numpy as np

from moeware.compiler.estimate_costs import Attention, Linear, Norm
from moeware.compiler.estimate_dma import Fetch, Loads, Reads, Stores, cycles_per_beat
from moeware.compiler.estimate_dram import Clock, Dram, DramCycles
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.timeline import Timeline
from moeware.hw.arch.work import works

__all__ = ["DramCycles", "estimate"]

SLICE = 2  # instructions on the way from a sequencer to its engine
IN_FLIGHT = 8  # instructions that an engine has taken and whose tokens were not given
JOB = 2  # cycles of a transfer besides its words


def estimate(program: Program, step: DeviceStep, dram: DramCycles,
             choices: Mapping[str, np.ndarray] | None = None) -> Timeline:
    """When the instructions of a step would start and be done.

    dram : the memory, on a bus of the configuration's width; choices : as
    `moeware.hw.arch.work.works` takes them: without them every expert gets the same share.
    """
    return _Machine(program, step, dram, choices).run()


class _Machine:
    """The accelerator: what is common to the engines, and their sequencers."""

    def __init__(self, program: Program, step: DeviceStep, dram: DramCycles, choices):
        config = program.config
        self.config, self.clock = config, Clock()
        self.works = works(program, step, choices)
        count = len(self.works)
        self.start, self.done, self.waiting = (np.zeros(count, np.int64) for _ in range(3))
        self.waited_for = np.full(count, -1)
        memory = Dram(self.clock, dram)
        reads = Reads(self.clock, memory)
        units = {Engine.LOAD: Loads(self.clock, reads, config),
                 Engine.LINEAR: Linear(self.clock, config),
                 Engine.ATTENTION: Attention(self.clock, config),
                 Engine.NORM: Norm(self.clock, config),
                 Engine.STORE: Stores(self.clock, memory, config)}
        self.tokens = np.zeros((len(Engine), len(Engine)), int)  # [from, to]
        self.sequencers = {engine: _Sequencer(self, engine, unit) for engine, unit in units.items()}
        self.fetch = Fetch(self.clock, reads, config, step.entry, count, self.dispatch)

    def run(self) -> Timeline:
        self.clock.run()
        stuck = [engine.name for engine, sequencer in self.sequencers.items()
                 if sequencer.head is not None]
        if stuck:
            raise ValueError(f"Program must not wait for tokens that cannot come, but {stuck} do")
        # The run ends with END behind the last of its instructions.
        timeline = Timeline(self.config, self.works, self.start, self.done, self.waiting,
                            self.waited_for, np.zeros(len(self.works), np.int64),
                            int(self.done.max(initial=0)) + 3)
        moved = np.array([work.beats * cycles_per_beat(self.config, work) if work.beats else 0
                          for work in self.works], np.int64)
        timeline.stalled = np.where(moved > 0, np.maximum(
            0, timeline.done - timeline.since - moved - JOB), 0)
        return timeline

    def dispatch(self, number: int) -> bool:
        return self.sequencers[self.works[number].engine].push(number)

    def give(self, source: Engine, mask: int) -> None:
        for target in Engine:
            if mask >> target & 1:
                self.tokens[source, target] += 1
                self.sequencers[target].wake()


class _Sequencer:
    """Starts the instructions of an engine in order (see `hw.sequencer`)."""

    def __init__(self, machine: _Machine, engine: Engine, unit):
        self.machine, self.engine, self.unit = machine, engine, unit
        self.clock = machine.clock
        self.depth = max(2, machine.config.queue)
        self.queue: deque[int] = deque()
        self.head: int | None = None
        self.state = "EMPTY"
        self.empty = 0  # from here on the next instruction may come
        self.since = 0  # tokens are looked at from here on
        self.flying: deque[int] = deque()  # started, tokens not given
        self.finished: set[int] = set()
        self.quiet = 0  # from here on no instruction was at work
        self.sliced: deque[tuple[int, int]] = deque()  # between here and the engine: number, since when
        unit.on_ready = lambda: self.feed()

    def push(self, number: int) -> bool:
        if len(self.queue) >= self.depth:
            return False
        self.queue.append(number)
        self.clock.at(self.clock.now + 1, self.pull)
        return True

    def pull(self) -> None:
        if self.state == "EMPTY" and self.queue and self.clock.now >= self.empty:
            self.head, self.state = self.queue.popleft(), "PULL"
            self.clock.at(self.clock.now + 1, self.machine.fetch.wake)
            self.clock.at(self.clock.now + 1, self.look)

    def look(self) -> None:
        self.state, self.since = "TOKENS", self.clock.now
        self.wake()

    def wake(self) -> None:
        """Takes the tokens if all are there."""
        if self.state != "TOKENS":
            return
        machine, work = self.machine, self.machine.works[self.head]
        needs = [source for source in Engine if work.instruction.wait >> source & 1]
        lacking = [source for source in needs if not machine.tokens[source, self.engine]]
        if lacking:
            machine.waited_for[self.head] = lacking[0]
            return
        for source in needs:
            machine.tokens[source, self.engine] -= 1
        waited = self.clock.now - max(self.since, self.quiet) if not self.flying else 0
        machine.waiting[self.head] = max(0, waited)
        if waited <= 0:
            machine.waited_for[self.head] = -1
        self.state = "START"
        self.clock.at(self.clock.now + 1 + work.instruction.conditional, self.ready)

    def ready(self) -> None:
        self.state = "READY"
        self.start()

    def start(self) -> None:
        if self.state != "READY" or len(self.flying) >= IN_FLIGHT:
            return
        number, work = self.head, self.machine.works[self.head]
        if not work.skipped and len(self.sliced) >= SLICE:
            return
        self.head, self.state = None, "EMPTY"
        now = self.machine.start[number] = self.clock.now
        self.flying.append(number)
        self.empty = now + 1
        self.clock.at(self.empty, self.pull)
        if work.skipped:
            self.machine.done[number] = now
            self.clock.at(now + 1, lambda: self.retire(number))
        else:
            self.sliced.append((number, now + 1))
            self.clock.at(now + 1, self.feed)

    def feed(self) -> None:
        """The engine takes what has reached it."""
        now = self.clock.now
        if not self.sliced or self.sliced[0][1] > now or not self.unit.takes():
            return
        number, _ = self.sliced.popleft()
        self.clock.at(now + 1, self.start)
        self.unit.begin(self.machine.works[number], lambda cycle: self.finish(number, cycle))

    def finish(self, number: int, cycle: int) -> None:
        self.machine.done[number] = cycle + 1
        self.clock.at(cycle + 2, lambda: self.retire(number))

    def retire(self, number: int) -> None:
        self.finished.add(number)
        self.give()

    def give(self) -> None:
        """Gives tokens in order, those of one instruction a cycle."""
        if self.clock.now < self.quiet or not self.flying or self.flying[0] not in self.finished:
            return
        first = self.flying.popleft()
        self.finished.remove(first)
        self.quiet = self.clock.now + 1
        signal = self.machine.works[first].instruction.signal
        self.clock.at(self.clock.now + 1, lambda: self.machine.give(self.engine, signal))
        self.clock.at(self.clock.now + 1, self.start)
        self.clock.at(self.clock.now + 1, self.give)
