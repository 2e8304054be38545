"""The lanes that normalise values, once the scale of their row is known."""

from itertools import pairwise

from amaranth import Cat, Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..multiply import Multipliers
from .inverse_root import RowScale

__all__ = ["Normalise"]


class Normalise(wiring.Component):
    """``round((factor * x - total) * inverse / 2**shift)``, ties up, saturated to int16, per lane.

    A word a cycle, `LATENCY` cycles of `advance` after its operands; nothing moves while `advance`
    is 0. The scale belongs to the word beside it and may change from word to word.

    Parameters
    ----------
    lanes : values of a word
    channels : of a row, at most 65535: two multipliers take the difference and the inverse

    Members
    -------
    advance : In(1)
    values : In(data.ArrayLayout(signed(16), lanes))
    scale : In(RowScale(channels))
    normalised : Out(data.ArrayLayout(signed(16), lanes))
    """

    LATENCY = 2 * Multipliers.LATENCY + 5

    def __init__(self, lanes: int, channels: int):
        self.lanes, self.channels = lanes, channels
        values = data.ArrayLayout(signed(16), lanes)
        super().__init__({"advance": In(1), "values": In(values), "scale": In(RowScale(channels)),
                          "normalised": Out(values)})

    def elaborate(self, platform):
        m = Module()
        # What is common to the lanes, from stage to stage.
        depth = Multipliers.LATENCY
        beside = [self.scale]
        for stage in range(1, 2 * depth + 2):
            beside.append(Signal(self.scale.shape(), reset_less=True, name=f"scale_{stage}"))
        # Ties round up: floor(x / 2**s + 1/2) == (floor(x / 2**(s - 1)) + 1) >> 1. The shift by
        # s - 1 (4 or more) takes two stages.
        amount, amount_fine = Signal(6, reset_less=True), Signal(3, reset_less=True)
        with m.If(self.advance):
            m.d.sync += [after.eq(before) for before, after in pairwise(beside)]
            m.d.sync += [amount.eq(beside[-1].shift - 1), amount_fine.eq(amount[:3])]

        m.submodules.by_factor = by_factor = Multipliers(
            signed(16), self.scale.factor.shape(), self.lanes)
        m.submodules.by_inverse = by_inverse = Multipliers(signed(18), unsigned(17), 2 * self.lanes)
        m.d.comb += [by_factor.advance.eq(self.advance), by_inverse.advance.eq(self.advance)]
        # Product and total are both between -channels * 2**15 and channels * (2**15 - 1).
        largest = self.channels * 0xffff
        differences = Shape.cast(range(-largest, largest + 1))
        wide = signed(differences.width + 17)
        for lane in range(self.lanes):
            difference = Signal(differences, reset_less=True, name=f"difference_{lane}")
            product = Signal(wide, reset_less=True, name=f"product_{lane}")
            coarse = Signal(wide, reset_less=True, name=f"coarse_{lane}")
            fine = Signal(signed(wide.width - 4), reset_less=True, name=f"fine_{lane}")
            low, high = by_inverse.product[2 * lane], by_inverse.product[2 * lane + 1]
            m.d.comb += [
                by_factor.a[lane].eq(self.values[lane]),
                by_factor.b[lane].eq(self.scale.factor),
                by_inverse.a[2 * lane].eq(difference[:17]),
                by_inverse.a[2 * lane + 1].eq(difference[17:].as_signed()),
                by_inverse.b[2 * lane].eq(beside[depth + 1].inverse),
                by_inverse.b[2 * lane + 1].eq(beside[depth + 1].inverse),
            ]
            # In range if all bits from the sign upwards agree, and rounding does not carry into it.
            rounded = Signal(17, name=f"rounded_{lane}")
            upper = fine[16:]
            fits = (upper.all() | ~upper.any()) & (fine[:17] != 0xffff)
            m.d.comb += rounded.eq(fine[:17] + 1)
            with m.If(self.advance):
                m.d.sync += [
                    difference.eq(by_factor.product[lane] - beside[depth].total),
                    product.eq(Cat(low[:17], high + (low >> 17)).as_signed()),
                    coarse.eq(product >> (amount[3:] << 3)),
                    fine.eq(coarse >> amount_fine),
                    self.normalised[lane].eq(
                        Mux(fits, rounded[1:], Mux(fine[-1], -1 << 15, (1 << 15) - 1))),
                ]
        return m
