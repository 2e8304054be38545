import pytest

from moeware.boards.board import PinTiming
from moeware.boards.clocks import ClockError, pin_margin, plan_clocks

OSCILLATOR = 25_000_000


@pytest.mark.parametrize("clock_hz, rate", [
    *((clock_hz, 1) for clock_hz in (50_000_000, 55_000_000, 62_500_000, 72_727_273, 80_000_000,
                                     100_000_000, 125_000_000)),
    (37_500_000, 2), (50_000_000, 2), (62_500_000, 2), (66_666_667, 2)])
def test_dividers_make_the_clocks_within_the_limits_of_the_pll(clock_hz, rate):
    plan = plan_clocks(OSCILLATOR, clock_hz, sdram_rate=rate)
    reference = OSCILLATOR / plan.input_divider
    assert 10e6 <= reference <= 400e6
    assert 400e6 <= reference * plan.feedback_divider <= 800e6
    assert round(reference * plan.feedback_divider / plan.output_divider) == clock_hz
    assert plan.sdram_hz == clock_hz * rate
    assert plan.sdram_divider * rate == plan.output_divider
    assert 0 <= plan.phase_steps < plan.sdram_divider
    assert plan.margin_ns >= 0.5


def test_margins_of_a_clock_worked_out_by_hand():
    """50 MHz, the chip's clock 5 ns late: a word comes at 5 + 3 + 6 + 1 = 15 ns and is captured at
    20 ns; commands come 5 ns before the chip's clock and stay for 15 ns."""
    assert pin_margin(20, 5, 1, PinTiming()) == 5 - 1.5 - 0.5
    assert pin_margin(20, 9, 1, PinTiming()) == 20 - 19
    assert pin_margin(20, 19, 2, PinTiming()) == 20 - 19 - 0.8 - 0.5


def test_margins_of_a_chip_at_twice_the_clock_worked_out_by_hand():
    """15 ns with two chip clocks of 7.5 ns, the chip's clock 4 ns late: a word comes at
    4 + 3 + 6 + 1 = 14 ns, is captured at 15 ns, and leaves at 4 + 7.5 + 2 + 2.5 = 16 ns; commands
    come 4 ns before the chip's clock and stay for 3.5 ns."""
    assert pin_margin(7.5, 4, 2, PinTiming()) == 15 - 14
    assert pin_margin(7.5, 3.5, 2, PinTiming()) == 15.5 - 15
    assert pin_margin(7.5, 7, 2, PinTiming()) == 15 - 17


def test_phase_of_a_chip_at_twice_the_clock_worked_out_by_hand():
    """62.5 MHz and 125 MHz, of 750 MHz: of the chip's 6 phases the one of 4 steps, 5.33 ns, is the
    best; a step less leaves 0.5 ns of hold at the FPGA."""
    plan = plan_clocks(OSCILLATOR, 62_500_000, sdram_rate=2)
    assert (plan.output_divider, plan.sdram_divider, plan.phase_steps) == (12, 6, 4)
    assert plan.phase_degrees == 240 and plan.capture_cycles == 2
    assert plan.margin_ns == pin_margin(8, 4 * 8 / 6, 2, PinTiming())
    assert round(plan.margin_ns, 9) == round(2 / 3, 9)


def test_both_clocks_divide_that_of_the_pll():
    """787.5 / 37.5 is odd."""
    assert plan_clocks(OSCILLATOR, 37_500_000).output_divider == 21
    plan = plan_clocks(OSCILLATOR, 37_500_000, sdram_rate=2)
    assert (plan.output_divider, plan.sdram_divider) == (20, 10)


@pytest.mark.parametrize("clock_hz, rate, words", [
    (66_000_000, 1, "65909091 Hz and 66071429 Hz"), (66_000_000, 2, "65625000 Hz and 66250000 Hz"),
    (200_000_000, 1, "must leave the SDRAM's pins a margin of 0.5 ns"),
    (100_000_000, 2, "must leave the SDRAM's pins a margin of 0.5 ns.*the chip 200 MHz"),
    (450_000_000, 2, "must be a frequency that the PLL can make")])
def test_an_impossible_clock_is_refused(clock_hz, rate, words):
    with pytest.raises(ClockError, match=words):
        plan_clocks(OSCILLATOR, clock_hz, sdram_rate=rate)
