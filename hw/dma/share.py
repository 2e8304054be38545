"""One read channel for two clients."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..ports import Burst

__all__ = ["ReadShare"]

BURSTS = 8  # in flight


class Owner(data.Struct):
    """Whose burst it is."""

    urgent: 1
    beats: 13


class ReadShare(wiring.Component):
    """Shares the read channel of a memory port between instruction fetch and LOAD, burst by burst.

    A command of the urgent client goes before one of the other: it asks seldom, for few bytes that
    have to be read anyway, and a machine without instructions stands still. Commands pass with one
    cycle of latency, data with none; at most `BURSTS` bursts are in flight. The clients must take
    their data without waiting for each other.

    Members
    -------
    urgent_command : In(stream.Signature(Burst))
    urgent_data : Out(stream.Signature(8 * bus_bytes))
    other_command : In(stream.Signature(Burst))
    other_data : Out(stream.Signature(8 * bus_bytes))
    command : Out(stream.Signature(Burst))
    data : In(stream.Signature(8 * bus_bytes))
    """

    def __init__(self, bus_bytes: int):
        word = stream.Signature(8 * bus_bytes)
        super().__init__({
            "urgent_command": In(stream.Signature(Burst)), "urgent_data": Out(word),
            "other_command": In(stream.Signature(Burst)), "other_data": Out(word),
            "command": Out(stream.Signature(Burst)), "data": In(word),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.owners = owners = SyncFIFO(width=Owner.as_shape().size, depth=BURSTS)

        sent = ~self.command.valid | self.command.ready
        urgent = self.urgent_command.valid
        chosen = Signal(Burst)
        with m.If(urgent):
            m.d.comb += chosen.eq(self.urgent_command.payload)
        with m.Else():
            m.d.comb += chosen.eq(self.other_command.payload)
        take = Signal()
        m.d.comb += [
            self.urgent_command.ready.eq(sent & owners.w_rdy),
            self.other_command.ready.eq(sent & owners.w_rdy & ~urgent),
            take.eq(sent & owners.w_rdy & (urgent | self.other_command.valid)),
            owners.w_en.eq(take),
            owners.w_data.eq(Cat(urgent, chosen.beats)),
        ]
        with m.If(take):
            m.d.sync += [self.command.payload.eq(chosen), self.command.valid.eq(1)]
        with m.Elif(self.command.ready):
            m.d.sync += self.command.valid.eq(0)

        owner = Owner(owners.r_data)
        due = Signal(len(owner.beats), init=1)  # which bus word of the oldest burst comes next
        m.d.comb += [self.urgent_data.payload.eq(self.data.payload),
                     self.other_data.payload.eq(self.data.payload)]
        with m.If(owners.r_rdy):
            with m.If(owner.urgent):
                m.d.comb += [self.urgent_data.valid.eq(self.data.valid),
                             self.data.ready.eq(self.urgent_data.ready)]
            with m.Else():
                m.d.comb += [self.other_data.valid.eq(self.data.valid),
                             self.data.ready.eq(self.other_data.ready)]
        with m.If(self.data.valid & self.data.ready):
            m.d.sync += due.eq(due + 1)
            with m.If(due == owner.beats):
                m.d.comb += owners.r_en.eq(1)
                m.d.sync += due.eq(1)
        return m
