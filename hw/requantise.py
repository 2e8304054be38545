"""Wide integers to narrow ones, by a run-time multiplier and shift."""

from itertools import pairwise

from amaranth import Cat, Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .multiply import Multipliers

__all__ = ["Requantise", "halved"]

_INT32, _INT8 = signed(32), signed(8)


class Requantise(wiring.Component):
    """``floor(value * multiplier / 2**shift + 1/2)``, saturated: `numerics.requantise`, or
    `numerics.scale` where `result` is None.

    One result per cycle, `LATENCY` cycles after its operands. Nothing moves while `advance` is low,
    and such a cycle does not count. Values wider than 18 bits take two multipliers.

    Parameters
    ----------
    value : shape of the values, signed or unsigned, at most 33 bits
    result : shape that results are saturated to, at most 32 bits (unsigned only for unsigned
        values), or None: 15 bits wider than `value`, which always suffices
    primitive : as for `Multipliers`

    Members
    -------
    advance : In(1)
    value : In(value)
    multiplier : In(16)
    shift : In(6)
        1..47.
    result : Out(result)
    """

    LATENCY = Multipliers.LATENCY + 4

    def __init__(self, value=_INT32, result=_INT8, *, primitive: str | None = None):
        value = Shape.cast(value)
        if value.width > 33:
            raise ValueError(f"Requantise.value must be at most 33 bits, not {value!r}")
        self.saturated = result is not None
        result = Shape.cast(result) if self.saturated else Shape(value.width + 15, value.signed)
        if self.saturated and (result.width > 32 or value.signed > result.signed):
            raise ValueError("Requantise.result must be at most 32 bits, and signed where the "
                             f"value is, not {result!r}")
        self.primitive = primitive
        super().__init__({
            "advance": In(1), "value": In(value), "multiplier": In(16), "shift": In(6),
            "result": Out(result),
        })

    def elaborate(self, platform):
        m = Module()
        product = self._product(m)

        # Ties round up: floor(x / 2**s + 1/2) == (floor(x / 2**(s - 1)) + 1) >> 1.
        amounts = [Signal(6, reset_less=True, name=f"amount_{i}")
                   for i in range(Multipliers.LATENCY + 2)]
        coarse = Signal(product.shape(), reset_less=True)
        fine = Signal(product.shape(), reset_less=True)
        shape = self.result.shape() if self.saturated else None
        with m.If(self.advance):
            m.d.sync += amounts[0].eq(self.shift - 1)
            m.d.sync += [after.eq(before) for before, after in pairwise(amounts)]
            m.d.sync += [
                coarse.eq(product >> (amounts[-2][3:] << 3)),
                fine.eq(coarse >> amounts[-1][:3]),
                self.result.eq(halved(m, fine, shape)),
            ]
        return m

    def _product(self, m):
        """The product in one register, a cycle after `Multipliers`; always signed."""
        value = Signal(signed(self.value.shape().width + (not self.value.shape().signed)))
        product = Signal(signed(len(value) + 16), reset_less=True)
        m.d.comb += value.eq(self.value)
        split = len(value) > 18
        m.submodules.multipliers = multipliers = Multipliers(
            signed(18), unsigned(16), count=1 + split, primitive=self.primitive)
        m.d.comb += multipliers.advance.eq(self.advance)
        m.d.comb += [b.eq(self.multiplier) for b in multipliers.b]
        if split:
            m.d.comb += [multipliers.a[0].eq(value[:16]),
                         multipliers.a[1].eq(value[16:].as_signed())]
            whole = Cat(multipliers.product[0][:16],
                        (multipliers.product[0] >> 16) + multipliers.product[1]).as_signed()
        else:
            m.d.comb += multipliers.a[0].eq(value)
            whole = multipliers.product[0]
        with m.If(self.advance):
            m.d.sync += product.eq(whole)
        return product


def halved(m, doubled, shape=None):
    """``(doubled + 1) >> 1``, saturated to `shape` if one is given; the range check runs beside the
    short addition."""
    if shape is None:
        return (doubled + 1) >> 1
    kept = shape.width + 1
    if kept >= len(doubled):
        doubled = Cat(doubled, doubled[-1].replicate(kept + 1 - len(doubled))).as_signed()
    low = doubled[:kept]
    if shape.signed:
        # In range: all bits from the sign of `low` upwards agree, and the addition does not
        # carry into that sign.
        upper = doubled[kept - 1:]
        fits = (upper.all() | ~upper.any()) & (low != (1 << (kept - 1)) - 1)
        limit = Mux(doubled[-1], -(1 << (shape.width - 1)), (1 << (shape.width - 1)) - 1)
    else:
        fits = ~doubled[kept:].any() & ~low.all()
        limit = (1 << shape.width) - 1
    rounded = Signal(kept)
    m.d.comb += rounded.eq(low + 1)
    return Mux(fits, rounded[1:], limit)
