"""One read channel for two clients."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..arbiter import BurstOrder
from ..ports import Burst

__all__ = ["ReadShare"]

BURSTS = 8  # in flight


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
        m.submodules.owners = owners = BurstOrder(2, BURSTS)

        sent = ~self.command.valid | self.command.ready
        urgent = self.urgent_command.valid
        chosen = Signal(Burst)
        with m.If(urgent):
            m.d.comb += chosen.eq(self.urgent_command.payload)
        with m.Else():
            m.d.comb += chosen.eq(self.other_command.payload)
        take = Signal()
        m.d.comb += [
            self.urgent_command.ready.eq(sent & owners.burst.ready),
            self.other_command.ready.eq(sent & owners.burst.ready & ~urgent),
            take.eq(sent & owners.burst.ready & (urgent | self.other_command.valid)),
            owners.burst.valid.eq(take), owners.burst.p.client.eq(urgent),
            owners.burst.p.beats.eq(chosen.beats),
        ]
        with m.If(take):
            m.d.sync += [self.command.payload.eq(chosen), self.command.valid.eq(1)]
        with m.Elif(self.command.ready):
            m.d.sync += self.command.valid.eq(0)

        for urgent, client in enumerate((self.other_data, self.urgent_data)):
            m.d.comb += client.payload.eq(self.data.payload)
            with m.If(owners.active & (owners.client == urgent)):
                m.d.comb += [client.valid.eq(self.data.valid), self.data.ready.eq(client.ready)]
        m.d.comb += owners.moved.eq(self.data.valid & self.data.ready)
        return m
