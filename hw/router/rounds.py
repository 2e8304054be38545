"""A row of choices as several rows of one."""

from amaranth import Array, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..interfaces import RouteSetup

__all__ = ["Rounds"]


class Rounds(wiring.Component):
    """Where experts are chosen one after another (`setup.sparse`), each choice of a row by itself, the
    largest first, each in the place of the largest. Else the choices pass.

    One a cycle, in the same cycle.

    Members
    -------
    setup : In(RouteSetup)
        Holds still while rows are inside.
    choices : In(stream.Signature(layout))
    rounds : Out(stream.Signature(layout))
        Past the first undefined, where `setup.sparse`.
    """

    def __init__(self, layout):
        self.count = layout.length
        super().__init__({"setup": In(RouteSetup), "choices": In(stream.Signature(layout)),
                          "rounds": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        round_, last = Signal(range(self.count)), Signal()
        m.d.comb += [
            last.eq(~self.setup.sparse | (round_ + 1 == self.setup.chosen)),
            self.rounds.valid.eq(self.choices.valid), self.rounds.payload.eq(self.choices.payload),
            self.rounds.payload[0].eq(Array(self.choices.payload)[round_]),
            self.choices.ready.eq(self.rounds.ready & last),
        ]
        with m.If(self.rounds.valid & self.rounds.ready):
            m.d.sync += round_.eq(round_ + 1)
            with m.If(last):
                m.d.sync += round_.eq(0)
        return m
