"""The multiplier of ECP5's DSP slice."""

from amaranth import ClockSignal, Const, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Mult18x18D"]


class Mult18x18D(wiring.Component):
    """``p = a * b`` in one block.

    One result per cycle, `LATENCY` cycles after its operands, all registers in the block. Nothing
    moves while `advance` is low.

    Parameters
    ----------
    instance : instantiate the block, else describe what it does

    Members
    -------
    advance : In(1)
    a : In(signed(18))
    b : In(signed(18))
    p : Out(signed(36))
    """

    LATENCY = 3

    advance: In(1)
    a: In(signed(18))
    b: In(signed(18))
    p: Out(signed(36))

    def __init__(self, *, instance: bool):
        self.instance = instance
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        if not self.instance:
            a, b, inside = (Signal.like(port, reset_less=True)
                            for port in (self.a, self.b, self.p))
            with m.If(self.advance):
                m.d.sync += [a.eq(self.a), b.eq(self.b), inside.eq(a * b), self.p.eq(inside)]
            return m

        ports = {f"i_{name}{bit}": port[bit]
                 for name, port in (("A", self.a), ("B", self.b)) for bit in range(18)}
        ports |= {f"o_P{bit}": self.p[bit] for bit in range(36)}
        for register in ("INPUTA", "INPUTB", "PIPELINE", "OUTPUT"):
            ports |= {f"p_REG_{register}_CLK": "CLK0", f"p_REG_{register}_CE": "CE0",
                      f"p_REG_{register}_RST": "RST0"}
        m.submodules.dsp = Instance(
            "MULT18X18D", **ports, i_CLK0=ClockSignal(), i_CE0=self.advance, i_RST0=Const(0),
            i_SIGNEDA=Const(1), i_SIGNEDB=Const(1), i_SOURCEA=Const(0), i_SOURCEB=Const(0))
        return m
