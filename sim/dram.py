"""Timing of the DRAM that simulated gateware sees: parameters of the model in dram.h."""

import ctypes
import dataclasses
import math

__all__ = ["DDR", "IDEAL", "SDRAM_16BIT", "DramTiming"]


class DramCycles(ctypes.Structure):
    """`DramTiming` in cycles of the accelerator's clock, as dram.h has it."""

    _fields_ = [(name, ctypes.c_uint32) for name in (
        "bus_bytes", "rate", "read_latency", "write_latency", "activate", "precharge", "turnaround",
        "refresh_interval", "refresh", "banks", "row_bytes")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DramTiming:
    """A memory and its controller, in nanoseconds.

    Each bank has one open row; the rows of consecutive addresses lie in consecutive banks, and the
    next row that is asked for opens while another bank transfers. One bus word moves per cycle at
    most.

    Raises
    ------
    ValueError
        A number of banks or bytes that no memory has.
    """

    bytes_per_second: float  # peak of the data bus
    read_latency_ns: float  # open row: from the command to the word at the accelerator
    write_latency_ns: float  # from the last word on the data bus to `written`
    activate_ns: float = 0  # opens a row (tRCD)
    precharge_ns: float = 0  # closes a row (tRP)
    turnaround_ns: float = 0  # between reading and writing
    refresh_interval_ns: float = 0  # tREFI; 0: no refresh
    refresh_ns: float = 0  # tRFC
    banks: int = 4
    row_bytes: int = 1024

    def __post_init__(self):
        if not 1 <= self.banks <= 64:
            raise ValueError(f"DramTiming.banks must be between 1 and 64, not {self.banks}")
        if self.row_bytes < 64 or self.row_bytes & (self.row_bytes - 1):
            raise ValueError("DramTiming.row_bytes must be a power of two from 64 on, not "
                             f"{self.row_bytes}")

    def bytes_per_cycle(self, bus_bytes: int, clock_hz: float) -> float:
        """Peak at a bus of `bus_bytes` and the accelerator's clock."""
        return min(self.bytes_per_second / clock_hz, bus_bytes)

    def cycles(self, bus_bytes: int, clock_hz: float) -> DramCycles:
        """The same in whole cycles, rounded up."""
        def cycles(ns: float) -> int:
            return math.ceil(ns * clock_hz / 1e9 - 1e-9)

        return DramCycles(
            bus_bytes=bus_bytes, rate=round(256 * self.bytes_per_cycle(bus_bytes, clock_hz)),
            read_latency=cycles(self.read_latency_ns), write_latency=cycles(self.write_latency_ns),
            activate=cycles(self.activate_ns), precharge=cycles(self.precharge_ns),
            turnaround=cycles(self.turnaround_ns),
            refresh_interval=math.floor(self.refresh_interval_ns * clock_hz / 1e9),
            refresh=cycles(self.refresh_ns), banks=self.banks, row_bytes=self.row_bytes)


# A bus word each cycle after one cycle: what an on-chip memory would be.
IDEAL = DramTiming(bytes_per_second=math.inf, read_latency_ns=0, write_latency_ns=0)

# 16-bit SDR SDRAM at 133 MHz, 32 MB (Winbond W9825G6KH, Micron MT48LC16M16A2-75 data sheets):
# tRCD = tRP = 20 ns, tRFC 67.5 ns, 8,192 refreshes in 64 ms, CAS latency 3 (22.5 ns), 4 banks of
# 1 KiB rows; tWR 15 ns. Assumed: 45 ns for a read and 22.5 ns for a write in the controller and the IO
# registers, and CAS latency plus one clock to turn the bus around.
SDRAM_16BIT = DramTiming(
    bytes_per_second=2 * 133e6, read_latency_ns=22.5 + 45, write_latency_ns=15 + 22.5,
    activate_ns=20, precharge_ns=20, turnaround_ns=30, refresh_interval_ns=7812.5, refresh_ns=67.5,
    banks=4, row_bytes=1024)

# 64-bit DDR4-2400 (JEDEC JESD79-4, speed bin 2400T with CL = tRCD = tRP = 17 clocks of 0.833 ns,
# 8 Gb chips with tRFC1 = 350 ns and tREFI = 7.8 us, 16 banks, 1 KiB pages on 8 chips): 19.2 GB/s.
# Assumed: 100 ns for a read and 50 ns for a write in a hard controller and its AXI port, and 12 ns
# for a turnaround (tWTR_L 7.5 ns and a burst).
DDR = DramTiming(
    bytes_per_second=19.2e9, read_latency_ns=14.2 + 100, write_latency_ns=15 + 50,
    activate_ns=14.2, precharge_ns=14.2, turnaround_ns=12, refresh_interval_ns=7800, refresh_ns=350,
    banks=16, row_bytes=8192)
