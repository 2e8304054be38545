"""Sequential division: one bit of the quotient a cycle, for results that are needed once a row."""

from functools import reduce
from operator import or_

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .slices import sliced

__all__ = ["Divide", "Justify", "Reciprocal"]


class Divide(wiring.Component):
    """``floor(numerator / denominator)``, unsigned, by restoring division.

    One operand at a time; the quotient appears `latency` = `quotient_bits` + 1 cycles after its
    operands, and the next operands are taken in the cycle in which it leaves: one quotient every
    `latency` cycles at best. A refused quotient stays.

    The quotient must fit: ``numerator < denominator << quotient_bits``. A denominator of 0 gives
    all ones.

    Members
    -------
    operands : In(stream.Signature(data.StructLayout({"numerator": n, "denominator": d})))
        Unsigned, of `numerator_bits` and `denominator_bits`.
    quotients : Out(stream.Signature(quotient_bits))
    """

    def __init__(self, numerator_bits: int, denominator_bits: int, quotient_bits: int):
        if not 1 <= quotient_bits <= numerator_bits <= denominator_bits + quotient_bits:
            raise ValueError(
                f"Divide must have 1 <= quotient_bits <= numerator_bits <= denominator_bits + "
                f"quotient_bits, not {quotient_bits}, {numerator_bits}, {denominator_bits}: no "
                f"quotient of a wider numerator fits")
        self.numerator_bits, self.denominator_bits = numerator_bits, denominator_bits
        self.quotient_bits = quotient_bits
        self.latency = quotient_bits + 1
        super().__init__({
            "operands": In(stream.Signature(data.StructLayout(
                {"numerator": numerator_bits, "denominator": denominator_bits}))),
            "quotients": Out(stream.Signature(quotient_bits)),
        })

    def elaborate(self, platform):
        m = Module()
        bits = self.quotient_bits
        remainder = Signal(self.denominator_bits)
        denominator = Signal(self.denominator_bits)
        # Numerator bits leave at the top while quotient bits enter at the bottom.
        digits = Signal(bits)
        left = Signal(range(bits + 1))
        busy, last = Signal(), Signal()  # left is not 0; is 1

        shifted = Cat(digits[-1], remainder)
        difference = Signal(self.denominator_bits + 2)
        m.d.comb += difference.eq(shifted - denominator)
        fits = ~difference[-1]

        leaves = self.quotients.valid & self.quotients.ready
        m.d.comb += [
            self.quotients.payload.eq(digits),
            self.operands.ready.eq(~busy & (~self.quotients.valid | leaves)),
        ]
        with m.If(leaves):
            m.d.sync += self.quotients.valid.eq(0)
        with m.If(busy):
            m.d.sync += [
                remainder.eq(Mux(fits, difference, shifted)),
                digits.eq(Cat(fits, digits)),
                left.eq(left - 1), last.eq(left == 2), busy.eq(~last),
                self.quotients.valid.eq(last),
            ]
        with m.If(self.operands.valid & self.operands.ready):
            m.d.sync += [
                remainder.eq(self.operands.p.numerator[bits:]),
                digits.eq(self.operands.p.numerator[:bits]),
                denominator.eq(self.operands.p.denominator),
                left.eq(bits), last.eq(bits == 1), busy.eq(1),
            ]
        return m


class Justify(wiring.Component):
    """Shifts a number left until its top bits are not all zero, `granule` bits at a time.

    ``length`` is the bit length of the number rounded up to a multiple of `granule`, and
    ``mantissa = value << (bits - length)``. Zero gives a length and a mantissa of 0.

    A binary search, halving the step every cycle: one operand at a time, the result `latency` =
    log2(bits / granule) + 1 cycles after it, the next operand in the cycle in which it leaves. A
    refused result stays.

    Members
    -------
    values : In(stream.Signature(bits))
    justified : Out(stream.Signature(data.StructLayout({"mantissa": bits, "length": n})))
        The length needs bits.bit_length() bits.
    """

    def __init__(self, bits: int, granule: int = 1):
        steps = (bits // granule).bit_length() - 1
        if steps < 1 or granule << steps != bits:
            raise ValueError(f"Justify must have bits = granule * 2**n with n >= 1, "
                             f"not bits {bits!r} and granule {granule!r}")
        self.bits, self.granule = bits, granule
        self.steps = steps
        self.latency = steps + 1
        super().__init__({
            "values": In(stream.Signature(bits)),
            "justified": Out(stream.Signature(data.StructLayout(
                {"mantissa": bits, "length": bits.bit_length()}))),
        })

    def elaborate(self, platform):
        m = Module()
        value = Signal(self.bits)
        skipped = Signal(self.steps)  # granules that the value was shifted by
        step = Signal(self.steps)  # one-hot; bit i shifts by granule << i

        valid, leaves = self.justified.valid, self.justified.valid & self.justified.ready
        m.d.comb += [
            self.values.ready.eq((step == 0) & (~valid | leaves)),
            self.justified.p.mantissa.eq(value),
            self.justified.p.length.eq(
                Mux(value[-self.granule:].any(), (self.granule << self.steps)
                    - self.granule * skipped, 0)),
        ]
        with m.If(leaves):
            m.d.sync += valid.eq(0)
        # All distances are shifted by and tested at once; the one-hot step selects without priority.
        distances = [self.granule << index for index in range(self.steps)]
        shifted = reduce(or_, ((value << distance)[:self.bits] & step[index].replicate(self.bits)
                               for index, distance in enumerate(distances)))
        zeros = Cat(step[index] & ~value[-distance:].any()
                    for index, distance in enumerate(distances))
        with m.If(zeros.any()):
            m.d.sync += value.eq(shifted)
        m.d.sync += skipped.eq(skipped | zeros)
        with m.If(step != 0):
            m.d.sync += [step.eq(step >> 1), valid.eq(step[0])]
        with m.If(self.values.valid & self.values.ready):
            m.d.sync += [value.eq(self.values.payload), skipped.eq(0),
                         step.eq(1 << (self.steps - 1))]
        return m


class Reciprocal(wiring.Component):
    """``(r, e)``, exactly as `numerics.reciprocal`: ``1 / total ~ r / 2**(e + 15)``.

    A result comes `LATENCY` cycles after its total at the earliest; totals are taken up to one
    every `INTERVAL` cycles, once a few are in flight. A refused result stays, and then totals wait.
    Registers keep a refusal from passing through all parts in one cycle.

    Members
    -------
    totals : In(stream.Signature(32))
        1..2**32 - 1.
    reciprocals : Out(stream.Signature(data.StructLayout({"r": 16, "e": 6})))
    """

    LATENCY = 26
    INTERVAL = 18

    totals: In(stream.Signature(32))
    reciprocals: Out(stream.Signature(data.StructLayout({"r": 16, "e": 6})))

    def elaborate(self, platform):
        m = Module()
        m.submodules.justify = justify = Justify(32)
        # With the total justified to T = total * 2**(32 - e), 2**(e + 15) / total = 2**47 / T. That
        # is at most 2**16: 17 bits, of which only the power of two itself needs the top one.
        m.submodules.divide = divide = Divide(48, 32, 17)
        length = Signal(6)
        wiring.connect(m, sliced(m, "totals", wiring.flipped(self.totals)), justify.values)
        justified = sliced(m, "justified", justify.justified)
        m.d.comb += [
            divide.operands.p.numerator.eq(Const(1 << 47, 48)),
            divide.operands.p.denominator.eq(justified.p.mantissa),
            divide.operands.valid.eq(justified.valid),
            justified.ready.eq(divide.operands.ready),
        ]
        with m.If(divide.operands.valid & divide.operands.ready):
            m.d.sync += length.eq(justified.p.length)
        quotient = divide.quotients.payload
        m.d.comb += [
            self.reciprocals.p.r.eq(quotient[:16] | quotient[16].replicate(16)),
            self.reciprocals.p.e.eq(length),
            self.reciprocals.valid.eq(divide.quotients.valid),
            divide.quotients.ready.eq(self.reciprocals.ready),
        ]
        return m
