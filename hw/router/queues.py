"""The tokens of each expert."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import QueueEntry, QueuePort
from ..memories import BankedMemory
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
        m.submodules.memory = memory = BankedMemory(
            cell_bits=QueueEntry.as_shape().size, cells=1, shape=QueueEntry,
            words=max(2, experts * self.config.max_rows))
        (write,), (read,) = memory.writers, memory.readers
        lengths = Array(Signal(range(self.config.max_rows + 1), name=f"length_{i}")
                        for i in range(experts))

        # An append in two steps: look the length up, then write there and count.
        entry, token, length, valid = Signal(Append), Signal(13), Signal.like(lengths[0]), Signal()
        m.d.sync += [
            entry.eq(self.entries.payload), token.eq(self.token), valid.eq(self.entries.valid),
            length.eq(lengths[self.entries.p.expert]),
        ]
        m.d.comb += [
            write.write.valid.eq(valid), write.write.p.mask.eq(1),
            write.write.p.address.eq(begin[entry.expert] + length),
            write.write.p.data.eq(Cat(token, entry.weight)),
        ]
        with m.If(valid):
            m.d.sync += [lengths[entry.expert].eq(length + 1),
                         self.empty.bit_select(entry.expert, 1).eq(0)]
        with m.If(self.clear):
            m.d.sync += [each.eq(0) for each in lengths]
            m.d.sync += self.empty.eq(-1)

        m.d.comb += [
            read.address.valid.eq(self.queue.index.valid),
            read.address.payload.eq(begin[self.queue.index.p.expert] + self.queue.index.p.index),
            self.queue.entry.valid.eq(read.data.valid),
            self.queue.entry.payload.eq(read.data.payload),
        ]
        m.d.sync += self.queue.length.eq(lengths[self.queue.expert])
        return m
