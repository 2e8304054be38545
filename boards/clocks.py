"""Clocks of an ECP5 board with an SDRAM: dividers of the PLL and phase of the chip's clock."""

import dataclasses
from collections.abc import Iterator

from amaranth import ClockSignal, Const, Elaboratable, Instance, Module, Signal

from .board import PinTiming

__all__ = ["ClockError", "ClockPlan", "SystemClocks", "plan_clocks"]

PFD_HZ = (10e6, 400e6)
VCO_HZ = (400e6, 800e6)
DIVIDERS = range(1, 129)
LEAST_MARGIN_NS = 0.5


class ClockError(ValueError):
    """A system clock that the PLL cannot make or at which the SDRAM's pins cannot be timed."""


@dataclasses.dataclass(frozen=True)
class ClockPlan:
    """Dividers of an EHXPLLL, and how the SDRAM's pins are timed: its oscillator runs at
    `feedback_divider` times that of the board divided by `input_divider`.

    The chip's clock has `sdram_rate` periods in one of the system clock, the first of which starts
    `phase_steps` / `sdram_divider` of a period after it. `margin_ns` is the least of the setup and
    hold margins at both ends of the pins; with rate 2 it takes the system clock to be high for half
    of its period.
    """

    oscillator_hz: int
    clock_hz: int
    input_divider: int
    feedback_divider: int
    output_divider: int
    phase_steps: int
    capture_cycles: int
    margin_ns: float
    sdram_rate: int = 1

    @property
    def sdram_hz(self) -> int:
        return self.clock_hz * self.sdram_rate

    @property
    def sdram_divider(self) -> int:
        return self.output_divider // self.sdram_rate

    @property
    def phase_degrees(self) -> float:
        """Phase of the chip's clock, of its own period."""
        return 360 * self.phase_steps / self.sdram_divider


def plan_clocks(oscillator_hz: int, clock_hz: int, pins: PinTiming = PinTiming(),
                sdram_rate: int = 1) -> ClockPlan:
    """Dividers for exactly `clock_hz`, with the phase of the best margin for a chip whose clock is
    `sdram_rate` times as fast.

    Raises
    ------
    ClockError
    """
    plans = sorted(_dividers(oscillator_hz, sdram_rate))
    exact = [each for each in plans if abs(each[0] - clock_hz) < 1]
    if not exact:
        near = sorted({round(each[0]) for each in plans}, key=lambda hz: abs(hz - clock_hz))[:2]
        raise ClockError(f"System clock must be a frequency that the PLL can make from "
                         f"{oscillator_hz / 1e6:g} MHz, not {clock_hz / 1e6:g} MHz. The nearest: "
                         f"{' and '.join(f'{hz} Hz' for hz in sorted(near))}.")
    # The fastest oscillator has the finest phase.
    _, feedback_divider, output_divider, input_divider = max(
        exact, key=lambda each: (each[1] / each[3], -each[3]))
    sdram_divider = output_divider // sdram_rate
    period = 1e9 / (clock_hz * sdram_rate)
    margin, steps, capture = max(
        (pin_margin(period, steps * period / sdram_divider, capture, pins), -steps, capture)
        for steps in range(sdram_divider) for capture in (1, 2))
    if margin < LEAST_MARGIN_NS:
        raise ClockError(f"System clock must leave the SDRAM's pins a margin of {LEAST_MARGIN_NS} "
                         f"ns, not {margin:.2f} ns as {clock_hz / 1e6:g} MHz does, which gives the "
                         f"chip {clock_hz * sdram_rate / 1e6:g} MHz. Choose another.")
    return ClockPlan(oscillator_hz, clock_hz, input_divider, feedback_divider, output_divider,
                     -steps, capture, margin, sdram_rate)


def _dividers(oscillator_hz: int, sdram_rate: int) -> Iterator[tuple[float, int, int, int]]:
    """All clocks that the PLL can make, with the dividers of feedback, output and input."""
    for input_divider in DIVIDERS:
        reference = oscillator_hz / input_divider
        if not PFD_HZ[0] <= reference <= PFD_HZ[1]:
            continue
        for feedback_divider in DIVIDERS:
            vco = reference * feedback_divider
            if VCO_HZ[0] <= vco <= VCO_HZ[1]:
                for output_divider in DIVIDERS[sdram_rate - 1::sdram_rate]:
                    yield vco / output_divider, feedback_divider, output_divider, input_divider


def pin_margin(period: float, phase: float, capture_cycles: int, pins: PinTiming) -> float:
    """The least margin in ns of a chip whose clock has `period`, where it rises `phase` ns after an
    edge that launches pins, and the word of the chip's edge before is captured `capture_cycles`
    periods after that edge."""
    capture = capture_cycles * period
    arrives = phase + pins.output_ns + pins.access_ns + pins.input_ns
    leaves = phase + period + pins.output_min_ns + pins.hold_ns
    return min(capture - arrives, leaves - capture,
               phase - pins.chip_setup_ns - pins.output_skew_ns,
               period - phase - pins.chip_hold_ns - pins.output_skew_ns)


class SystemClocks(Elaboratable):
    """Drives the domains ``sync`` and ``sdram`` (the chip's clock; no logic but its pin).

    ``sync`` has no reset in its logic: until the PLL has locked, the device's global set/reset
    network holds every flip-flop at its initial value. A reset of thousands of flip-flops that is
    routed like any other signal would be the slowest path of all. The place and route tool derives
    both frequencies from that of the oscillator.
    """

    def __init__(self, plan: ClockPlan, oscillator):
        self._plan, self._oscillator = plan, oscillator

    def elaborate(self, platform):
        m = Module()
        plan = self._plan
        locked, back = Signal(), Signal()
        # A third output, of the frequency of the phase detector, goes back, so that the clocks need be
        # no multiples of it: what they are to the input does not matter. Half a period of phase leaves
        # room for CLKOS on both sides of CLKOP.
        own_phase = plan.output_divider // 2
        m.submodules.pll = Instance(
            "EHXPLLL",
            a_FREQUENCY_PIN_CLKI=f"{plan.oscillator_hz / 1e6:g}",
            a_FREQUENCY_PIN_CLKOP=f"{plan.clock_hz / 1e6:g}",
            a_FREQUENCY_PIN_CLKOS=f"{plan.sdram_hz / 1e6:g}",
            a_ICP_CURRENT="12", a_LPF_RESISTOR="8", a_MFG_ENABLE_FILTEROPAMP="1",
            a_MFG_GMCREF_SEL="2",
            p_PLLRST_ENA="DISABLED", p_INTFB_WAKE="DISABLED", p_STDBY_ENABLE="DISABLED",
            p_DPHASE_SOURCE="DISABLED", p_FEEDBK_PATH="CLKOS2",
            p_OUTDIVIDER_MUXA="DIVA", p_OUTDIVIDER_MUXB="DIVB", p_OUTDIVIDER_MUXC="DIVC",
            p_CLKI_DIV=plan.input_divider, p_CLKFB_DIV=1,
            p_CLKOP_ENABLE="ENABLED", p_CLKOP_DIV=plan.output_divider,
            p_CLKOP_CPHASE=own_phase, p_CLKOP_FPHASE=0,
            p_CLKOS_ENABLE="ENABLED", p_CLKOS_DIV=plan.sdram_divider,
            p_CLKOS_CPHASE=own_phase + plan.phase_steps, p_CLKOS_FPHASE=0,
            p_CLKOS2_ENABLE="ENABLED", p_CLKOS2_DIV=plan.feedback_divider,
            p_CLKOS2_CPHASE=plan.feedback_divider - 1, p_CLKOS2_FPHASE=0,
            i_CLKI=self._oscillator, i_CLKFB=back,
            i_RST=Const(0), i_STDBY=Const(0), i_PHASESEL0=Const(0), i_PHASESEL1=Const(0),
            i_PHASEDIR=Const(1), i_PHASESTEP=Const(1), i_PHASELOADREG=Const(1),
            i_PLLWAKESYNC=Const(0), i_ENCLKOP=Const(0), i_ENCLKOS=Const(0),
            o_CLKOP=ClockSignal("sync"), o_CLKOS=ClockSignal("sdram"), o_CLKOS2=back, o_LOCK=locked,
        )
        stable = [locked, Signal(), Signal()]
        for number in (1, 2):
            m.submodules[f"stable_{number}"] = Instance(
                "FD1S3AX", p_GSR="DISABLED", i_CK=ClockSignal("sync"), i_D=stable[number - 1],
                o_Q=stable[number])
        m.submodules.release = Instance("SGSR", i_CLK=ClockSignal("sync"), i_GSR=stable[2])
        return m
