import pytest

from moeware.boards.board import PinTiming
from moeware.boards.clocks import ClockError, pin_margin, plan_clocks

OSCILLATOR = 25_000_000


@pytest.mark.parametrize("clock_hz", [50_000_000, 62_500_000, 75_000_000, 87_500_000,
                                      100_000_000, 112_500_000, 125_000_000])
def test_dividers_make_the_clock_within_the_limits_of_the_pll(clock_hz):
    plan = plan_clocks(OSCILLATOR, clock_hz)
    reference = OSCILLATOR / plan.input_divider
    assert 10e6 <= reference <= 400e6
    assert reference * plan.feedback_divider == clock_hz
    assert 400e6 <= clock_hz * plan.output_divider <= 800e6
    assert 0 <= plan.phase_steps < plan.output_divider
    assert plan.margin_ns >= 0.5


def test_margins_of_a_clock_worked_out_by_hand():
    """50 MHz, the chip's clock 5 ns late: a word comes at 5 + 3 + 6 + 1 = 15 ns and is captured at
    20 ns; commands come 5 ns before the chip's clock and stay for 15 ns."""
    assert pin_margin(20, 5, 1, PinTiming()) == 5 - 1.5 - 0.5
    assert pin_margin(20, 9, 1, PinTiming()) == 20 - 19
    assert pin_margin(20, 19, 2, PinTiming()) == 20 - 19 - 0.8 - 0.5


@pytest.mark.parametrize("clock_hz, words", [
    (55_000_000, "50 MHz and 62.5 MHz"), (60_000_000, "50 MHz and 62.5 MHz"),
    (200_000_000, "must leave the SDRAM's pins a margin of 0.5 ns")])
def test_an_impossible_clock_is_refused(clock_hz, words):
    with pytest.raises(ClockError, match=words):
        plan_clocks(OSCILLATOR, clock_hz)
