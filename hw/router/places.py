"""Which choices find a place in the queue of their expert."""

from amaranth import Array, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import RouteSetup
from .gate import Append

__all__ = ["Places"]


class Places(wiring.Component):
    """Passes on the choices of the setup's `choice`, if it has one, as long as their expert has taken
    fewer than `capacity` tokens of the frame, if there is one.

    An entry leaves, or is dropped, `LATENCY` cycles after it came. Entries for one expert must be at
    least 2 cycles apart.

    Members
    -------
    setup : In(RouteSetup)
        Holds still while entries are inside.
    restart : In(1)
        Another frame begins: no expert has taken a token.
    choices : In(stream.Signature(Append, always_ready=True))
    entries : Out(stream.Signature(Append, always_ready=True))
    ended : Out(1)
        This is the cycle of the last entry of a row, whether it leaves or is dropped.
    """

    LATENCY = 2

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "setup": In(RouteSetup), "restart": In(1),
            "choices": In(stream.Signature(Append, always_ready=True)),
            "entries": Out(stream.Signature(Append, always_ready=True)),
            "ended": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        setup, config = self.setup, self.config
        taken = Array(Signal(range(config.max_rows + 1), name=f"taken_{i}")
                      for i in range(config.max_experts))
        number = Signal(5, init=1)  # of the choice that comes, in its row
        last = number == setup.chosen
        with m.If(self.choices.valid):
            m.d.sync += number.eq(Mux(last, 1, number + 1))

        entry, valid, wanted, count = Signal(Append), Signal(), Signal(), Signal.like(taken[0])
        ends = Signal()
        m.d.sync += [
            entry.eq(self.choices.payload), valid.eq(self.choices.valid),
            ends.eq(self.choices.valid & last),
            wanted.eq((setup.choice == 0) | (setup.choice == number)),
            count.eq(taken[self.choices.p.expert]),
        ]
        leaves = Signal()
        m.d.comb += leaves.eq(valid & wanted & ((setup.capacity == 0) | (count < setup.capacity)))
        m.d.sync += [self.entries.payload.eq(entry), self.entries.valid.eq(leaves),
                     self.ended.eq(ends)]
        with m.If(leaves & (setup.capacity != 0)):
            m.d.sync += taken[entry.expert].eq(count + 1)
        with m.If(self.restart):
            m.d.sync += [each.eq(0) for each in taken]
        return m
