"""The RTL device: the accelerator's own Verilog under Verilator, with a DRAM model behind it."""

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.layout import ALIGNMENT
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.registers import Register, Status
from moeware.runtime.device import DeviceError, Progress
from moeware.runtime.drive import Driver, read_counters

from . import events
from .dram import SDRAM_16BIT, DramCycles, DramTiming
from .verilate import VerilateError, verilate
from .verilog import to_verilog

__all__ = ["RtlDevice", "RtlTarget", "build"]

CHUNK_CYCLES = 100_000  # cycles between two looks at the watchdog and at signals
STALL_CYCLES = 400_000  # without progress in any engine or on the bus: the run is stuck
HARNESS = Path(__file__).with_name("harness.cpp")
HEADERS = [Path(__file__).with_name("dram.h")]


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build(config: Config, verilog: str | None = None, *, fast: bool = True,
          notify: Callable[[str], None] = report) -> Path:
    """The simulation of a configuration as a shared library; compiled once, then kept.

    Parameters
    ----------
    verilog : text of a module ``accelerator`` to simulate instead of the generated one.
    fast : optimise the simulation, which takes longer to compile; otherwise the compilation.
    notify : called with a line that says so if there is something to compile.

    Raises
    ------
    VerilateError
        A tool is missing, or the Verilog does not compile.
    """
    if verilog is None:
        verilog = _generated(config)
    return verilate(verilog, "accelerator", HARNESS, headers=HEADERS, shared=True, fast=fast,
                    notify=notify)


@functools.lru_cache(maxsize=16)
def _generated(config: Config) -> str:
    return to_verilog(Accelerator(config), "accelerator")


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, word, long = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
    for name, result, arguments in (
            ("new", handle, (ctypes.POINTER(DramCycles), long, word)),
            ("delete", None, (handle,)),
            ("error", ctypes.c_char_p, (handle,)),
            ("cycles", long, (handle,)),
            ("resize", None, (handle, long)),
            ("memory", ctypes.c_void_p, (handle,)),
            ("access", ctypes.c_int, (handle, ctypes.c_int, word, word, ctypes.POINTER(word))),
            ("run", ctypes.c_int, (handle, long)),
            ("log", None, (handle, ctypes.c_int)),
            ("log_length", long, (handle,)),
            ("take_log", None, (handle, ctypes.c_void_p))):
        function = getattr(library, f"simulation_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class RtlTarget:
    """Registers and DRAM of simulated gateware (see `moeware.runtime.drive.Target`).

    Simulated time passes only while a register is accessed or `wait_done` waits; both release the
    interpreter lock.

    Parameters
    ----------
    library : from `build`.
    dram, clock_hz : the memory, and the accelerator's clock that its nanoseconds are counted in.
    stall_seed : withhold every channel of both ports at random, after this seed; None: never.
    stall_cycles : cycles without progress after which a run counts as stuck.

    Raises
    ------
    DeviceError
        From every access: the gateware broke a rule of its ports, or does not answer.
    """

    def __init__(self, library: Path, *, bus_bytes: int, dram: DramTiming = SDRAM_16BIT,
                 clock_hz: float = 100e6, stall_seed: int | None = None,
                 stall_cycles: int = STALL_CYCLES):
        self.stall_cycles = stall_cycles
        self._size = 0
        self._library = _library(library)
        self._handle = self._library.simulation_new(
            ctypes.byref(dram.cycles(bus_bytes, clock_hz)),
            0 if stall_seed is None else 2 * stall_seed + 1, stall_seed or 0)
        self._check()

    def __del__(self):
        if handle := getattr(self, "_handle", None):
            self._library.simulation_delete(handle)
            self._handle = None

    @property
    def cycles(self) -> int:
        """Cycles simulated so far, of runs and between them."""
        return self._library.simulation_cycles(self._handle)

    def log_events(self, on: bool = True) -> None:
        """Log what happens from now on, or no more."""
        self._library.simulation_log(self._handle, on)

    def take_log(self) -> np.ndarray:
        """What was logged since the last call: `events.STRETCH` [stretches]."""
        log = np.zeros(self._library.simulation_log_length(self._handle), events.STRETCH)
        self._library.simulation_take_log(self._handle, log.ctypes.data)
        return log

    def reserve(self, size: int) -> None:
        """Make the DRAM at least `size` bytes long; new bytes are 0."""
        if size > self._size:
            self._size = size
            self._library.simulation_resize(self._handle, size)

    def read_register(self, index: int) -> int:
        answer = ctypes.c_uint32()
        self._library.simulation_access(self._handle, 0, index, 0, ctypes.byref(answer))
        self._check()
        return answer.value

    def write_register(self, index: int, value: int) -> None:
        answer = ctypes.c_uint32()
        self._library.simulation_access(self._handle, 1, index, value, ctypes.byref(answer))
        self._check()

    def read_memory(self, address: int, length: int) -> bytes:
        self._require(address, length)
        return ctypes.string_at(self._place(address), length)

    def write_memory(self, address: int, data: bytes) -> None:
        self._require(address, len(data))
        ctypes.memmove(self._place(address), data, len(data))

    def wait_done(self, timeout_s: float) -> None:
        """Simulate until the run is over.

        Raises
        ------
        DeviceError
            Nothing has moved for `stall_cycles` cycles; the message says what each engine did.
        TimeoutError
            `timeout_s` seconds of real time have passed.
        """
        deadline = time.monotonic() + timeout_s
        before, quiet_since = read_counters(self), self.cycles
        while not self._library.simulation_run(self._handle,
                                               min(CHUNK_CYCLES, self.stall_cycles)):
            self._check()
            counters = read_counters(self)
            if _progress(counters) != _progress(before):
                before, quiet_since = counters, self.cycles
            elif self.cycles - quiet_since >= self.stall_cycles:
                raise DeviceError(self._stuck(before, counters))
            if time.monotonic() > deadline:
                raise TimeoutError

    def _stuck(self, before: dict[str, int], counters: dict[str, int]) -> str:
        states = []
        for name in (engine.name.lower() for engine in Engine):
            grown = [state for state in ("stalled", "waiting", "busy")
                     if counters[f"{name}_{state}"] != before[f"{name}_{state}"]]
            words = {"stalled": "stalled on a port", "waiting": "waiting for a token",
                     "busy": "busy"}
            states.append(f"{name} {words[grown[0]] if grown else 'idle'}")
        status = Status(self.read_register(Register.STATUS))
        return (f"A run must make progress within {self.stall_cycles} cycles, but nothing moved: "
                f"STATUS {status!r}, {counters['instructions']} instructions dispatched, "
                f"{', '.join(states)}; counters {counters}")

    def _place(self, address: int) -> int:
        return self._library.simulation_memory(self._handle) + address

    def _require(self, address: int, length: int) -> None:
        if address < 0 or address + length > self._size:
            raise DeviceError(f"Memory accesses must lie in a DRAM of {self._size:#x} bytes, not "
                              f"at {address:#x} to {address + length - 1:#x}")

    def _check(self) -> None:
        if message := self._library.simulation_error(self._handle):
            raise DeviceError(f"Simulated gateware {message.decode()}")


def _progress(counters: dict[str, int]) -> tuple[int, ...]:
    """What grows while a run goes on."""
    return (counters["instructions"], counters["read_beats"], counters["write_beats"], *(
        counters[f"{engine.name.lower()}_busy"] - counters[f"{engine.name.lower()}_stalled"]
        for engine in Engine))


class RtlDevice:
    """A device (see `moeware.runtime.device`): the gateware of `config`, cycle by cycle.

    Frames run back to back without a reset, on DRAM and on-chip memories as the last one left them.

    Parameters
    ----------
    dram, clock_hz, stall_seed, stall_cycles : as of `RtlTarget`.
    verilog, fast, notify : as of `build`.
    log_events : keep the log of each frame of a run in `logs` (see `moeware.sim.events`).

    Raises
    ------
    DeviceError
        The simulation cannot be built, or is not an accelerator.
    """

    name = "rtl"

    def __init__(self, config: Config, *, dram: DramTiming = SDRAM_16BIT, clock_hz: float = 100e6,
                 stall_seed: int | None = None, stall_cycles: int = STALL_CYCLES,
                 verilog: str | None = None, fast: bool = True,
                 notify: Callable[[str], None] = report, log_events: bool = False):
        self.config = config
        self.counters: list[dict[str, int]] = []
        self.logs: list[np.ndarray] = []
        try:
            library = build(config, verilog, fast=fast, notify=notify)
        except VerilateError as error:
            raise DeviceError(f"The RTL device cannot be built: {error}") from error
        self.target = RtlTarget(library, bus_bytes=config.bus_bytes, dram=dram, clock_hz=clock_hz,
                                stall_seed=stall_seed, stall_cycles=stall_cycles)
        self.target.log_events(log_events)
        # The target's own watchdog ends a run that hangs; a long one may take its time.
        self._driver = Driver(self.target, name=self.name, config=config, timeout_s=float("inf"))

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        # The driver writes images in whole units of alignment.
        self.target.reserve(program.dram_bytes + ALIGNMENT)
        results, self.counters = self._driver.run(program, step, inputs, probes=probes,
                                                  progress=progress)
        self.logs = events.runs(self.target.take_log())
        return results
