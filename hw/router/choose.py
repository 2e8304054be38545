"""The largest logits of a row."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Logit

__all__ = ["Choose", "choices_layout"]


def choices_layout(count: int) -> data.ArrayLayout:
    """The `count` largest logits of a row, largest first, with their experts."""
    return data.ArrayLayout(data.StructLayout({"value": signed(32), "expert": 8}), count)


class Choose(wiring.Component):
    """The `count` largest logits of each row, largest first, ties to the lower expert.

    A logit a cycle, by insertion into a sorted list; the choices of a row the cycle after its last
    logit. Refused choices hold up the last logit of the next row. In a row of fewer logits the
    choices past the last are undefined.

    Members
    -------
    logits : In(stream.Signature(Logit))
    choices : Out(stream.Signature(choices_layout(count)))
    """

    def __init__(self, count: int):
        self.count = count
        super().__init__({
            "logits": In(stream.Signature(Logit)),
            "choices": Out(stream.Signature(choices_layout(count))),
        })

    def elaborate(self, platform):
        m = Module()
        incoming = self.logits.p
        held = Signal(choices_layout(self.count))
        inserted = Signal.like(held)
        filled = Signal(self.count)  # one bit for each entry that is there
        # Entries that stay where they are: at least as large, and earlier. They are the first ones.
        stays = [filled[i] & (held[i].value >= incoming.value) for i in range(self.count)]
        for i in range(self.count):
            with m.If(stays[i]):
                m.d.comb += inserted[i].eq(held[i])
            with m.Elif(stays[i - 1] if i else 1):
                m.d.comb += [inserted[i].value.eq(incoming.value),
                             inserted[i].expert.eq(incoming.expert)]
            if i:
                with m.Else():
                    m.d.comb += inserted[i].eq(held[i - 1])

        leaves = self.choices.ready | ~self.choices.valid
        m.d.comb += self.logits.ready.eq(~incoming.last | leaves)
        with m.If(self.choices.ready):
            m.d.sync += self.choices.valid.eq(0)
        with m.If(self.logits.valid & self.logits.ready):
            m.d.sync += [held.eq(inserted), filled.eq(Mux(incoming.last, 0, filled << 1 | 1))]
            with m.If(incoming.last):
                m.d.sync += [self.choices.payload.eq(inserted), self.choices.valid.eq(1)]
        return m
