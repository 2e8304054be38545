"""The lanes that turn pairs of values."""

from itertools import pairwise

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arch.numerics import FACTOR_BITS, PAIR_BITS
from ..multiply import Multipliers
from ..requantise import halved

__all__ = ["Rotate"]


class Rotate(wiring.Component):
    """`numerics.rotate` of the pairs of lanes of a word, or, where `turned` is 0, each value by itself,
    saturated to int8.

    A word a cycle, `LATENCY` cycles after its operands; it never stands still. Two multipliers per
    lane.

    Members
    -------
    values : In(data.ArrayLayout(signed(16), lanes))
    factors : In(data.ArrayLayout(signed(16), lanes))
    turned : In(1)
    results : Out(data.ArrayLayout(signed(8), lanes))
    """

    LATENCY = Multipliers.LATENCY + 4

    def __init__(self, lanes: int):
        if lanes % 2:
            raise ValueError(f"Rotate.lanes must be even, not {lanes!r}")
        self.lanes = lanes
        super().__init__({
            "values": In(data.ArrayLayout(signed(16), lanes)),
            "factors": In(data.ArrayLayout(signed(16), lanes)),
            "turned": In(1),
            "results": Out(data.ArrayLayout(signed(8), lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        values = Signal(self.values.shape(), reset_less=True)
        factors = Signal(self.factors.shape(), reset_less=True)
        m.d.sync += [values.eq(self.values), factors.eq(self.factors)]
        turned = [self.turned] + [Signal(reset_less=True, name=f"turned_{i}")
                                  for i in range(1, self.LATENCY)]
        m.d.sync += [after.eq(before) for before, after in pairwise(turned)]

        m.submodules.multipliers = multipliers = Multipliers(signed(16), signed(16), 2 * self.lanes)
        m.d.comb += multipliers.advance.eq(1)
        for lane in range(self.lanes):
            own, other, even = values[lane], values[lane ^ 1], lane & ~1
            m.d.comb += [
                multipliers.a[2 * lane].eq(own), multipliers.b[2 * lane].eq(factors[even]),
                multipliers.a[2 * lane + 1].eq(other), multipliers.b[2 * lane + 1].eq(factors[even + 1]),
            ]
            by_cos, by_sin = multipliers.product[2 * lane], multipliers.product[2 * lane + 1]
            total = Signal(signed(33), reset_less=True, name=f"total_{lane}")
            rounded = Signal(signed(8), reset_less=True, name=f"rounded_{lane}")
            m.d.sync += [
                total.eq(by_cos + by_sin if lane % 2 else by_cos - by_sin),
                rounded.eq(halved(m, total >> (FACTOR_BITS + PAIR_BITS - 1), signed(8))),
            ]
            # What is not turned goes beside.
            plain = [Signal(signed(8), reset_less=True, name=f"plain_{lane}_{i}")
                     for i in range(2, self.LATENCY)]
            low, upper = own[:8], own[7:]
            m.d.sync += plain[0].eq(Mux(upper.all() | ~upper.any(), low, Mux(own[-1], -128, 127)))
            m.d.sync += [after.eq(before) for before, after in pairwise(plain)]
            m.d.sync += self.results[lane].eq(Mux(turned[-1], rounded, plain[-1]))
        return m
