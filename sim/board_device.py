"""A simulated board: its gateware under Verilator between an SDRAM chip and a serial line."""

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config
from moeware.hw.sdram_pins import SDRAMPinRegisters, SDRAMPins
from moeware.hw.sdram_timing import SDRAMTiming
from moeware.hw.system import System

from .verilate import verilate
from .verilog import to_verilog

__all__ = ["SimulatedBoard", "SimulatedTop", "SimulationError"]

HERE = Path(__file__).parent
READ_CYCLES = 1 << 18  # of one read: more than a whole frame takes


class SimulationError(RuntimeError):
    """The gateware broke a rule of the SDRAM chip or of the serial line; the message says which."""


class ChipRules(ctypes.Structure):
    """`ChipRules` of sdram_chip.h."""

    _fields_ = [
        *((name, ctypes.c_double) for name in (
            "period_ns", "rcd_ns", "rp_ns", "ras_ns", "ras_max_ns", "rc_ns", "rfc_ns", "rrd_ns",
            "wr_ns", "power_up_ns", "refresh_interval_ns", "cas2_ns")),
        *((name, ctypes.c_uint32) for name in (
            "wr_cycles", "mode_cycles", "power_up_refreshes", "bank_bits", "row_bits",
            "column_bits", "capture_cycles")),
    ]


class SimulatedTop(wiring.Component):
    """A system with the registers that a board has in its IO cells.

    Members
    -------
    rx : In(1)
    tx : Out(1)
    pads : Out(SDRAMPins(timing, rate))
    """

    def __init__(self, system: System, timing: SDRAMTiming, rate: int):
        self._system, self._timing, self._rate = system, timing, rate
        super().__init__({
            "rx": In(1, init=1), "tx": Out(1, init=1), "pads": Out(SDRAMPins(timing, rate)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.system = system = self._system
        m.submodules.registers = registers = SDRAMPinRegisters(self._timing, self._rate)
        wiring.connect(m, system.sdram, registers.core)
        wiring.connect(m, registers.pads, wiring.flipped(self.pads))
        m.d.comb += [system.rx.eq(self.rx), self.tx.eq(system.tx)]
        return m


class SimulatedBoard:
    """What hangs on the USB cable, without the cable.

    `transport` is for `runtime.serial_link.SerialLink`. Time of the board passes only while the
    host reads from the transport, so a host that polls slowly sees the same board. Compiled once
    for each configuration and kept in the cache folder; the first time takes about a minute.

    Parameters
    ----------
    config : of the accelerator.
    accelerator : another component with the accelerator's two ports, for tests.
    clock_hz, baud : integers. A real board has 3,000,000 baud; the default is as fast as the line
        can be, because a simulated one costs time for every cycle.
    timing : the SDRAM chip. capture_cycles, rate : as of `SDRAMController`.

    Attributes
    ----------
    transport : the line. rules : `ChipRules` that the chip keeps to from the next `restart` on.

    Raises
    ------
    VerilateError
        A tool is missing or the gateware does not compile.
    """

    def __init__(self, config: Config, *, accelerator: wiring.Component | None = None,
                 clock_hz: int = 50_000_000, baud: int | None = None,
                 timing: SDRAMTiming = SDRAMTiming(), capture_cycles: int = 1, rate: int = 1):
        self.timing, self.clock_hz, self.rate = timing, clock_hz, rate
        self.baud = baud if baud is not None else clock_hz // 4
        system = System(accelerator or Accelerator(config), config.bus_bytes, clock_hz=clock_hz,
                        baud=self.baud, timing=timing, capture_cycles=capture_cycles, rate=rate)
        library = verilate(to_verilog(SimulatedTop(system, timing, rate), "board"), "board",
                           HERE / "board_harness.cpp", headers=[HERE / "sdram_chip.h"], shared=True)
        self._library = declare(ctypes.CDLL(str(library)))
        fields = dataclasses.asdict(timing) | {
            "period_ns": 1e9 / (clock_hz * rate), "refresh_interval_ns": timing.refresh_interval_ns,
            "capture_cycles": capture_cycles}
        self.rules = ChipRules(**{name: fields[name] for name, _ in ChipRules._fields_})
        self._board = None
        self.restart()
        self.transport = Transport(self)

    @property
    def cycles(self) -> int:
        """System clock cycles since power-up."""
        return self._library.board_cycles(self._board)

    @property
    def memory(self) -> np.ndarray:
        """The chip's content, uint8 [size], to read and write behind the gateware's back."""
        cells = self._library.board_memory(self._board)
        return np.ctypeslib.as_array(cells, shape=(self.timing.size_bytes,))

    def restart(self) -> None:
        """Power-up: the gateware is reset, the chip empty and as `rules` says."""
        self.close()
        self._board = self._library.board_new(ctypes.byref(self.rules), self.rate,
                                              self.clock_hz / self.baud)

    def idle(self, cycles: int) -> None:
        """Let time pass."""
        self._check(self._library.board_idle(self._board, cycles))

    def send(self, data: bytes) -> None:
        self._library.board_send(self._board, data, len(data))

    def receive(self, count: int, cycles: int) -> bytes:
        """Up to `count` bytes from the board, within `cycles`."""
        buffer = ctypes.create_string_buffer(count)
        taken = self._check(self._library.board_receive(self._board, buffer, count, cycles))
        return buffer.raw[:taken]

    def close(self) -> None:
        if self._board:
            self._library.board_free(self._board)
            self._board = None

    def _check(self, result: int) -> int:
        if result < 0:
            raise SimulationError(self._library.board_error(self._board).decode())
        return result


class Transport:
    """The host's end of the line, as a serial port has it."""

    def __init__(self, board: SimulatedBoard):
        self._board = board

    def write(self, data: bytes) -> None:
        self._board.send(bytes(data))

    def read(self, count: int) -> bytes:
        """`count` bytes, or fewer after a pause on the line."""
        return self._board.receive(count, READ_CYCLES)

    def pause(self, seconds: float) -> None:
        """Let as much time of the board pass."""
        self._board.idle(round(seconds * self._board.clock_hz))

    def close(self) -> None:
        self._board.close()


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of board_harness.cpp their types."""
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    for name, result, *arguments in [
        ("new", pointer, pointer, ctypes.c_uint32, ctypes.c_double),
        ("free", None, pointer),
        ("send", None, pointer, ctypes.c_char_p, size),
        ("receive", ctypes.c_int64, pointer, ctypes.c_char_p, size, count),
        ("idle", ctypes.c_int64, pointer, count),
        ("error", ctypes.c_char_p, pointer),
        ("cycles", count, pointer),
        ("memory", ctypes.POINTER(ctypes.c_uint8), pointer),
    ]:
        function = getattr(library, f"board_{name}")
        function.restype, function.argtypes = result, arguments
    return library
