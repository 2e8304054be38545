"""The words of rows whose scale is not known yet."""

from amaranth import Module, Shape, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

__all__ = ["RowQueue"]


class RowQueue(wiring.Component):
    """First in, first out, in a block memory with a register behind it.

    A word a cycle; it leaves `LATENCY` cycles after it came at the earliest. Holds `depth` words,
    a power of two, and two on their way out.

    Members
    -------
    arriving : In(stream.Signature(shape))
    leaving : Out(stream.Signature(shape))
    """

    LATENCY = 3

    def __init__(self, shape, depth: int):
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"RowQueue.depth must be a power of two, not {depth!r}")
        self.shape, self.depth = shape, depth
        super().__init__({"arriving": In(stream.Signature(shape)),
                          "leaving": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        # A word is read only after it was written: nothing need guard against collisions. The
        # register behind an asynchronous port becomes the RAM's own in synthesis.
        width = Shape.cast(self.shape).width
        m.submodules.memory = memory = Memory(shape=unsigned(width), depth=self.depth, init=[],
                                              attrs={"no_rw_check": 1})
        write, read = memory.write_port(), memory.read_port(domain="comb")
        bits = self.depth.bit_length()
        written, taken = Signal(bits), Signal(bits)  # one bit more than an address
        used = Signal(bits)  # their difference; its top bit says full
        word, found = Signal(width, reset_less=True), Signal()

        advance = ~self.leaving.valid | self.leaving.ready
        some = written != taken
        m.d.comb += [
            self.arriving.ready.eq(~used[-1]),
            write.addr.eq(written), write.data.eq(self.arriving.payload),
            write.en.eq(self.arriving.valid & self.arriving.ready),
            read.addr.eq(taken),
        ]
        m.d.sync += [written.eq(written + write.en),
                     used.eq(used + write.en - (advance & some))]
        with m.If(advance):
            m.d.sync += [
                word.eq(read.data), found.eq(some), taken.eq(taken + some),
                self.leaving.payload.eq(word), self.leaving.valid.eq(found),
            ]
        return m
