"""Which logits are near the largest of those left."""

from itertools import pairwise

from amaranth import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arch.routing import NEAR_BITS
from ..multiply import Multipliers

__all__ = ["Near"]


class Near(wiring.Component):
    """``near(value, largest, threshold)`` of `numerics`, for a value that was not chosen before
    `largest`; 0 for one that was.

    A value a cycle; the answer comes `LATENCY` cycles later.

    Members
    -------
    value : In(signed(32))
    largest : In(signed(32))
    earlier : In(1)
        The value's expert has the lower number: of equal values it was chosen before.
    threshold : In(16)
        Holds still.
    near : Out(1)
    """

    LATENCY = 2 + Multipliers.LATENCY + 2

    value: In(signed(32))
    largest: In(signed(32))
    earlier: In(1)
    threshold: In(16)
    near: Out(1)

    def elaborate(self, platform):
        m = Module()
        m.submodules.multipliers = multipliers = Multipliers(unsigned(16), unsigned(16), count=2)
        distance, earlier = Signal(signed(33)), Signal()
        magnitude, largest, divisor = Signal(32), Signal(signed(32)), Signal(32)
        # What waits beside the product: how far the value lies below, or that it was chosen.
        waiting = [Signal(data.StructLayout({"distance": 32, "chosen": 1}), name=f"waiting_{i}")
                   for i in range(self.LATENCY - 2)]
        m.d.sync += [
            distance.eq(self.largest - self.value), earlier.eq(self.earlier),
            magnitude.eq(Mux(self.value < 0, -self.value, self.value)), largest.eq(self.largest),

            waiting[0].distance.eq(distance),
            waiting[0].chosen.eq((distance < 0) | (earlier & (distance == 0))),
            divisor.eq(Mux(largest > magnitude, largest, magnitude)),
        ]
        m.d.comb += [
            multipliers.advance.eq(1),
            *(b.eq(self.threshold) for b in multipliers.b),
            multipliers.a[0].eq(divisor[:16]), multipliers.a[1].eq(divisor[16:]),
        ]
        low, high = multipliers.product
        product = Signal(48)
        m.d.sync += [
            product.eq(Cat(low[:16], (low >> 16) + high)),
            # An integer exceeds a number where it exceeds its floor.
            self.near.eq(~waiting[-1].chosen & (waiting[-1].distance <= product[NEAR_BITS:])),
            *(after.eq(before) for before, after in pairwise(waiting)),
        ]
        return m
