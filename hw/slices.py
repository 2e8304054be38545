"""Registers between a stream's two sides."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RegisterSlice", "sliced"]


class RegisterSlice(wiring.Component):
    """A queue of two that no path crosses: `output` and the ready of `input` come from registers.

    One element a cycle, `LATENCY` cycle later. `input` is refused only while two elements wait.

    Members
    -------
    input : In(stream.Signature(shape))
    output : Out(stream.Signature(shape))
    """

    LATENCY = 1

    def __init__(self, shape):
        super().__init__({"input": In(stream.Signature(shape)),
                          "output": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        arriving, leaving = Value.cast(self.input.payload), Value.cast(self.output.payload)
        spare, kept = Signal(len(arriving), reset_less=True), Signal()
        m.d.comb += self.input.ready.eq(~kept)
        with m.If(~kept):
            m.d.sync += spare.eq(arriving)
        with m.If(self.output.ready | ~self.output.valid):
            m.d.sync += [leaving.eq(Mux(kept, spare, arriving)),
                         self.output.valid.eq(kept | self.input.valid), kept.eq(0)]
        with m.Elif(self.input.valid):
            m.d.sync += kept.eq(1)
        return m


def sliced(m: Module, name: str, source):
    """The stream that leaves `source` (an output of a part, or an input of one's own, flipped) behind
    a slice that becomes the submodule `name`_slice."""
    m.submodules[f"{name}_slice"] = part = RegisterSlice(source.payload.shape())
    wiring.connect(m, source, part.input)
    return part.output
