"""Saturating addition into the residual memory."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY, Masked, ReadPort, WritePort

__all__ = ["ResidualUpdate"]


class ResidualUpdate(wiring.Component):
    """Writes words to the residual memory, or adds them to what is there, saturated to 16 bits.

    One word per cycle while the ports accept; an addition takes 4 cycles. A word that is still
    being added to holds back the next addition to the same word, so that the order of writes is
    the order of `updates`.

    Members
    -------
    accumulate : In(1)
        Hold it while updates are inside.
    updates : In(stream.Signature(Masked(16, lanes)))
    read : Out(ReadPort(16 * lanes))
    write : Out(WritePort(16, lanes))
    """

    SLOTS = READ_LATENCY + 2

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "accumulate": In(1),
            "updates": In(stream.Signature(Masked(16, config.lanes))),
            "read": Out(ReadPort(16 * config.lanes)),
            "write": Out(WritePort(16, config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        updates, read, write = self.updates, self.read, self.write.write

        # A ring of words in work: taken, then added to, then written, each in order.
        slot = data.StructLayout({"taken": 1, "added": 1, "word": updates.payload.shape()})
        slots = Signal(data.ArrayLayout(slot, self.SLOTS))
        take, add, retire = (Signal(range(self.SLOTS), name=name)
                             for name in ("take", "add", "retire"))
        conflict = Cat(s.taken & (s.word.address == updates.p.address) for s in slots).any()
        taken = Signal()
        m.d.comb += [
            read.address.valid.eq(updates.valid & self.accumulate & ~conflict & ~slots[take].taken),
            read.address.payload.eq(updates.p.address),
            taken.eq(read.address.valid & read.address.ready),
        ]
        with m.If(self.accumulate):
            m.d.comb += [updates.ready.eq(taken), write.payload.eq(slots[retire].word),
                         write.valid.eq(slots[retire].taken & slots[retire].added)]
        with m.Else():
            m.d.comb += [updates.ready.eq(write.ready), write.payload.eq(updates.payload),
                         write.valid.eq(updates.valid)]

        arrives = taken
        for _ in range(READ_LATENCY):
            before, arrives = arrives, Signal(name="arrives")
            m.d.sync += arrives.eq(before)
        lanes = data.ArrayLayout(signed(16), self.config.lanes)
        ours = data.View(lanes, slots[add].word.data)
        theirs = data.View(lanes, read.data.payload)
        with m.If(self.accumulate & write.valid & write.ready):
            m.d.sync += [slots[retire].taken.eq(0), retire.eq(_next(retire, self.SLOTS))]
        with m.If(taken):
            m.d.sync += [slots[take].taken.eq(1), slots[take].added.eq(0),
                         slots[take].word.eq(updates.payload), take.eq(_next(take, self.SLOTS))]
        with m.If(arrives):
            m.d.sync += [
                slots[add].added.eq(1), add.eq(_next(add, self.SLOTS)),
                slots[add].word.data.eq(Cat(_add(a, b) for a, b in zip(ours, theirs))),
            ]
        return m


def _next(pointer, slots):
    return Mux(pointer == slots - 1, 0, pointer + 1)


def _add(a, b):
    """Sum of two int16, saturated."""
    total = a + b
    return Mux(total[15] == total[16], total[:16], Mux(total[16], 0x8000, 0x7FFF))
