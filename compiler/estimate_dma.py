"""Instruction fetch, LOAD and STORE: when they ask for bursts, and when these are done."""

import math
from collections import deque
from collections.abc import Callable

from moeware.compiler.estimate_dram import Burst, Clock, Dram
from moeware.hw.arch import isa, layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.work import Work

__all__ = ["Fetch", "Loads", "Reads", "Stores", "cycles_per_beat"]

PAGE_BYTES, LONGEST = 4096, 64  # of bursts, beats
FETCH_BYTES = 256  # of an instruction burst
READS = 8  # bursts that are asked for and not all here
JOBS = 4  # loads that wait for the data of earlier ones
WRITES = 15  # bursts that are not reported written
WRITE_WORDS, WRITE_BEGINS = 16, 8  # written words that wait at the memory; that start a burst


def bursts(config: Config, address: int, beats: int) -> list[tuple[int, int]]:
    """(address, beats) of each burst of a transfer."""
    longest = min(LONGEST, PAGE_BYTES // config.bus_bytes)
    first = min(beats, longest - address // config.bus_bytes % longest)
    sizes = [first, *[longest] * ((beats - first) // longest), (beats - first) % longest]
    found = []
    for size in sizes:
        if size:
            found.append((address, size))
            address += size * config.bus_bytes
    return found


def cycles_per_beat(config: Config, work: Work) -> int:
    """Cycles that a bus word takes on the side of the accelerator: one for each of its words, or of
    the bus words that it is unpacked to."""
    memory, packed = work.instruction.memory, work.instruction.fields.get("packed", 0)
    return max(1, config.bus_bytes // layout.word_bytes(config, Memory(memory))) << packed


class Reads:
    """The read channel: bursts of the fetch before those of loads, one command a cycle.

    ask(urgent, address, beats, pace, final, accepted, arrived): `accepted` is called in the cycle in which
    the command leaves its asker, `arrived` when it is known when the burst's first word comes and
    when its last one was taken; pace : cycles that a word takes to be taken; final : of its
    transfer, so that a cycle goes by before the next one's words are taken.
    """

    def __init__(self, clock: Clock, dram: Dram):
        self.clock, self.dram = clock, dram
        self._asked: dict[bool, deque] = {True: deque(), False: deque()}
        self._command: Burst | None = None
        self._in_flight = 0
        self._taken = 0.0  # when the last word asked for has been taken
        self._unread: deque[tuple[float, int]] = deque()
        dram.on_room.append(self._step)

    def ask(self, urgent: bool, address: int, beats: int, pace: int, final: bool,
            accepted: Callable[[], None], arrived: Callable[[int, int], None]) -> None:
        self._asked[urgent].append((address, beats, pace, final, accepted, arrived))
        self._step()

    def _step(self) -> None:
        if self._command is not None and self.dram.takes(False) and self._command.ready <= self.clock.now:
            burst, self._command = self._command, None
            self.dram.add(burst)
        queue = self._asked[True] or self._asked[False]
        if self._command is not None or not queue or self._in_flight == READS:
            return
        address, beats, pace, final, accepted, arrived = queue.popleft()
        latency = self.dram.timing.read_latency

        def moved(first: int, last: int) -> None:
            # A word is at the port a cycle after its latency.
            self._taken = max(self._taken + beats * pace, last + 1 + latency,
                              first + latency + beats * pace)
            taken = math.ceil(self._taken)
            self._taken += final
            arrived(first + 1 + latency, taken)
            self.clock.at(taken + 1, self._left)

        self._in_flight += 1
        self._command = Burst(address, beats, moved, ready=self.clock.now + 1)
        accepted()
        self.clock.at(self.clock.now + 1, self._step)

    def _left(self) -> None:
        self._in_flight -= 1
        self._step()


class Fetch:
    """Reads instructions and dispatches them in order: calls ``dispatch(number)``, which is False
    where the queue is full; `wake` then tries again."""

    def __init__(self, clock: Clock, reads: Reads, config: Config, entry: int, count: int,
                 dispatch: Callable[[int], bool]):
        self.clock, self.reads = clock, reads
        self._bus = config.bus_bytes
        self._beats = FETCH_BYTES // self._bus
        self._position = entry // self._bus
        self._stop = entry + (count + 1) * isa.BYTES  # END is the last one
        self._reserved = 0
        self._words: deque[int] = deque()  # cycles from which they can be taken
        self._have, self._number, self._count = 0, 0, count
        self._dispatch, self._blocked, self._busy = dispatch, False, False
        self._asking = False
        clock.at(0, self._ask)

    def _ask(self) -> None:
        if self._asking or self._reserved >= self._beats or self._number > self._count:
            return
        length = self._beats - self._position % self._beats
        address, self._position = self._position * self._bus, self._position + length
        self._reserved += length
        self._asking = True
        self.clock.at(self.clock.now + 1, lambda: self.reads.ask(
            True, address, length, 1, False, self._accepted, lambda *when: self._arrived(length, *when)))

    def _accepted(self) -> None:
        self._asking = False
        self.clock.at(self.clock.now + 1, self._ask)

    def _arrived(self, length: int, first: int, last: int) -> None:
        pace = (last - first) / max(1, length - 1)
        self._words += [math.ceil(first + number * pace) + 2 for number in range(length)]
        self._pump()

    def _pump(self) -> None:
        """Takes the next bus word into the window, if that has room."""
        if not self._busy and self._words:
            self._busy = True
            self.clock.at(self._words.popleft(), self._take)

    def _take(self) -> None:
        self._reserved -= 1
        self._have += self._bus
        self.clock.at(self.clock.now + 1, self._ask)
        self.clock.at(self.clock.now + 1, self._send)

    def _send(self) -> None:
        if self._have >= isa.BYTES and self._number <= self._count:
            if self._number < self._count and not self._dispatch(self._number):
                self._blocked = True
                return
            self._number += 1
            self._have -= isa.BYTES
            self.clock.at(self.clock.now + 1, self._send)
        else:
            self._busy = False
            self._pump()

    def wake(self) -> None:
        if self._blocked:
            self._blocked = False
            self._send()


class Loads:
    """The LOAD engine. begin(work, done): takes an instruction in the present cycle and calls `done`
    with the cycle in which it will be done. takes(): whether it can; on_ready : called when it can
    again."""

    def __init__(self, clock: Clock, reads: Reads, config: Config):
        self.clock, self.reads, self.config = clock, reads, config
        self.on_ready: Callable[[], None] = lambda: None
        self._cutting = False  # bursts of the newest instruction are still to be asked for
        self._jobs = 0  # that are not done; the data of the first come in
        self._done = -2

    def takes(self) -> bool:
        return not self._cutting and self._jobs <= JOBS

    def begin(self, work: Work, done: Callable[[int], None]) -> None:
        left = deque(bursts(self.config, work.instruction.address, work.beats))
        first = self.clock.now + (4 if work.instruction.packed else 3)
        pace = cycles_per_beat(self.config, work)
        self._cutting = True
        self._jobs += 1
        if not left:
            self.clock.at(self.clock.now + 3, self._cut)
            self._finish(self.clock.now + 3, done)
            return

        def ask() -> None:
            address, beats = left.popleft()
            last = not left
            self.reads.ask(False, address, beats, pace, last,
                           lambda: self.clock.at(self.clock.now + 2, self._cut if last else ask),
                           lambda _, taken: self._finish(taken + 2, done) if last else None)
        self.clock.at(first, ask)

    def _cut(self) -> None:
        self._cutting = False
        self.on_ready()

    def _finish(self, cycle: int, done: Callable[[int], None]) -> None:
        # The next job begins two cycles after the last write of this one.
        self._done = max(cycle, self._done + 2)
        self.clock.at(self._done, self._leave)
        done(self._done)

    def _leave(self) -> None:
        self._jobs -= 1
        self.on_ready()


class Stores:
    """The STORE engine; as `Loads`, one instruction at a time."""

    def __init__(self, clock: Clock, dram: Dram, config: Config):
        self.clock, self.dram, self.config = clock, dram, config
        self.on_ready: Callable[[], None] = lambda: None
        self._busy = False
        self._waiting: deque[Burst] = deque()
        self._in_flight = 0
        dram.on_room.append(self._step)

    def takes(self) -> bool:
        return not self._busy

    def begin(self, work: Work, done: Callable[[int], None]) -> None:
        pace = cycles_per_beat(self.config, work)
        now, latency = self.clock.now, self.dram.timing.write_latency
        self._busy = True
        left = bursts(self.config, work.instruction.address, work.beats)
        packed = now + 5  # the memory's latency, and two registers
        count = len(left)

        def finish(cycle: int) -> None:
            done(cycle)
            self.clock.at(cycle + 1, self._free)

        if not left:
            finish(now + 3)
        for number, (address, beats) in enumerate(left):
            def moved(_, last: int, final: bool = number == count - 1) -> None:
                written = last + 1 + latency
                self.clock.at(written, self._written)
                if final:
                    finish(written + 1)
            ready = packed + min(beats, WRITE_BEGINS) * pace
            packed += beats * pace
            self._waiting.append(Burst(address, beats, moved, write=True, ready=ready,
                                       until=packed))
            self.clock.at(now + 3 + 2 * number, self._step)

    def _free(self) -> None:
        self._busy = False
        self.on_ready()

    def _written(self) -> None:
        self._in_flight -= 1
        self._step()

    def _step(self) -> None:
        while self._waiting and self._in_flight < WRITES and self.dram.takes(True):
            self._in_flight += 1
            self.dram.add(self._waiting.popleft())
