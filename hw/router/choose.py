"""The largest of a row."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Choose", "choices_layout"]


def choices_layout(shape, count: int) -> data.ArrayLayout:
    """The `count` largest of a row, largest first: all of `shape` but what says that it is the last."""
    fields = {name: field.shape for name, field in shape.as_shape() if name != "last"}
    return data.ArrayLayout(data.StructLayout(fields), count)


class Choose(wiring.Component):
    """The `count` largest of each row by `value`, largest first, ties to the one that came first.

    One a cycle, by insertion into a sorted list; the choices of a row the cycle after its last.
    Refused choices hold up the last of the next row. In a row of fewer the choices past the last
    are undefined.

    Parameters
    ----------
    shape : a struct with a signed `value` and `last`, of its row

    Members
    -------
    candidates : In(stream.Signature(shape))
    choices : Out(stream.Signature(choices_layout(shape, count)))
    """

    def __init__(self, shape, count: int):
        self.count, self.layout = count, choices_layout(shape, count)
        super().__init__({
            "candidates": In(stream.Signature(shape)),
            "choices": Out(stream.Signature(self.layout)),
        })

    def elaborate(self, platform):
        m = Module()
        incoming = self.candidates.p
        held = Signal(self.layout)
        inserted = Signal.like(held)
        filled = Signal(self.count)  # one bit for each entry that is there
        # Entries that stay where they are: at least as large, and earlier. They are the first ones.
        stays = [filled[i] & (held[i].value >= incoming.value) for i in range(self.count)]
        for i in range(self.count):
            with m.If(stays[i]):
                m.d.comb += inserted[i].eq(held[i])
            with m.Elif(stays[i - 1] if i else 1):
                m.d.comb += [inserted[i][name].eq(incoming[name])
                             for name, _ in self.layout.elem_shape]
            if i:
                with m.Else():
                    m.d.comb += inserted[i].eq(held[i - 1])

        leaves = self.choices.ready | ~self.choices.valid
        m.d.comb += self.candidates.ready.eq(~incoming.last | leaves)
        with m.If(self.choices.ready):
            m.d.sync += self.choices.valid.eq(0)
        with m.If(self.candidates.valid & self.candidates.ready):
            m.d.sync += [held.eq(inserted), filled.eq(Mux(incoming.last, 0, filled << 1 | 1))]
            with m.If(incoming.last):
                m.d.sync += [self.choices.payload.eq(inserted), self.choices.valid.eq(1)]
        return m
