"""Scaled variance of a row, from its sums."""

from amaranth import Array, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.isa import NormMode
from ..multiply import Multipliers
from .statistics import Sums

__all__ = ["Moments", "Variance", "VarianceSetup"]


class VarianceSetup(data.Struct):
    """What the fields of a NORM say of its rows."""

    mode: NormMode
    rows: 13
    channels: 11
    epsilon: 48


class Moments(data.Struct):
    """A row's value x is to become ``(factor * x - total) / sqrt(variance)``."""

    variance: 54
    total: signed(27)
    factor: 11


class Variance(wiring.Component):
    """``variance = channels * squares - total**2 + epsilon`` of each row, total 0 for RMS.

    For SCALE no sums are taken: the factor is 1, the total 0 and the variance 2**20, the square of
    one in the fraction bits of a normalised value, so that what follows leaves x as it is.

    One multiplier, six products: a row every `INTERVAL` cycles, its moments one cycle less after
    its sums were taken. Refused moments stay.

    Members
    -------
    setup : In(stream.Signature(VarianceSetup))
        Taken when the last row of the one before has left.
    sums : In(stream.Signature(Sums))
    moments : Out(stream.Signature(Moments))
    """

    INTERVAL = 14

    setup: In(stream.Signature(VarianceSetup))
    sums: In(stream.Signature(Sums))
    moments: Out(stream.Signature(Moments))

    def elaborate(self, platform):
        m = Module()
        setup = Signal(VarianceSetup)
        squares, magnitude = Signal(41), Signal(26)
        moments = self.moments.p

        # (operands, weight of the product, sign); the squares' term comes first, so that the
        # accumulator is never negative.
        low, high = magnitude[:13], magnitude[13:]
        products = [(squares[at:at + 16], setup.channels, at, 1) for at in (0, 16, 32)]
        products += [(low, low, 0, 0), (low, high, 14, 0), (high, high, 26, 0)]
        m.submodules.multipliers = multipliers = Multipliers(unsigned(16), unsigned(13))
        # Registers on the way to the multiplier and back.
        there_and_back = Multipliers.LATENCY + 2
        term, plus = Signal(54), Signal()
        step = Signal(range(len(products) + there_and_back + 1))
        arrived = Signal(range(len(products)))
        product = Signal.like(multipliers.product[0])
        m.d.comb += [multipliers.advance.eq(1), arrived.eq(step - there_and_back)]
        m.d.sync += [
            multipliers.a[0].eq(Array(a for a, *_ in products)[step]),
            multipliers.b[0].eq(Array(b for _, b, *_ in products)[step]),
            product.eq(multipliers.product[0]),
            term.eq(Array(product << at for *_, at, _ in products)[arrived]),
            plus.eq(Array(sign for *_, sign in products)[arrived]),
        ]

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.setup.ready.eq(1)
                m.d.sync += setup.eq(self.setup.payload)
                with m.If(self.setup.valid & (self.setup.p.rows != 0)
                          & (self.setup.p.channels != 0)):
                    m.next = "ROW"
            with m.State("ROW"):
                total = self.sums.p.total
                m.d.sync += [
                    squares.eq(self.sums.p.squares), step.eq(0),
                    moments.total.eq(0), moments.factor.eq(setup.channels),
                    magnitude.eq(0),
                    moments.variance.eq(setup.epsilon),
                ]
                with m.If(setup.mode == NormMode.LAYER):
                    m.d.sync += [moments.total.eq(total), magnitude.eq(abs(total))]
                with m.If(setup.mode == NormMode.SCALE):
                    m.d.sync += [moments.factor.eq(1), moments.variance.eq(1 << 20)]
                    m.next = "LEAVE"
                with m.Else():
                    m.d.comb += self.sums.ready.eq(1)
                    with m.If(self.sums.valid):
                        m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                m.d.sync += step.eq(step + 1)
                with m.If(step > there_and_back):
                    m.d.sync += moments.variance.eq(
                        Mux(plus, moments.variance + term, moments.variance - term))
                with m.If(step == len(products) + there_and_back):
                    m.next = "LEAVE"
            with m.State("LEAVE"):
                m.d.comb += self.moments.valid.eq(1)
                with m.If(self.moments.ready):
                    m.d.sync += setup.rows.eq(setup.rows - 1)
                    m.next = "ROW"
                    with m.If(setup.rows == 1):
                        m.next = "IDLE"
        return m
