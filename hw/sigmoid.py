"""From logits to sigmoid scores: a place on the curve, then a chord of it."""

from itertools import pairwise

from amaranth import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .arch.routing import SIGMOID, SIGMOID_BITS, SIGMOID_SEGMENTS
from .multiply import Multipliers
from .requantise import Requantise

__all__ = ["Sigmoid"]

PART_BITS = SIGMOID_BITS - (SIGMOID_SEGMENTS.bit_length() - 1)  # of a place within its segment
GUARD_BITS = 4  # that the curve has and a score has not


class Segment(data.Struct):
    """Where a segment begins, with the half that rounds, and how far it rises."""

    begin: 20
    rise: 13


class Sigmoid(wiring.Component):
    """``score = sigmoid_scores(logit, multiplier, shift)`` of `numerics`.

    One score a cycle, `LATENCY` cycles after its logit. The table is a block memory with a register
    behind it.

    Members
    -------
    logit : In(signed(32))
    multiplier : In(16)
    shift : In(6)
        1..47.
    score : Out(16)
        1..65535.
    """

    LATENCY = 1 + Requantise.LATENCY + 2 + Multipliers.LATENCY + 2

    logit: In(signed(32))
    multiplier: In(16)
    shift: In(6)
    score: Out(16)

    def elaborate(self, platform):
        m = Module()
        m.submodules.place = place = Requantise(unsigned(32), unsigned(SIGMOID_BITS))
        half = 1 << (PART_BITS + GUARD_BITS - 1)
        m.submodules.segments = segments = Memory(
            shape=Segment, depth=SIGMOID_SEGMENTS,
            init=[{"begin": low + (half >> PART_BITS), "rise": high - low}
                  for low, high in pairwise(SIGMOID)])
        m.submodules.multiplier = multiplier = Multipliers(unsigned(13), unsigned(PART_BITS))
        read, segment = segments.read_port(), Signal(Segment)
        parts = [place.result[:PART_BITS],
                 *(Signal(PART_BITS, name=f"part_{i}") for i in range(2))]
        begins = [segment.begin, *(Signal(20, name=f"begin_{i}")
                                   for i in range(Multipliers.LATENCY))]
        negative = [self.logit < 0, *(Signal(name=f"negative_{i}") for i in range(self.LATENCY - 1))]
        chord = Signal(20 + PART_BITS)
        m.d.comb += [
            place.advance.eq(1), place.multiplier.eq(self.multiplier), place.shift.eq(self.shift),
            read.addr.eq(place.result[PART_BITS:]), multiplier.advance.eq(1),
            multiplier.a[0].eq(segment.rise), multiplier.b[0].eq(parts[-1]),
        ]
        magnitude = Signal(32)
        m.d.comb += place.value.eq(magnitude)
        m.d.sync += [
            magnitude.eq(Mux(self.logit < 0, -self.logit, self.logit)),
            segment.eq(read.data),
            chord.eq((begins[-1] << PART_BITS) + multiplier.product[0]),
            self.score.eq(Mux(negative[-1], -chord[PART_BITS + GUARD_BITS:],
                              chord[PART_BITS + GUARD_BITS:])),
            *(after.eq(before) for stages in (parts, begins, negative)
              for before, after in pairwise(stages)),
        ]
        return m
