"""Scaled variance of a row, from its sums."""

from amaranth import Array, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.isa import NormMode
from ..multiply import Multipliers
from .statistics import Sums

__all__ = ["Moments", "Variance", "VarianceSetup"]

EPSILON_BITS = 48


class VarianceSetup(data.StructLayout):
    """What the fields of a NORM say of its rows, of at most so many channels."""

    def __init__(self, channels: int):
        super().__init__({"mode": NormMode, "rows": 13, "channels": range(channels + 1),
                          "epsilon": EPSILON_BITS})


class Moments(data.StructLayout):
    """A value x of a row of at most `channels` is to become
    ``(factor * x - total) / sqrt(variance)``; the variance is largest where each x is -2**15 and
    nothing is subtracted."""

    def __init__(self, channels: int):
        super().__init__({"variance": range((channels**2 << 30) + (1 << EPSILON_BITS)),
                          "total": Sums(channels)["total"].shape, "factor": range(channels + 1)})


class Variance(wiring.Component):
    """``variance = channels * squares - total**2 + epsilon`` of each row, total 0 for RMS.

    For SCALE no sums are taken and the channels do not matter: the factor is 1, the total 0 and the
    variance 2**20, the square of one in the fraction bits of a normalised value, so that what follows
    leaves x as it is.

    One multiplier, six products: a row every `INTERVAL` cycles, its moments one cycle less after
    its sums were taken. Refused moments stay.

    Parameters
    ----------
    channels : of a row, at most 65535: the squares fill three operands, the total two

    Members
    -------
    setup : In(stream.Signature(VarianceSetup(channels)))
        Taken when the last row of the one before has left.
    sums : In(stream.Signature(Sums(channels)))
    moments : Out(stream.Signature(Moments(channels)))
    """

    INTERVAL = 14

    def __init__(self, channels: int):
        self.channels = channels
        super().__init__({"setup": In(stream.Signature(VarianceSetup(channels))),
                          "sums": In(stream.Signature(Sums(channels))),
                          "moments": Out(stream.Signature(Moments(channels)))})

    def elaborate(self, platform):
        m = Module()
        setup = Signal.like(self.setup.payload)
        squares = Signal.like(self.sums.p.squares)
        magnitude = Signal(range((self.channels << 15) + 1))
        moments = self.moments.p

        # (operands, weight of the product, sign); the squares' term comes first, so that the
        # accumulator is never negative.
        half = (len(magnitude) + 1) >> 1  # not less than the bits of `channels`
        low, high = magnitude[:half], magnitude[half:]
        products = [(squares[at:at + 16], setup.channels, at, 1) for at in (0, 16, 32)]
        products += [(low, low, 0, 0), (low, high, half + 1, 0), (high, high, 2 * half, 0)]
        m.submodules.multipliers = multipliers = Multipliers(unsigned(16), unsigned(half))
        # Registers on the way to the multiplier and back.
        there_and_back = Multipliers.LATENCY + 2
        term, plus = Signal.like(moments.variance), Signal()
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
                with m.If(self.setup.valid & (self.setup.p.rows != 0)):
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
