"""Registers between a stream's two sides."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RegisterSlice", "sliced"]


class RegisterSlice(wiring.Component):
    """A queue of two that no path crosses: `output` and the ready of `input` come from registers.

    One element a cycle, `LATENCY` cycle later. `input` is refused only while two elements wait.

    The two places take turns, so that whether `output` is taken, which is known late in a cycle,
    enables nothing as wide as an element.

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
        places = [Signal(len(arriving), reset_less=True, name=f"place_{i}") for i in (0, 1)]
        put, get = Signal(), Signal()  # the place that is next
        count, full = Signal(range(3)), Signal()
        takes, gives = Signal(), Signal()
        m.d.comb += [
            self.input.ready.eq(~full), takes.eq(self.input.valid & ~full),
            gives.eq(self.output.valid & self.output.ready),
            leaving.eq(Mux(get, places[1], places[0])),
        ]
        # A place that is free may take anything, so that only `put` enables it.
        for number, place in enumerate(places):
            with m.If((put == number) & ~full):
                m.d.sync += place.eq(arriving)
        m.d.sync += [put.eq(put ^ takes), get.eq(get ^ gives)]
        with m.If(takes & ~gives):
            m.d.sync += [count.eq(count + 1), full.eq(count == 1), self.output.valid.eq(1)]
        with m.Elif(gives & ~takes):
            m.d.sync += [count.eq(count - 1), full.eq(0), self.output.valid.eq(count == 2)]
        return m


def sliced(m: Module, name: str, source):
    """The stream that leaves `source` (an output of a part, or an input of one's own, flipped) behind
    a slice that becomes the submodule `name`_slice."""
    m.submodules[f"{name}_slice"] = part = RegisterSlice(source.payload.shape())
    wiring.connect(m, source, part.input)
    return part.output
