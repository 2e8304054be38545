"""The FPGA's top: clocks and IO cells around the system."""

from amaranth import Cat, ClockDomain, Elaboratable, Module, Signal
from amaranth.lib import io, wiring
from amaranth.lib.wiring import Out

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config
from moeware.hw.arch.registers import Status
from moeware.hw.system import System

from .board import Board
from .clocks import SystemClocks, plan_clocks

__all__ = ["LEDS", "BoardTop"]

LEDS = ("busy", "done", "error", "ready", "heartbeat")  # by number
PORTS = {"clock_enable": "clk_en", "address": "a", "bank": "ba"}  # where the names differ


class BoardTop(Elaboratable):
    """A board's gateware. `accelerator` replaces the accelerator of `config`, for tests."""

    def __init__(self, board: Board, config: Config, *, clock_hz: int | None = None,
                 accelerator: wiring.Component | None = None):
        self.board = board
        self.plan = plan_clocks(board.oscillator_hz, clock_hz or board.clock_hz, board.pins,
                                board.sdram_rate)
        self._system = System(
            accelerator or Accelerator(config, fabric=board.fabric), config.bus_bytes,
            clock_hz=self.plan.clock_hz, baud=board.baud, timing=board.sdram,
            capture_cycles=self.plan.capture_cycles, rate=board.sdram_rate)

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain(reset_less=True)
        m.domains.sdram = ClockDomain(reset_less=True)
        m.submodules.system = system = self._system

        m.submodules.oscillator = oscillator = io.Buffer(
            "i", platform.request(platform.default_clk, dir="-"))
        m.submodules.clocks = SystemClocks(self.plan, oscillator.i)

        uart = platform.request("uart", dir={"rx": "-", "tx": "-", "rts": "-", "dtr": "-"})
        m.submodules.rx = rx = io.Buffer("i", uart.rx)
        m.submodules.tx = tx = io.FFBuffer("o", uart.tx)
        # The pins' cells are far from what drives them.
        m.d.comb += system.rx.eq(rx.i)
        m.d.sync += tx.o.eq(system.tx)

        self._sdram(m, platform, system.sdram)

        heartbeat = Signal(26)
        m.d.sync += heartbeat.eq(heartbeat + 1)
        status = {flag.name.lower(): (system.status & flag).any() for flag in Status}
        lights = status | {"ready": system.ready, "heartbeat": heartbeat[-1]}
        for number, name in enumerate(LEDS):
            m.submodules[f"led_{name}"] = led = io.FFBuffer(
                "o", platform.request("led", number, dir="-"))
            m.d.sync += led.o.eq(lights[name])
        return m

    def _sdram(self, m, platform, pins):
        """The registers of the IO cells, and the chip's clock."""
        names = {name: PORTS.get(name, name) for name, member in pins.signature.members.items()
                 if member.flow is Out and not name.startswith("dq_")}
        ports = platform.request("sdram", dir=dict.fromkeys([*names.values(), "clk", "dq"], "-"))
        # Cells of one kind on all pins: their latency is the same, and their delays but for skew.
        rate = self.board.sdram_rate
        buffer = {1: io.FFBuffer, 2: io.DDRBuffer}[rate]
        for name, port in names.items():
            m.submodules[f"sdram_{name}"] = cell = buffer("o", getattr(ports, port))
            value, slots = getattr(pins, name), Cat(cell.o)
            m.d.comb += slots.eq(value.replicate(len(slots) // len(value)))
        m.submodules.sdram_dq = dq = buffer("io", ports.dq)
        m.d.comb += [Cat(dq.o).eq(pins.dq_o), dq.oe.eq(pins.dq_oe), pins.dq_i.eq(Cat(dq.i))]
        m.submodules.sdram_clk = clk = io.DDRBuffer("o", ports.clk, o_domain="sdram")
        m.d.comb += Cat(clk.o).eq(0b01)  # high in the first half of the period
