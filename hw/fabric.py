"""Multipliers out of look-up tables and carry chains, for what the DSP blocks do not suffice."""

from amaranth import Cat, Const, Instance, Module, Mux, Shape, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["FabricMultiplier", "RowPair"]


class RowPair(wiring.Component):
    """Two rows of a multiplication, added: ``total = a * (low + 2 * high)``, or
    ``a * (low - 2 * high)`` where `subtract`. Combinational.

    On ECP5 it is one carry chain whose cells multiply and add at once, half the look-up tables that
    synthesis would take: with x and y the bits that `low` and `high` select, a CCU2C computes the
    propagate signal x ^ y from all four inputs and the generate signal x from the first two.

    Parameters
    ----------
    a : shape of the operand
    subtract : `high` is the sign bit of the other operand
    chain : instantiate the carry cells of ECP5

    Members
    -------
    a : In(a)
    low : In(1)
    high : In(1)
    total : Out(signed(a.width + 2 + (not a.signed)))
    """

    def __init__(self, a, *, subtract: bool, chain: bool):
        a = Shape.cast(a)
        self.subtract, self.chain = subtract, chain
        super().__init__({"a": In(a), "low": In(1), "high": In(1),
                          "total": Out(signed(a.width + (not a.signed) + 2))})

    def elaborate(self, platform):
        m = Module()
        if not self.chain:
            once, twice = Mux(self.low, self.a, 0), Mux(self.high, self.a, 0) << 1
            m.d.comb += self.total.eq(once - twice if self.subtract else once + twice)
            return m

        top = self.a[-1] if self.a.shape().signed else Const(0)
        bits = [*self.a, *[top] * (len(self.total) - len(self.a))]
        m.d.comb += self.total[0].eq(self.a[0] & self.low)  # nothing meets the lowest bit
        # Bit 0 of the chain only makes the carry into bit 1. To subtract, the chain inverts what is
        # selected by A and B, which must then be the row to subtract, and adds one.
        halves = [(0, 0, 0, 1, 0x000F if self.subtract else 0x0000)]
        for place in range(1, len(self.total)):
            once, twice = (bits[place], self.low), (bits[place - 1], self.high)
            first, second = (twice, once) if self.subtract else (once, twice)
            halves.append((*first, *second, 0x8777 if self.subtract else 0x7888))
        if len(halves) % 2:
            halves.append((0, 0, 0, 0, 0))

        carry, sums = None, Signal(len(halves))
        for at in range(0, len(halves), 2):
            ports = {f"i_{name}{half}": value for half in (0, 1)
                     for name, value in zip("ABCD", halves[at + half])}
            if carry is not None:
                ports["i_CIN"] = carry
            carry = Signal(name=f"carry_{at}")
            m.submodules[f"cell_{at}"] = Instance(
                "CCU2C", **ports, p_INIT0=Const(halves[at][4], 16),
                p_INIT1=Const(halves[at + 1][4], 16), p_INJECT1_0="NO", p_INJECT1_1="NO",
                o_S0=sums[at], o_S1=sums[at + 1], o_COUT=carry)
        m.d.comb += self.total[1:].eq(sums[1:len(self.total)])
        return m


class FabricMultiplier(wiring.Component):
    """``product = a * b`` out of look-up tables.

    One product per cycle, `LATENCY` cycles after its operands, a register behind each of three
    stages: pairs of rows of the narrower operand; their sums; the sum of these. An operand of up to
    8 bits costs one addition per stage. Nothing moves while `advance` is low.

    Parameters
    ----------
    a, b : shapes of the operands
    chain : as for `RowPair`

    Members
    -------
    advance : In(1)
    a : In(a)
    b : In(b)
    product : Out(shape of the product)
    """

    LATENCY = 3

    def __init__(self, a, b, *, chain: bool):
        a, b = Shape.cast(a), Shape.cast(b)
        self.chain = chain
        super().__init__({"advance": In(1), "a": In(a), "b": In(b),
                          "product": Out(Shape(a.width + b.width, a.signed or b.signed))})

    def elaborate(self, platform):
        m = Module()
        wide, narrow = (self.a, self.b) if len(self.a) >= len(self.b) else (self.b, self.a)
        bits, is_signed = list(narrow), narrow.shape().signed
        if len(bits) % 2:
            bits.append(bits[-1] if is_signed else Const(0))

        terms = []  # (signed value, its weight in bits)
        for at in range(0, len(bits), 2):
            m.submodules[f"rows_{at}"] = pair = RowPair(
                wide.shape(), subtract=is_signed and at + 2 == len(bits), chain=self.chain)
            m.d.comb += [pair.a.eq(wide), pair.low.eq(bits[at]), pair.high.eq(bits[at + 1])]
            terms.append((pair.total, at))
        terms = self._register(m, terms, 1)
        levels = (len(terms) - 1).bit_length()
        for _ in range(levels - 1):
            terms = self._pairs(terms)
        terms = self._register(m, terms, 2)
        if levels:
            terms = self._pairs(terms)
        m.d.comb += self.product.eq(self._register(m, terms, 3)[0][0])
        return m

    def _register(self, m, terms, stage):
        registers = [(Signal(value.shape(), reset_less=True, name=f"stage_{stage}_{weight}"), weight)
                     for value, weight in terms]
        with m.If(self.advance):
            m.d.sync += [register.eq(value) for (register, _), (value, _) in zip(registers, terms)]
        return registers

    def _pairs(self, terms):
        """The terms, added two by two; what of one lies below the other needs no addition."""
        sums = []
        for at in range(0, len(terms) - 1, 2):
            (low, weight), (high, above) = terms[at:at + 2]
            apart = above - weight
            sums.append((Cat(low[:apart], (low >> apart) + high).as_signed(), weight))
        return sums + terms[2 * len(sums):]
