"""When bursts move between DRAM and the accelerator: the memory and its bus, burst by burst.

What word by word decides, such as a change of direction in the middle of a burst, is decided here
between bursts.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Burst", "Clock", "Dram", "DramCycles"]

COMMANDS = 4  # bursts that wait at the memory in each direction
RUN_WORDS = 64  # before the other direction gets its turn
BUFFERED_WORDS = 64  # read words that wait for the accelerator, besides those under way


class Clock:
    """Actions in the order of the cycles they happen in."""

    def __init__(self):
        self.now = 0
        self._actions: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, cycle: int, action: Callable[[], None]) -> None:
        """Call `action` in `cycle`, or in the present one if that is later."""
        heapq.heappush(self._actions, (max(cycle, self.now), self._count, action))
        self._count += 1

    def run(self) -> None:
        while self._actions:
            self.now, _, action = heapq.heappop(self._actions)
            action()


@dataclass(frozen=True, kw_only=True)
class DramCycles:
    """Timing of a memory in cycles of the accelerator.

    rate : 1/256 bytes per cycle; read_latency, write_latency : from a word's turn on the data bus to
    the port; activate, precharge : open and close a row; turnaround : between reading and writing;
    refresh_interval : 0 for none; refresh : how long one blocks everything.
    """

    bus_bytes: int
    rate: int
    read_latency: int = 0
    write_latency: int = 0
    activate: int = 0
    precharge: int = 0
    turnaround: int = 0
    refresh_interval: int = 0
    refresh: int = 0
    banks: int = 4
    row_bytes: int = 1024


@dataclass(eq=False)
class Burst:
    """Bus words from `address` on. moved : called with the cycles in which the first and the last
    word move on the data bus. ready : cycle from which written words are there; until : the cycle
    in which the last of them is."""

    address: int
    beats: int
    moved: Callable[[int, int], None]
    write: bool = False
    ready: int = 0
    until: int = 0
    rows: list[int] = field(default_factory=list)


class Dram:
    """Serves the bursts of each direction in order. on_room : called when a burst has been served,
    so that another one can wait."""

    def __init__(self, clock: Clock, timing: DramCycles):
        self.clock, self.timing = clock, timing
        self.on_room: list[Callable[[], None]] = []
        self.read_limit = (timing.rate * timing.read_latency // (256 * timing.bus_bytes)
                           + BUFFERED_WORDS)
        self._pace = max(1.0, 256 * timing.bus_bytes / timing.rate)  # cycles of a word
        self._queues: dict[bool, deque[Burst]] = {False: deque(), True: deque()}
        self._free = 0.0  # the data bus
        self._serving = False
        self._writing, self._run = False, 0
        self._open = [-1] * timing.banks
        self._bank_ready = [0] * timing.banks
        self._next_refresh = timing.refresh_interval

    def takes(self, write: bool) -> bool:
        return len(self._queues[write]) < COMMANDS

    def add(self, burst: Burst) -> None:
        last = burst.address + burst.beats * self.timing.bus_bytes - 1
        burst.rows = list(range(burst.address // self.timing.row_bytes,
                                last // self.timing.row_bytes + 1))
        self._queues[burst.write].append(burst)
        if self._serving:
            if burst.write == self._writing:
                self._open_ahead(self.clock.now)
        else:
            self._serve()

    def _serve(self) -> None:
        queue = self._choose()
        if queue is None:
            return
        burst, timing = queue[0], self.timing
        place = max(self._free, self.clock.now)
        place = self._idle_refreshes(place)
        first = None
        address, left = burst.address, burst.beats
        for row in burst.rows:
            self._open_ahead(math.ceil(place))
            bank = row % timing.banks
            self._activate(bank, row // timing.banks, math.ceil(place))
            place = max(place, self._bank_ready[bank])
            words = min(left, ((row + 1) * timing.row_bytes - address) // timing.bus_bytes)
            if first is None:
                first = math.ceil(place + self._pace) - 1
            place = self._move(place, words, bank, row)
            address, left = address + words * timing.bus_bytes, left - words
        if burst.write:
            place = max(place, burst.until + 1)
        self._run += burst.beats
        self._free, self._serving = place, True
        last = math.ceil(place) - 1
        self.clock.at(last + 1, lambda: self._served(queue))
        burst.moved(first, last)

    def _served(self, queue: deque[Burst]) -> None:
        queue.popleft()
        self._serving = False
        for action in self.on_room:
            action()
        if not self._serving:
            self._serve()

    def _choose(self) -> deque[Burst] | None:
        """The queue whose turn it is; if none can go yet, look again when one can."""
        reads, writes = self._queues[False], self._queues[True]
        can_write = bool(writes) and writes[0].ready <= self.clock.now
        here, there = (can_write, bool(reads)) if self._writing else (bool(reads), can_write)
        if there and (not here or self._run >= RUN_WORDS):
            self._writing, self._run = not self._writing, 0
            self._free = max(self._free, self.clock.now) + self.timing.turnaround
            here = True
        if here:
            return self._queues[self._writing]
        if writes:
            self.clock.at(writes[0].ready, lambda: self._serving or self._serve())
        return None

    def _move(self, place: float, words: int, bank: int, row: int) -> float:
        """The end of `words` words of a row, with the refreshes that come in between."""
        timing = self.timing
        end = place + words * self._pace
        while timing.refresh_interval and self._next_refresh < end:
            self._next_refresh += timing.refresh_interval
            self._open = [-1] * timing.banks
            self._open[bank] = row // timing.banks
            end += timing.refresh + timing.precharge + timing.activate
        return end

    def _idle_refreshes(self, place: float) -> float:
        timing = self.timing
        while timing.refresh_interval and self._next_refresh <= place:
            closes = timing.precharge if any(row >= 0 for row in self._open) else 0
            place = max(place, self._next_refresh + timing.refresh + closes)
            self._next_refresh += timing.refresh_interval
            self._open = [-1] * timing.banks
        return place

    def _activate(self, bank: int, row: int, cycle: int) -> None:
        if self._open[bank] != row:
            closes = self.timing.precharge if self._open[bank] >= 0 else 0
            self._bank_ready[bank] = cycle + self.timing.activate + closes
            self._open[bank] = row

    def _open_ahead(self, cycle: int) -> None:
        """Rows that come next are opened meanwhile, where their banks are not in use."""
        used: set[int] = set()
        for burst in self._queues[self._writing]:
            for row in burst.rows:
                bank = row % self.timing.banks
                if used and bank not in used:
                    self._activate(bank, row // self.timing.banks, cycle)
                used.add(bank)
