"""Pipelined multipliers, as the DSP blocks of the device have them."""

from amaranth import Module, Shape, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .dsp48e2 import DSP48E2
from .fabric import FabricMultiplier
from .mult18x18d import Mult18x18D

__all__ = ["Multipliers", "primitive_for"]

PRIMITIVES = ("ecp5", "dsp48e2", "generic", "fabric")


def primitive_for(platform) -> str:
    """The multiplier primitive of a platform: "ecp5", "dsp48e2" of UltraScale+, or "generic" where
    inference does."""
    device = (getattr(platform, "device", None) or "").upper()
    if device.startswith("LFE5"):
        return "ecp5"
    # Zynq, Kintex and Virtex UltraScale+; Alveo cards carry the last.
    return "dsp48e2" if device.startswith(("XCZU", "XCK26", "XCKU", "XCVU", "XCU")) else "generic"


class Multipliers(wiring.Component):
    """A bank of `count` exact multipliers of at most 18 by 18 bits: ``product[i] = a[i] * b[i]``.

    One product of each per cycle, `LATENCY` cycles after its operands, with registers at the
    input, inside and at the output. Nothing moves while `advance` is low, and such a cycle does
    not count. Contents are undefined until `LATENCY` operands went in.

    On ECP5 each is one MULT18X18D, on UltraScale+ one DSP48E2, with its own registers, which
    synthesis would not use by itself; elsewhere they are described by their behaviour, with the
    same latency. With "fabric" they are made of look-up tables, whatever the device: see
    `FabricMultiplier`.

    Parameters
    ----------
    a, b : shape of the operands, at most 18 bits signed or 17 bits unsigned
    count : multipliers
    primitive : "ecp5", "dsp48e2", "generic" or "fabric"; by default what the platform has

    Members
    -------
    advance : In(1)
    a : In(data.ArrayLayout(a, count))
    b : In(data.ArrayLayout(b, count))
    product : Out(data.ArrayLayout(shape of the product, count))
    """

    LATENCY = 3

    def __init__(self, a, b, count: int = 1, *, primitive: str | None = None):
        a, b = Shape.cast(a), Shape.cast(b)
        for name, shape in (("a", a), ("b", b)):
            if shape.width + (not shape.signed) > 18:
                raise ValueError(f"Multipliers.{name} must be at most 18 bits with its sign, "
                                 f"not {shape!r}; split wider operands")
        if primitive not in (None, *PRIMITIVES):
            raise ValueError(f"Multipliers.primitive must be one of {PRIMITIVES}, "
                             f"not {primitive!r}")
        self.count, self.primitive, self.a_shape, self.b_shape = count, primitive, a, b
        self.product_shape = Shape(a.width + b.width, a.signed or b.signed)
        super().__init__({
            "advance": In(1),
            "a": In(data.ArrayLayout(a, count)),
            "b": In(data.ArrayLayout(b, count)),
            "product": Out(data.ArrayLayout(self.product_shape, count)),
        })

    def elaborate(self, platform):
        m = Module()
        primitive = self.primitive or primitive_for(platform)
        for i in range(self.count):
            if primitive == "ecp5":
                m.submodules[f"multiplier_{i}"] = block = Mult18x18D(
                    instance=primitive_for(platform) == "ecp5")
                # Operands stand at the top of their 18 bits: zeros below are settings of the block,
                # copies of a sign above would each be a wire to it.
                up = [18 - shape.width - (not shape.signed) for shape in (self.a_shape, self.b_shape)]
                m.d.comb += [block.advance.eq(self.advance), block.a.eq(self.a[i] << up[0]),
                             block.b.eq(self.b[i] << up[1]), self.product[i].eq(block.p[sum(up):])]
            elif primitive == "dsp48e2":
                m.submodules[f"multiplier_{i}"] = block = DSP48E2(
                    instance=primitive_for(platform) == "dsp48e2")
                m.d.comb += [block.advance.eq(self.advance), block.a.eq(self.a[i]),
                             block.b.eq(self.b[i]), self.product[i].eq(block.p)]
            elif primitive == "fabric":
                m.submodules[f"multiplier_{i}"] = multiplier = FabricMultiplier(
                    self.a[i].shape(), self.b[i].shape(), chain=primitive_for(platform) == "ecp5")
                m.d.comb += [multiplier.advance.eq(self.advance), multiplier.a.eq(self.a[i]),
                             multiplier.b.eq(self.b[i]), self.product[i].eq(multiplier.product)]
            else:
                a = Signal(self.a[i].shape(), reset_less=True, name=f"a_{i}")
                b = Signal(self.b[i].shape(), reset_less=True, name=f"b_{i}")
                inside = Signal(self.product_shape, reset_less=True, name=f"inside_{i}")
                product = Signal(self.product_shape, reset_less=True, name=f"product_{i}")
                m.d.comb += self.product[i].eq(product)
                with m.If(self.advance):
                    m.d.sync += [a.eq(self.a[i]), b.eq(self.b[i]), inside.eq(a * b),
                                 product.eq(inside)]
        return m
