"""A behavioural DRAM behind a `MemoryPort`: latency, stalls, and a check of the port's rules."""

import random
from collections import deque

__all__ = ["Dram"]


class Dram:
    """Bytes behind a memory port; `image` is what is in there.

    Parameters
    ----------
    port : the port, as its user (the device under test) has it.
    size : bytes.
    latency : least cycles from a command to its first word, and from the last word to `written`.
    stall : probability that a channel pauses in a cycle.
    """

    def __init__(self, bus_bytes: int, size: int = 1 << 16, latency: int = 0, stall: float = 0.0,
                 seed: int = 0):
        self.bus_bytes, self.latency, self.stall = bus_bytes, latency, stall
        self.image = bytearray(size)
        self.draw = random.Random(seed)
        self.reads, self.writes = [], []  # bursts (address, beats) in the order of their commands
        self.reported = 0  # writes

    def _check(self, burst):
        address, beats = burst.address, burst.beats
        assert beats >= 1 and address % self.bus_bytes == 0
        last = address + beats * self.bus_bytes - 1
        assert address >> 12 == last >> 12, f"burst {address:#x}..{last:#x} crosses a page"
        assert last < len(self.image)
        return address, beats

    def _go(self):
        return self.draw.random() >= self.stall

    async def serve_reads(self, ctx, command, data):
        """Background bench of the read channel."""
        cycle, due, held = 0, deque(), None
        while True:
            accept = self._go()
            ctx.set(command.ready, accept)
            if held is None and due and due[0][0] <= cycle and self._go():
                _, address = due.popleft()
                held = int.from_bytes(self.image[address:address + self.bus_bytes], "little")
                ctx.set(data.payload, held)
            ctx.set(data.valid, held is not None)
            *_, asked, burst, taken = await ctx.tick().sample(command.valid, command.payload,
                                                          data.ready)
            if asked and accept:
                address, beats = self._check(burst)
                self.reads.append((address, beats))
                due.extend((cycle + self.latency + 1, address + i * self.bus_bytes)
                           for i in range(beats))
            if taken:
                held = None
            cycle += 1

    async def serve_writes(self, ctx, command, data, written):
        """Background bench of the write channel."""
        cycle, open_bursts, finished = 0, deque(), deque()
        while True:
            accept = self._go()
            ctx.set(command.ready, accept)
            take = bool(open_bursts) and self._go()
            ctx.set(data.ready, take)
            report = bool(finished) and finished[0] <= cycle and self._go()
            if report:
                finished.popleft()
                self.reported += 1
            ctx.set(written, report)
            *_, asked, burst, given, word = await ctx.tick().sample(
                command.valid, command.payload, data.valid, data.payload)
            if given and take:
                address, beats = open_bursts.popleft()
                self.image[address:address + self.bus_bytes] = word.to_bytes(self.bus_bytes,
                                                                             "little")
                if beats == 1:
                    finished.append(cycle + self.latency + 1)
                else:
                    open_bursts.appendleft((address + self.bus_bytes, beats - 1))
            if asked and accept:
                address, beats = self._check(burst)
                self.writes.append((address, beats))
                open_bursts.append((address, beats))
            cycle += 1

    def serve(self, port):
        """Background benches for both channels of a memory port."""
        async def reads(ctx):
            await self.serve_reads(ctx, port.read_command, port.read_data)

        async def writes(ctx):
            await self.serve_writes(ctx, port.write_command, port.write_data, port.written)

        return reads, writes
