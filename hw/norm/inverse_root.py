"""Inverse square root of a variance: justify, root, divide, each working on a row of its own."""

from amaranth import Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..divide import Divide, Justify
from ..root import Root
from ..slices import RegisterSlice
from .variance import Moments

__all__ = ["InverseRoot", "RowScale"]


class RowScale(data.StructLayout):
    """A value x of a row of at most `channels` becomes
    ``round((factor * x - total) * inverse / 2**shift)``."""

    def __init__(self, channels: int):
        moments = Moments(channels)
        super().__init__({
            "inverse": 17,  # 2**16 or more
            "shift": 6,  # 5..33 for 2,047 channels, 41 for 65,535
            "total": moments["total"].shape, "factor": moments["factor"].shape})


class InverseRoot(wiring.Component):
    """The inverse root r of `numerics.normalise`: ``r / 2**(h + 16) ~ 1 / sqrt(variance)``, and the
    shift of its last step.

    r = 2**17, the one value of 18 bits, leaves as 2**16 with a shift less by one, which is the same
    number and rounds the same. A variance of 0 gives some inverse: every value of such a row equals
    its mean, so that the product is 0.

    A row every `INTERVAL` cycles; the first `LATENCY` cycles after its moments. Up to seven rows are
    inside, and a refused result stays without holding up the next row's division. Between the units
    are registers: a refusal does not pass through all of them in one cycle.

    Parameters
    ----------
    channels : of a row, at most 65535: a variance has 63 bits

    Members
    -------
    moments : In(stream.Signature(Moments(channels)))
    scales : Out(stream.Signature(RowScale(channels)))
    """

    INTERVAL = 19
    LATENCY = 45

    def __init__(self, channels: int):
        self.channels = channels
        super().__init__({"moments": In(stream.Signature(Moments(channels))),
                          "scales": Out(stream.Signature(RowScale(channels)))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.justify = justify = Justify(64, granule=2)
        m.submodules.root = root = Root(32)
        m.submodules.divide = divide = Divide(33, 16, 18)

        # What belongs to a row moves with it from unit to unit.
        moments = Moments(self.channels)
        half = (moments["variance"].width + 1) >> 1
        beside = data.StructLayout({"total": moments["total"].shape,
                                    "factor": moments["factor"].shape, "half": range(half + 1)})
        m.submodules.justified = justified = RegisterSlice(data.StructLayout(
            {"mantissa": 32, "beside": beside}))
        m.submodules.rooted = rooted = RegisterSlice(data.StructLayout(
            {"root": 16, "beside": beside}))
        m.submodules.scaled = scaled = RegisterSlice(RowScale(self.channels))
        justifying, rooting, dividing = (
            Signal(beside, name=name) for name in ("justifying", "rooting", "dividing"))
        m.d.comb += [
            justify.values.payload.eq(self.moments.p.variance),
            justify.values.valid.eq(self.moments.valid),
            self.moments.ready.eq(justify.values.ready),

            justified.input.valid.eq(justify.justified.valid),
            justify.justified.ready.eq(justified.input.ready),
            justified.input.p.mantissa.eq(justify.justified.p.mantissa[32:]),
            justified.input.p.beside.eq(justifying),
            justified.input.p.beside.half.eq(justify.justified.p.length >> 1),
            root.values.payload.eq(justified.output.p.mantissa),
            root.values.valid.eq(justified.output.valid),
            justified.output.ready.eq(root.values.ready),

            divide.operands.p.numerator.eq(Const(1 << 32, 33)),
            rooted.input.valid.eq(root.roots.valid), root.roots.ready.eq(rooted.input.ready),
            rooted.input.p.root.eq(root.roots.payload), rooted.input.p.beside.eq(rooting),
            divide.operands.p.denominator.eq(rooted.output.p.root),
            divide.operands.valid.eq(rooted.output.valid),
            rooted.output.ready.eq(divide.operands.ready),
        ]
        with m.If(justify.values.valid & justify.values.ready):
            m.d.sync += [justifying.total.eq(self.moments.p.total),
                         justifying.factor.eq(self.moments.p.factor)]
        with m.If(root.values.valid & root.values.ready):
            m.d.sync += rooting.eq(justified.output.p.beside)
        with m.If(divide.operands.valid & divide.operands.ready):
            m.d.sync += dividing.eq(rooted.output.p.beside)

        # Fewer fraction bits of wide rows, see `numerics.norm_fraction_bits`.
        fewer = sum(dividing.factor[bit:].any() for bit in (11, 12, 14) if bit < len(dividing.factor))
        quotient = divide.quotients.payload
        m.d.comb += [
            scaled.input.valid.eq(divide.quotients.valid),
            divide.quotients.ready.eq(scaled.input.ready),
            scaled.input.p.inverse.eq(Mux(quotient[17], 1 << 16, quotient[:17])),
            scaled.input.p.shift.eq(dividing.half + 6 + fewer - quotient[17]),
            scaled.input.p.total.eq(dividing.total),
            scaled.input.p.factor.eq(dividing.factor),
        ]
        wiring.connect(m, scaled.output, wiring.flipped(self.scales))
        return m
