"""The pins of an SDRAM chip."""

from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .sdram_timing import SDRAMTiming

__all__ = ["SDRAMPinRegisters", "SDRAMPins"]


class SDRAMPins(wiring.Signature):
    """The chip's pins, one flip-flop away from the pads; strobes are 1 when asserted.

    Members
    -------
    clock_enable : Out(1)
    cs : Out(1)
    ras : Out(1)
    cas : Out(1)
    we : Out(1)
    bank : Out(2)
    address : Out(13)
    dqm : Out(2)
    dq_o : Out(16)
    dq_oe : Out(1)
    dq_i : In(16)
    """

    def __init__(self, timing: SDRAMTiming = SDRAMTiming()):
        super().__init__({
            "clock_enable": Out(1), "cs": Out(1), "ras": Out(1), "cas": Out(1), "we": Out(1),
            "bank": Out(timing.bank_bits), "address": Out(timing.row_bits), "dqm": Out(2),
            "dq_o": Out(16), "dq_oe": Out(1), "dq_i": In(16),
        })


class SDRAMPinRegisters(wiring.Component):
    """One register on every pin: what the flip-flops of a board's IO cells are in simulation.

    Members
    -------
    core : In(SDRAMPins(timing))
        From the controller.
    pads : Out(SDRAMPins(timing))
        To the chip, a cycle later; `dq_i` comes back a cycle later too.
    """

    def __init__(self, timing: SDRAMTiming = SDRAMTiming()):
        super().__init__({"core": In(SDRAMPins(timing)), "pads": Out(SDRAMPins(timing))})

    def elaborate(self, platform):
        m = Module()
        for name, member in self.pads.signature.members.items():
            near, far = getattr(self.core, name), getattr(self.pads, name)
            m.d.sync += far.eq(near) if member.flow is Out else near.eq(far)
        return m
