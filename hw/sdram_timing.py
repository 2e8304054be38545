"""Timing and geometry of a single-data-rate SDRAM chip, in nanoseconds and in clock cycles."""

import dataclasses
import math

__all__ = ["SDRAMCycles", "SDRAMTiming"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDRAMTiming:
    """Data-sheet values of a 16-bit SDRAM.

    The defaults are the slowest of MT48LC16M16A2-75, IS42S16160G-7 and W9825G6KH-6 (32 MB each),
    so any of them works on a board that was fitted with another.
    """

    rcd_ns: float = 20  # ACTIVATE to READ or WRITE
    rp_ns: float = 20  # PRECHARGE to ACTIVATE
    ras_ns: float = 45  # ACTIVATE to PRECHARGE
    ras_max_ns: float = 100_000  # longest time that a row may stay open
    rc_ns: float = 67.5  # ACTIVATE to ACTIVATE of the same bank
    rfc_ns: float = 67.5  # REFRESH to any command
    rrd_ns: float = 15  # ACTIVATE to ACTIVATE of another bank
    wr_ns: float = 15  # last written word to PRECHARGE
    wr_cycles: int = 2  # the same rule's other half: whichever is longer
    mode_cycles: int = 2  # MODE REGISTER SET to any command
    power_up_ns: float = 200_000  # stable clock to first command
    power_up_refreshes: int = 8
    refresh_ns: float = 64e6  # every row once in this time
    cas2_ns: float = 10  # shortest clock period with CAS latency 2; below it the latency is 3
    period_ns: float = 7.5  # shortest clock period of all
    bank_bits: int = 2
    row_bits: int = 13
    column_bits: int = 9

    @property
    def row_bytes(self) -> int:
        return 2 << self.column_bits

    @property
    def size_bytes(self) -> int:
        return self.row_bytes << (self.row_bits + self.bank_bits)

    @property
    def refresh_interval_ns(self) -> float:
        return self.refresh_ns / (1 << self.row_bits)

    def cycles(self, clock_hz: float) -> "SDRAMCycles":
        """The same rules in cycles of the chip's clock, which has `clock_hz`.

        Raises
        ------
        ValueError
            A clock outside 20 MHz to the chip's limit.
        """
        period = 1e9 / clock_hz
        if not self.period_ns - 1e-6 <= period <= 50:
            raise ValueError(f"SDRAM clock must be between 20 MHz and {1e3 / self.period_ns:.0f} "
                             f"MHz, not {clock_hz / 1e6:g} MHz. Choose another system clock "
                             f"or rate.")

        def at_least(ns: float) -> int:
            return max(1, math.ceil(ns / period - 1e-6))

        return SDRAMCycles(
            rcd=at_least(self.rcd_ns), rp=at_least(self.rp_ns), ras=at_least(self.ras_ns),
            rc=at_least(self.rc_ns), rfc=at_least(self.rfc_ns), rrd=at_least(self.rrd_ns),
            wr=max(self.wr_cycles, at_least(self.wr_ns)), mode=self.mode_cycles,
            power_up=at_least(self.power_up_ns), cas=2 if period >= self.cas2_ns - 1e-6 else 3,
            refresh_interval=math.floor(self.refresh_interval_ns / period))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDRAMCycles:
    """`SDRAMTiming` in cycles of the chip's clock; `cas` is the CAS latency."""

    rcd: int
    rp: int
    ras: int
    rc: int
    rfc: int
    rrd: int
    wr: int
    mode: int
    power_up: int
    cas: int
    refresh_interval: int
