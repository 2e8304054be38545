"""Packed bus words as LOAD finds them, whole ones as they are written."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Memory
from ..arch.layout import beats
from ..slices import RegisterSlice

__all__ = ["Arrival", "Unpacker"]

MOST_WORDS = (1 << 20) - 1  # of a LOAD


class Arrival(data.StructLayout):
    """What arrives of a transfer: `beats`, 1 at least, bus words once they are unpacked."""

    def __init__(self, config: Config):
        most = max(beats(config, memory, MOST_WORDS) for memory in Memory)
        super().__init__({"packed": 2, "beats": range(most + 1)})


class Unpacker(wiring.Component):
    """Unpacks the bus words of one transfer after the other, see `arch.layout`.

    A bus word of a transfer that is not packed passes as it is; a packed one becomes the 2 or 4 bus
    words whose signed bytes its fields are, of the transfer's last one as many as there are.

    One bus word out per cycle, the first `LATENCY` cycles after its input. No path crosses: outputs,
    and the ready of `input`, come from registers.

    Members
    -------
    arrivals : In(stream.Signature(Arrival(config)))
        In the order of the transfers; the next is taken with the last word of the one before.
    input : In(stream.Signature(8 * bus_bytes))
    output : Out(stream.Signature(8 * bus_bytes))
    """

    LATENCY = 2

    def __init__(self, config: Config):
        self.config = config
        word = stream.Signature(8 * config.bus_bytes)
        super().__init__({"arrivals": In(stream.Signature(Arrival(config))),
                          "input": In(word), "output": Out(word)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.leaving = leaving = RegisterSlice(8 * self.config.bus_bytes)
        wiring.connect(m, leaving.output, wiring.flipped(self.output))

        arrival, active = Signal(Arrival(self.config)), Signal()
        last = Signal()  # one bus word of the transfer is left
        word, full = Signal(8 * self.config.bus_bytes), Signal()
        step = Signal(2)  # fields of `word` that have left it; the next one is at the bottom of bytes
        final = Signal()
        m.d.comb += [final.eq(1), leaving.input.payload.eq(word)]
        for packed, bits in ((2, 2), (1, 4)):
            with m.If(arrival.packed & packed):
                m.d.comb += final.eq(step == 8 // bits - 1)
                m.d.comb += [
                    leaving.input.payload[8 * byte:][:8].eq(word[8 * byte:][:bits].as_signed())
                    for byte in range(self.config.bus_bytes)]

        moved = active & full & leaving.input.ready
        m.d.comb += [leaving.input.valid.eq(active & full),
                     self.input.ready.eq(~full | (moved & (final | last)))]
        with m.If(self.input.ready):
            m.d.sync += [word.eq(self.input.payload), full.eq(self.input.valid), step.eq(0)]
        with m.Elif(moved):
            m.d.sync += [word.eq(Mux(arrival.packed[0], word >> 4, word >> 2)), step.eq(step + 1)]

        with m.If(moved):
            m.d.sync += [arrival.beats.eq(arrival.beats - 1), last.eq(arrival.beats == 2)]
        with m.If(~active | (moved & last)):
            m.d.comb += self.arrivals.ready.eq(1)
            m.d.sync += [arrival.eq(self.arrivals.payload), active.eq(self.arrivals.valid),
                         last.eq(self.arrivals.p.beats == 1)]
        return m
