"""From score differences to weights 2**-t: octave steps, then a table and a shift."""

from amaranth import Module, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .arch.numerics import EXP2, OCTAVE_BITS, PROBABILITY_BITS
from .requantise import Requantise

__all__ = ["Exp2", "Octaves"]


class Octaves(wiring.Component):
    """``steps = min(floor(difference * multiplier / 2**shift + 1/2), 4095)``, exactly as
    `numerics.octaves`.

    A pipeline of one result a cycle, `LATENCY` cycles of `advance` after its operands; all of it
    holds while `advance` is 0.

    Parameters
    ----------
    difference_bits : at most 32; up to 17 take one multiplier, more take two
    primitive : as for `Multipliers`

    Members
    -------
    advance : In(1)
    difference : In(difference_bits)
        Unsigned: maximum minus score.
    multiplier : In(16)
    shift : In(6)
        1..47.
    steps : Out(12)
    """

    LATENCY = Requantise.LATENCY

    def __init__(self, difference_bits: int = 32, *, primitive: str | None = None):
        if not 1 <= difference_bits <= 32:
            raise ValueError(f"Octaves.difference_bits must be between 1 and 32, "
                             f"not {difference_bits!r}")
        self.difference_bits, self.primitive = difference_bits, primitive
        super().__init__({
            "advance": In(1), "difference": In(difference_bits), "multiplier": In(16),
            "shift": In(6), "steps": Out(12),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.scale = scale = Requantise(
            unsigned(self.difference_bits), unsigned(12), primitive=self.primitive)
        m.d.comb += [
            scale.advance.eq(self.advance), scale.value.eq(self.difference),
            scale.multiplier.eq(self.multiplier), scale.shift.eq(self.shift),
            self.steps.eq(scale.result),
        ]
        return m


class Exp2(wiring.Component):
    """``weight = exp2_weight(steps)`` and ``probability = probability(steps)`` of `numerics`.

    A pipeline of one result a cycle, `LATENCY` cycles of `advance` after its operand; all of it
    holds while `advance` is 0. The table is a block memory with a register behind it.

    Members
    -------
    advance : In(1)
    steps : In(12)
        From `Octaves`.
    weight : Out(16)
        0..65472.
    probability : Out(10)
        The same result, rounded to 10 bits; both belong to the same `steps`.
    """

    LATENCY = 4

    advance: In(1)
    steps: In(12)
    weight: Out(16)
    probability: Out(PROBABILITY_BITS)

    def elaborate(self, platform):
        m = Module()
        m.submodules.table = table = Memory(shape=16, depth=len(EXP2), init=EXP2)
        read = table.read_port()
        mantissa, shifted = Signal(16), Signal(16)
        octave_1, octave_2 = Signal(4), Signal(4)
        drop = 16 - PROBABILITY_BITS
        m.d.comb += [read.addr.eq(self.steps[:OCTAVE_BITS]), read.en.eq(self.advance)]
        with m.If(self.advance):
            m.d.sync += [
                octave_1.eq(self.steps[OCTAVE_BITS:]),

                mantissa.eq(read.data),
                octave_2.eq(octave_1),

                shifted.eq(mantissa >> octave_2),

                self.weight.eq(shifted),
                self.probability.eq((shifted + (1 << (drop - 1))) >> drop),
            ]
        return m
