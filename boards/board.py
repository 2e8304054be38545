"""What a board file says about its board."""

import dataclasses
from collections.abc import Callable

from amaranth.build import Platform

from moeware.hw.arch.config import Config
from moeware.hw.sdram_timing import SDRAMTiming

__all__ = ["Board", "PinTiming"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinTiming:
    """Delays between the flip-flops of the FPGA's IO cells and the SDRAM, in ns.

    The chip's are from its data sheet; the FPGA's are rounded from its data sheet, with the traces
    in them, and were not measured.
    """

    output_ns: float = 3.0  # clock edge to pad at the latest, the clock pin included
    output_min_ns: float = 2.0
    output_skew_ns: float = 0.5  # between any two pins
    input_ns: float = 1.0  # pad to flip-flop, its setup included
    access_ns: float = 6.0  # chip: clock to data
    hold_ns: float = 2.5  # chip: clock to the end of the data before
    chip_setup_ns: float = 1.5
    chip_hold_ns: float = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """A board with an FPGA, an SDRAM and a serial line.

    platform : makes the Amaranth platform, whose resources are called as `top.BoardTop` asks for.
    programmer : the board's name for openFPGALoader.
    sdram_rate : clocks of the SDRAM in a system clock, 1 or 2.
    clock_hz : system clock unless the build asks for another.
    config : the accelerator unless the build asks for another.
    seed : of the placement that `build` tries first, one that is known to reach the clock.
    fabric : units whose products are made of look-up tables, as of `Accelerator`, where the DSP
        blocks do not suffice for all.
    """

    name: str
    platform: Callable[[], Platform]
    programmer: str
    oscillator_hz: int
    clock_hz: int
    baud: int
    sdram: SDRAMTiming
    config: Config
    sdram_rate: int = 1
    seed: int = 1
    fabric: tuple[str, ...] = ()
    pins: PinTiming = PinTiming()

    @property
    def memory_bytes(self) -> int:
        return self.sdram.size_bytes
