"""Radiona ULX3S with an ECP5-85F: 25 MHz oscillator, 32 MB SDRAM, FT231X serial bridge."""

from amaranth_boards.ulx3s import ULX3S_85F_Platform
from moeware.hw.sdram_timing import SDRAMTiming

from .board import Board

__all__ = ["ULX3S_85F"]

ULX3S_85F = Board(
    name="ulx3s-85f",
    platform=ULX3S_85F_Platform,
    programmer="ulx3s",
    oscillator_hz=25_000_000,
    clock_hz=50_000_000,
    baud=3_000_000,
    sdram=SDRAMTiming(),  # boards carry MT48LC16M16, IS42S16160 or W9825G6
)
