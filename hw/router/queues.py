"""The tokens of each expert."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY, QueueEntry, QueuePort
from .gate import Append

__all__ = ["Queues"]


class Queues(wiring.Component):
    """A queue of `max_rows` entries for each expert, in one block memory.

    An entry is readable, and counted, `LATENCY` cycles after it came. Entries for one expert must
    be at least 2 cycles apart.

    Members
    -------
    clear : In(1)
        Empties all queues.
    token : In(13)
        The token of the entry that comes.
    entries : In(stream.Signature(Append, always_ready=True))
    queue : In(QueuePort())
    empty : Out(max_experts)
    """

    LATENCY = 2

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "clear": In(1), "token": In(13),
            "entries": In(stream.Signature(Append, always_ready=True)),
            "queue": In(QueuePort()),
            "empty": Out(config.max_experts, init=(1 << config.max_experts) - 1),
        })

    def elaborate(self, platform):
        m = Module()
        experts = self.config.max_experts
        # Where each queue begins: a table, on which no multiplier is spent.
        begin = Array(expert * self.config.max_rows for expert in range(experts))
        m.submodules.memory = memory = Memory(
            shape=QueueEntry, depth=experts * self.config.max_rows, init=[])
        write, read = memory.write_port(), memory.read_port()
        lengths = Array(Signal(range(self.config.max_rows + 1), name=f"length_{i}")
                        for i in range(experts))

        # An append in two steps: look the length up, then write there and count.
        entry, token, length, valid = Signal(Append), Signal(13), Signal.like(lengths[0]), Signal()
        m.d.sync += [
            entry.eq(self.entries.payload), token.eq(self.token), valid.eq(self.entries.valid),
            length.eq(lengths[self.entries.p.expert]),
        ]
        m.d.comb += [
            write.addr.eq(begin[entry.expert] + length),
            write.data.token.eq(token), write.data.weight.eq(entry.weight), write.en.eq(valid),
        ]
        with m.If(valid):
            m.d.sync += [lengths[entry.expert].eq(length + 1),
                         self.empty.bit_select(entry.expert, 1).eq(0)]
        with m.If(self.clear):
            m.d.sync += [each.eq(0) for each in lengths]
            m.d.sync += self.empty.eq(-1)

        # As in `BankedMemory`: registers before the memory and one behind it.
        index, address = Signal(self.queue.index.payload.shape()), Signal.like(read.addr)
        asked = Signal(READ_LATENCY)
        m.d.comb += [read.addr.eq(address), read.en.eq(1), self.queue.entry.valid.eq(asked[-1])]
        m.d.sync += [
            index.eq(self.queue.index.payload),
            address.eq(begin[index.expert] + index.index),
            self.queue.length.eq(lengths[self.queue.expert]),
            asked.eq(Cat(self.queue.index.valid, asked)),
            self.queue.entry.payload.eq(read.data),
        ]
        return m
