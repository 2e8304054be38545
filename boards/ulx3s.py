"""Radiona ULX3S with an ECP5-85F: 25 MHz oscillator, 32 MB SDRAM, FT231X serial bridge."""

from amaranth_boards.ulx3s import ULX3S_85F_Platform

from moeware.hw.arch.config import Config
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
    # Of the device's 156 multipliers 64 are for the linear unit, 32 for attention, most of the rest
    # for scaling, normalisation and routing. Memories take a third of the block RAM.
    config=Config(tokens=2, outputs=4, depth=8, queries=2, lanes=2, bus_bytes=8,
                  activation_banks=4, activation_words=1024, residual_words=4096,
                  weight_words=1024, param_words=512, tables=4, row_words=128, max_rows=256,
                  max_experts=16, max_chosen=4, queue=4),
)
