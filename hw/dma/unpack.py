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

    One bus word out per cycle, the first `LATENCY` cycle after its input. No path crosses: `output`,
    and the ready of `input`, come from registers.

    Members
    -------
    arrivals : In(stream.Signature(Arrival(config)))
        In the order of the transfers; the next is taken with the last word of the one before.
    input : In(stream.Signature(8 * bus_bytes))
    output : Out(stream.Signature(8 * bus_bytes))
    """

    LATENCY = 1

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
        nibbles, pairs = arrival.packed
        step = Signal(2)  # fields of the word at `input` that are out
        last = Signal()  # one bus word of the transfer is left
        final = Signal()  # the next field is the last that is needed of its word
        word = self.input.payload
        m.d.comb += leaving.input.payload.eq(word)
        for packed, bits, field in ((pairs, 2, step), (nibbles, 4, step[0])):
            with m.If(packed):
                m.d.comb += [leaving.input.payload[8 * byte:][:8].eq(
                    word[8 * byte:][:8].word_select(field, bits).as_signed())
                    for byte in range(self.config.bus_bytes)]

        moved = active & self.input.valid & leaving.input.ready
        m.d.comb += [leaving.input.valid.eq(active & self.input.valid),
                     self.input.ready.eq(leaving.input.ready & final)]
        with m.If(moved):
            one_left = arrival.beats == 2
            before_final = ~final & (nibbles | (step == 2))
            m.d.sync += [
                arrival.beats.eq(arrival.beats - 1), last.eq(one_left),
                step.eq(Mux(final, 0, step + 1)),
                final.eq(one_left | before_final | ~arrival.packed.any()),
            ]
        with m.If(~active | (moved & last)):
            coming = self.arrivals.p
            one = coming.beats == 1
            m.d.comb += self.arrivals.ready.eq(1)
            m.d.sync += [
                arrival.eq(coming), active.eq(self.arrivals.valid), last.eq(one), step.eq(0),
                final.eq(self.arrivals.valid & (one | ~coming.packed.any())),
            ]
        return m
