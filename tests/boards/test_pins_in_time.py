"""Controller, IO cells, pads and chip of a clock plan in nanoseconds, without the stand-ins that the
other simulations have for the cells (`SDRAMPinRegisters`) and for the time that words take."""

import dataclasses
import random

import pytest

from moeware.boards.board import PinTiming
from moeware.boards.clocks import plan_clocks
from moeware.hw.sdram import SDRAMController
from moeware.hw.sdram_timing import SDRAMTiming
from moeware.sim.sdram_model import SDRAMChip

from ..hw.background import simulate_beside
from ..hw.streams import get_all, put_all

OSCILLATOR = 25_000_000
QUICK = SDRAMTiming(power_up_ns=500)
OUTPUT_STAGES = {1: 1, 2: 3}  # OFS1P3DX, ODDRX1F: registers up to the one that drives the pad
PIN_NAMES = ("clock_enable", "cs", "ras", "cas", "we", "bank", "address", "dqm", "dq_o", "dq_oe")


class Pads:
    """The IO cells of a plan, the wires, and a chip.

    An edge of the system clock at time t changes the pads at t + output_ns, and captures what came
    input_ns before t. The chip drives word e of its clock from access_ns after edge e - 1 to
    hold_ns after edge e; at other times DQ is undefined.
    """

    def __init__(self, plan, pins=PinTiming()):
        self.rate, self.pins = plan.sdram_rate, pins
        self.period = 1e9 / plan.sdram_hz
        self.phase = plan.phase_steps * self.period / plan.sdram_divider
        self.chip = SDRAMChip(QUICK, plan.sdram_hz)
        self.stages = [dict.fromkeys(PIN_NAMES, 0)] * OUTPUT_STAGES[self.rate]
        self.words = {}  # by edge of the chip's clock

    def cycle(self, core):
        """From one edge of the system clock to the next, at which `core` is launched; returns what
        the cells show after that edge."""
        cycle, at_pads = self.chip.cycle // self.rate, self.stages[0]
        self.stages = [*self.stages[1:], core]
        for slot in range(self.rate):  # ODDRX1F: D0 while the clock is high, then D1
            self.chip.step(at_pads | {"cs": at_pads["cs"] >> slot & 1,
                                      "dq_o": at_pads["dq_o"] >> 16 * slot & 0xFFFF})
            self.words |= dict(self.chip.output)
        if self.rate == 1:  # IFS1P3DX
            return self.captured((cycle + 1) * self.period)
        # IDDRX1F: Q0 of the edge that began the cycle, Q1 of the falling one in its middle.
        rising = 2 * cycle * self.period
        return self.captured(rising) | self.captured(rising + self.period) << 16

    def captured(self, time):
        pins = self.pins
        for edge in range(self.chip.cycle - 4, self.chip.cycle + 4):
            rises = edge * self.period + self.phase  # of the FPGA's flip-flop for the chip's clock
            if (rises - self.period + pins.output_ns + pins.access_ns + pins.input_ns <= time
                    <= rises + pins.output_min_ns + pins.hold_ns):
                return self.words.get(edge, 0xBAD1)
        return 0xBAD2


def read_back(plan, bus_bytes=8):
    """Bursts are written and read; True where they are the same."""
    dut = SDRAMController(bus_bytes, plan.clock_hz, QUICK, plan.capture_cycles, plan.sdram_rate)
    pads, memory = Pads(plan), dut.memory
    draw = random.Random(5)
    bursts = [(address, draw.randrange(1, 40)) for address in (0, 1000, 4096, 1 << 20)]
    words = [[draw.getrandbits(8 * bus_bytes) for _ in range(beats)] for _, beats in bursts]
    same = []

    async def cells(ctx):
        while True:
            _, _, *core = await ctx.tick().sample(*(getattr(dut.pins, name) for name in PIN_NAMES))
            ctx.set(dut.pins.dq_i, pads.cycle(dict(zip(PIN_NAMES, core, strict=True))))

    async def user(ctx):
        for (address, beats), content in zip(bursts, words, strict=True):
            await put_all(ctx, memory.write_command, [{"address": address, "beats": beats}])
            await put_all(ctx, memory.write_data, content)
            await ctx.tick().until(memory.written)
        for (address, beats), content in zip(bursts, words, strict=True):
            await put_all(ctx, memory.read_command, [{"address": address, "beats": beats}])
            same.append(await get_all(ctx, memory.read_data, beats) == content)

    simulate_beside(dut, [user], [cells])
    return all(same)


PLANS = [(50_000_000, 1), (100_000_000, 1), (125_000_000, 1),
         (37_500_000, 2), (50_000_000, 2), (62_500_000, 2),
         (66_666_667, 2)]


@pytest.mark.parametrize("clock_hz, rate", PLANS)
def test_what_was_written_is_read(clock_hz, rate):
    assert read_back(plan_clocks(OSCILLATOR, clock_hz, sdram_rate=rate))


@pytest.mark.parametrize("clock_hz, rate", PLANS)
def test_a_word_captured_at_another_edge_is_another(clock_hz, rate):
    plan = plan_clocks(OSCILLATOR, clock_hz, sdram_rate=rate)
    assert not read_back(dataclasses.replace(plan, capture_cycles=3 - plan.capture_cycles))
