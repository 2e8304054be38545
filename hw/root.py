"""Sequential integer square root: one bit of the result a cycle."""

from amaranth import C, Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Root"]


class Root(wiring.Component):
    """``floor(sqrt(value))``, exactly, digit by digit.

    One value at a time; the root appears `latency` = bits / 2 + 1 cycles after it, and the next
    value is taken in the cycle in which it leaves. A refused root stays.

    Members
    -------
    values : In(stream.Signature(bits))
        Unsigned; an even number of bits.
    roots : Out(stream.Signature(bits // 2))
    """

    def __init__(self, bits: int):
        if bits < 2 or bits % 2:
            raise ValueError(f"Root.bits must be even and at least 2, not {bits!r}")
        self.bits = bits
        self.latency = bits // 2 + 1
        super().__init__({
            "values": In(stream.Signature(bits)),
            "roots": Out(stream.Signature(bits // 2)),
        })

    def elaborate(self, platform):
        m = Module()
        digits = self.bits // 2
        value = Signal(self.bits)  # pairs of bits leave at the top
        root = Signal(digits)
        # remainder = (value so far) - root**2 <= 2 * root.
        remainder = Signal(digits + 1)
        left = Signal(range(digits + 1))
        busy, last = Signal(), Signal()  # left is not 0; is 1

        # (2 root + 1)**2 = 4 root**2 + (4 root + 1): the digit is 1 if the remainder holds that.
        shifted = Cat(value[-2:], remainder)
        difference = Signal(digits + 4)
        m.d.comb += difference.eq(shifted - Cat(C(1, 2), root))
        fits = ~difference[-1]

        leaves = self.roots.valid & self.roots.ready
        m.d.comb += [
            self.roots.payload.eq(root),
            self.values.ready.eq(~busy & (~self.roots.valid | leaves)),
        ]
        with m.If(leaves):
            m.d.sync += self.roots.valid.eq(0)
        with m.If(busy):
            m.d.sync += [
                remainder.eq(Mux(fits, difference, shifted)),
                root.eq(Cat(fits, root)),
                value.eq(value << 2),
                left.eq(left - 1), last.eq(left == 2), busy.eq(~last),
                self.roots.valid.eq(last),
            ]
        with m.If(self.values.valid & self.values.ready):
            m.d.sync += [remainder.eq(0), root.eq(0), value.eq(self.values.payload),
                         left.eq(digits), last.eq(digits == 1), busy.eq(1)]
        return m
