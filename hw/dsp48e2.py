"""The DSP block of UltraScale+."""

from amaranth import ClockSignal, Const, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["DSP48E2"]

_REGISTERS = {"A": 1, "ACASC": 1, "B": 1, "BCASC": 1, "D": 1, "M": 1, "P": 1, "AD": 0, "C": 0,
              "OPMODE": 0, "ALUMODE": 0, "INMODE": 0, "CARRYIN": 0, "CARRYINSEL": 0}
_ENABLES = ("CEA2", "CEB2", "CED", "CEM", "CEP")
_ZEROS = {name: 1 for name in (
    "CEA1", "CEB1", "CEAD", "CEC", "CEALUMODE", "CECARRYIN", "CECTRL", "CEINMODE", "RSTA",
    "RSTALLCARRYIN", "RSTALUMODE", "RSTB", "RSTC", "RSTCTRL", "RSTD", "RSTINMODE", "RSTM", "RSTP",
    "CARRYIN", "CARRYCASCIN", "MULTSIGNIN")} | {
    "ALUMODE": 4, "CARRYINSEL": 3, "C": 48, "ACIN": 30, "BCIN": 18, "PCIN": 48}


class DSP48E2(wiring.Component):
    """``p = (a + d) * b + addend`` in one block, whose sum of a and d must fit in 27 bits.

    One result per cycle, `LATENCY` cycles after its operands, all registers in the block. Nothing
    moves while `advance` is low.

    Parameters
    ----------
    addend : constant
    instance : instantiate the block, else describe what it does

    Members
    -------
    advance : In(1)
    a : In(signed(27))
    d : In(signed(27))
    b : In(signed(18))
    p : Out(signed(48))
    """

    LATENCY = 3

    advance: In(1)
    a: In(signed(27))
    d: In(signed(27))
    b: In(signed(18))
    p: Out(signed(48))

    def __init__(self, *, addend: int = 0, instance: bool):
        self.addend, self.instance = addend, instance
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        if not self.instance:
            a, d, b = (Signal.like(port, reset_less=True) for port in (self.a, self.d, self.b))
            inside = Signal(signed(45), reset_less=True)
            with m.If(self.advance):
                m.d.sync += [a.eq(self.a), d.eq(self.d), b.eq(self.b),
                             inside.eq((a + d)[:27].as_signed() * b),
                             self.p.eq(inside + self.addend)]
            return m

        wide = Signal(signed(30))
        m.d.comb += wide.eq(self.a)
        m.submodules.dsp = Instance(
            "DSP48E2", i_CLK=ClockSignal(), i_A=wide, i_B=self.b, i_D=self.d, o_P=self.p,
            # The multiplier takes D + A; the adder takes its product (X, Y) and the constant (W).
            i_INMODE=Const(0b00100, 5), i_OPMODE=Const(0b10_000_01_01, 9),
            p_AMULTSEL="AD", p_PREADDINSEL="A", p_BMULTSEL="B", p_USE_MULT="MULTIPLY",
            p_RND=Const(self.addend, 48),
            **{f"i_{name}": self.advance for name in _ENABLES},
            **{f"i_{name}": Const(0, width) for name, width in _ZEROS.items()},
            **{f"p_{name}REG": value for name, value in _REGISTERS.items()})
        return m
