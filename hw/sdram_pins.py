"""The pins of an SDRAM chip."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .sdram_timing import SDRAMTiming

__all__ = ["INPUT_CYCLES", "OUTPUT_CYCLES", "RATES", "SDRAMPinRegisters", "SDRAMPins"]

# Of a board's IO cells, by rate: cycles from the edge that changes `SDRAMPins` to the one that
# changes the pads, and from the edge that captures a word to the one that shows it. With one chip
# clock in a cycle they are flip-flops (`io.FFBuffer`). With two they are `io.DDRBuffer`, whose
# latencies depend on the device; these are the ECP5's, from Lattice's models and Amaranth's vendor
# file. ODDRX1F has two more stages than a flip-flop, for which Amaranth delays the output enable as
# well; it sends D0 while the clock is high, then D1. IDDRX1F shows what a rising edge (Q0) and the
# falling edge behind it (Q1) captured from the next rising edge on.
OUTPUT_CYCLES = {1: 1, 2: 3}
INPUT_CYCLES = {1: 0, 2: 1}
RATES = tuple(OUTPUT_CYCLES)  # chip clocks in a system clock


class SDRAMPins(wiring.Signature):
    """The chip's pins, the IO cells away from the pads; strobes are 1 when asserted.

    Parameters
    ----------
    timing : the chip.
    rate : its clocks in a cycle, 1 or 2. The members whose width depends on it hold a value for
        each of them, the first in the lowest bits; the others stand for the whole cycle.

    Members
    -------
    clock_enable : Out(1)
    cs : Out(rate)
    ras : Out(1)
    cas : Out(1)
    we : Out(1)
    bank : Out(2)
    address : Out(13)
    dqm : Out(2)
    dq_o : Out(16 * rate)
    dq_oe : Out(1)
    dq_i : In(16 * rate)
    """

    def __init__(self, timing: SDRAMTiming = SDRAMTiming(), rate: int = 1):
        super().__init__({
            "clock_enable": Out(1), "cs": Out(rate), "ras": Out(1), "cas": Out(1), "we": Out(1),
            "bank": Out(timing.bank_bits), "address": Out(timing.row_bits), "dqm": Out(2),
            "dq_o": Out(16 * rate), "dq_oe": Out(1), "dq_i": In(16 * rate),
        })


class SDRAMPinRegisters(wiring.Component):
    """Registers on every pin: what a board's IO cells are in simulation.

    Parameters
    ----------
    timing, rate : as of `SDRAMPins`.

    Members
    -------
    core : In(SDRAMPins(timing, rate))
        From the controller.
    pads : Out(SDRAMPins(timing, rate))
        To the chip, `OUTPUT_CYCLES` later. `dq_i` is what the cells capture: with rate 1 by the
        edge that ends the cycle, with rate 2 by the one that begins it and the one in its middle;
        so it comes back a cycle later with either.
    """

    def __init__(self, timing: SDRAMTiming = SDRAMTiming(), rate: int = 1):
        self._rate = rate
        super().__init__({"core": In(SDRAMPins(timing, rate)),
                          "pads": Out(SDRAMPins(timing, rate))})

    def elaborate(self, platform):
        m = Module()
        for name, member in self.pads.signature.members.items():
            near, far = getattr(self.core, name), getattr(self.pads, name)
            if member.flow is Out:
                for stage in range(1, OUTPUT_CYCLES[self._rate]):
                    register = Signal.like(near, name=f"{name}_{stage}")
                    m.d.sync += register.eq(near)
                    near = register
                m.d.sync += far.eq(near)
            else:
                m.d.sync += near.eq(far)
        return m
