"""Multipliers of which several share an operand."""

from amaranth import Cat, Module, Shape
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .dsp48e2 import DSP48E2
from .multiply import Multipliers, primitive_for

__all__ = ["SharedMultipliers", "packs"]

APART = 18  # bits from one product of a pair to the other


def packs(a, b) -> bool:
    """Whether two products of `a` with a common `b` fit into one DSP48E2: the low one into `APART`
    bits, the high one's operand above it into 27."""
    a, b = Shape.cast(a), Shape.cast(b)
    most = 1
    for shape in (a, b):
        most *= 1 << shape.width - 1 if shape.signed else (1 << shape.width) - 1
    return (a.signed and a.width <= 8 and b.width + (not b.signed) <= 18
            and most <= 1 << APART - 1 and not (most == 1 << APART - 1 and b.signed))


class SharedMultipliers(wiring.Component):
    """``product[i][j] = a[i][j] * b[i]``: `count` groups of `lanes` products, exact.

    One product of each per cycle, `LATENCY` cycles after its operands. Nothing moves while
    `advance` is low, and such a cycle does not count.

    With "dsp48e2" two lanes take one block where they fit (`packs`). Its pre-adder makes
    ``a1 * 2**18 + a0``, its multiplier both products, and its adder adds 2**17: so the low 18 bits,
    ``a0 * b + 2**17``, are never negative and borrow nothing from the high product, and their top
    bit, inverted, is the sign of the low product. No logic follows the block.

    Parameters
    ----------
    a, b, primitive : as for `Multipliers`
    lanes, count : products per group, groups

    Members
    -------
    advance : In(1)
    a : In(data.ArrayLayout(data.ArrayLayout(a, lanes), count))
    b : In(data.ArrayLayout(b, count))
    product : Out(data.ArrayLayout(data.ArrayLayout(shape of the product, lanes), count))
    """

    LATENCY = Multipliers.LATENCY

    def __init__(self, a, b, lanes: int, count: int = 1, *, primitive: str | None = None):
        self.lanes, self.count, self.primitive = lanes, count, primitive
        self.a_shape, self.b_shape = a, b = Shape.cast(a), Shape.cast(b)
        product = Shape(a.width + b.width, a.signed or b.signed)
        super().__init__({
            "advance": In(1),
            "a": In(data.ArrayLayout(data.ArrayLayout(a, lanes), count)),
            "b": In(data.ArrayLayout(b, count)),
            "product": Out(data.ArrayLayout(data.ArrayLayout(product, lanes), count)),
        })

    def elaborate(self, platform):
        m = Module()
        primitive = self.primitive or primitive_for(platform)
        paired = 0
        if primitive == "dsp48e2" and packs(self.a_shape, self.b_shape):
            paired = self.lanes - self.lanes % 2
        for group in range(self.count):
            for lane in range(0, paired, 2):
                m.submodules[f"pair_{group}_{lane}"] = pair = DSP48E2(
                    addend=1 << APART - 1, instance=primitive_for(platform) == "dsp48e2")
                m.d.comb += [
                    pair.advance.eq(self.advance), pair.b.eq(self.b[group]),
                    pair.d.eq(self.a[group][lane]), pair.a.eq(self.a[group][lane + 1] << APART),
                    self.product[group][lane].eq(
                        Cat(pair.p[:APART - 1], ~pair.p[APART - 1]).as_signed()),
                    self.product[group][lane + 1].eq(pair.p[APART:].as_signed()),
                ]
        alone = [(group, lane) for group in range(self.count) for lane in range(paired, self.lanes)]
        if alone:
            m.submodules.multipliers = multipliers = Multipliers(
                self.a_shape, self.b_shape, len(alone), primitive=self.primitive)
            m.d.comb += multipliers.advance.eq(self.advance)
            m.d.comb += [
                statement for at, (group, lane) in enumerate(alone) for statement in (
                    multipliers.a[at].eq(self.a[group][lane]), multipliers.b[at].eq(self.b[group]),
                    self.product[group][lane].eq(multipliers.product[at]))]
        return m
