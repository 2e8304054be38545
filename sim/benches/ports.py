"""Agents at the accelerator's ports: each drives its inputs once a cycle and then sees the outputs.

`drive` runs while the clock is low; `sample`, after everything has settled, sees what the next rising
edge will transfer.
"""

import random
from collections import deque

from .protocol import BurstChecker, StreamChecker

__all__ = ["Memory", "Pauses", "Registers"]


class Pauses:
    """Withholds a channel at random, in phases of different density.

    stall : highest probability of a pause; 0: never.
    """

    def __init__(self, stall: float, seed: int):
        self._draw, self._stall = random.Random(seed), stall
        self._left, self._level = 0, 0.0

    def __call__(self) -> bool:
        if not self._stall:
            return False
        if not self._left:
            self._left = self._draw.randrange(1, 40)
            self._level = self._draw.choice((0, self._stall / 2, self._stall))
        self._left -= 1
        return self._draw.random() < self._level


class Stream:
    """The signals of one stream; `offer` and `accept` are the two ways to drive it."""

    def __init__(self, dut, name: str, checked: bool):
        self.valid, self.ready, self.payload = (
            getattr(dut, f"{name}__{part}") for part in ("valid", "ready", "payload"))
        self.checker = StreamChecker(name.replace("__", ".")) if checked else None
        self.offered = False

    def offer(self, payload: int | None) -> None:
        self.offered = payload is not None
        self.valid.value = int(self.offered)
        if payload is not None:
            self.payload.value = payload

    def accept(self, ready: bool) -> None:
        self.ready.value = int(ready)

    def transferred(self) -> bool:
        valid, ready = bool(self.valid.value), bool(self.ready.value)
        if self.checker is not None:
            self.checker.step(valid, ready, int(self.payload.value) if valid else 0)
        return valid and ready


class Memory:
    """DRAM behind ``memory``: serves bursts in order, each channel with pauses of its own.

    contents : a bytearray, read and written in place. latency : least cycles from a command to its
    first word, and from a burst's last word to `written`.
    """

    def __init__(self, dut, bus_bytes: int, contents: bytearray, *, stall: float = 0.0,
                 latency: int = 3, seed: int = 0):
        self.bus_bytes, self.contents, self.latency = bus_bytes, contents, latency
        self.read_command, self.write_command, self.write_data = (
            Stream(dut, f"memory__{name}", True)
            for name in ("read_command", "write_command", "write_data"))
        self.read_data = Stream(dut, "memory__read_data", False)
        self.written = dut.memory__written
        self.reads = BurstChecker("memory.read", bus_bytes, len(contents))
        self.writes = BurstChecker("memory.write", bus_bytes, len(contents))
        self._pauses = {name: Pauses(stall, 10 * seed + i) for i, name in enumerate(
            ("read_command", "read_data", "write_command", "write_data", "written"))}
        self._cycle = 0
        self._reading: deque[tuple[int, int]] = deque()  # (cycle from which it may come, address)
        self._writing: deque[int] = deque()  # addresses of announced words
        self._lasts: deque[int] = deque()  # words of each announced burst
        self._words: deque[bytes] = deque()
        self._finished: deque[int] = deque()  # cycles from which bursts may be reported

    def drive(self) -> None:
        self._cycle += 1
        self.read_command.accept(not self._pauses["read_command"]())
        self.write_command.accept(not self._pauses["write_command"]())
        self.write_data.accept(len(self._words) < 4 and not self._pauses["write_data"]())
        if not self.read_data.offered:
            ready = self._reading and self._reading[0][0] <= self._cycle
            if ready and not self._pauses["read_data"]():
                address = self._reading.popleft()[1]
                self.read_data.offer(int.from_bytes(
                    self.contents[address:address + self.bus_bytes], "little"))
            else:
                self.read_data.offer(None)
        report = bool(self._finished and self._finished[0] <= self._cycle
                      and not self._pauses["written"]())
        if report:
            self._finished.popleft()
        self.written.value = int(report)

    def sample(self) -> None:
        if self.read_data.transferred():
            self.reads.word()
            self.read_data.offered = False
        if self.read_command.transferred():
            address, beats = self._burst(self.read_command, self.reads)
            self._reading.extend((self._cycle + self.latency, address + i * self.bus_bytes)
                                 for i in range(beats))
        if self.write_command.transferred():
            address, beats = self._burst(self.write_command, self.writes)
            self._writing.extend(address + i * self.bus_bytes for i in range(beats))
            self._lasts.append(beats)
        if self.write_data.transferred():
            self.writes.word()
            self._words.append(int(self.write_data.payload.value).to_bytes(self.bus_bytes, "little"))
        if self._words and self._writing:
            address = self._writing.popleft()
            self.contents[address:address + self.bus_bytes] = self._words.popleft()
            self._lasts[0] -= 1
            if not self._lasts[0]:
                self._lasts.popleft()
                self._finished.append(self._cycle + self.latency)

    def _burst(self, command: Stream, checker: BurstChecker) -> tuple[int, int]:
        payload = int(command.payload.value)
        address, beats = payload & 0xFFFFFFFF, payload >> 32
        checker.command(address, beats)
        return address, beats

    def finish(self) -> None:
        """At the end of a run: every burst has moved all its words."""
        self.reads.finish()
        self.writes.finish()


class Registers:
    """The host at ``registers``: one access at a time."""

    def __init__(self, dut, *, stall: float = 0.0, seed: int = 0):
        self.request = Stream(dut, "registers__request", False)
        self.response = Stream(dut, "registers__response", True)
        self.answer: int | None = None
        self._waiting: int | None = None
        self._pause_request, self._pause_response = Pauses(stall, seed + 101), Pauses(stall, seed + 102)

    def begin(self, index: int, value: int | None) -> None:
        """Read a register, or write `value` to it; `answer` is the response once it came."""
        self.answer = None
        self._waiting = (value or 0) << 9 | index << 1 | (value is not None)

    def drive(self) -> None:
        if not self.request.offered:
            pause = self._waiting is None or self._pause_request()
            self.request.offer(None if pause else self._waiting)
        self.response.accept(not self._pause_response())

    def sample(self) -> None:
        if self.request.transferred():
            self.request.offered, self._waiting = False, None
        if self.response.transferred():
            self.answer = int(self.response.payload.value)
