"""Radiona ULX3S with an ECP5-85F: 25 MHz oscillator, 32 MB SDRAM, FT231X serial bridge."""

import dataclasses

from amaranth_boards.ulx3s import ULX3S_85F_Platform

from moeware.hw.arch.config import Config
from moeware.hw.sdram_timing import SDRAMTiming

from .board import Board

__all__ = ["ULX3S_85F", "ULX3S_85F_LANGUAGE", "ULX3S_85F_LARGE"]

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
                  max_experts=16, max_chosen=4, queue=8),
)

# The same board for language models: what their gated layers, rotary embeddings and routers need, and
# residual memory for the factors of positions.
ULX3S_85F_LANGUAGE = dataclasses.replace(
    ULX3S_85F, name="ulx3s-85f-language",
    config=dataclasses.replace(ULX3S_85F.config, residual_words=8192, products=1, rotary=1,
                               router_forms=1),
)

# The same board as full as it gets: M3ViT-tiny, or two of its frames, in on-chip memories. The linear
# unit takes 128 of the multipliers, scaling, normalisation and routing most of the rest, so those of
# attention are made of look-up tables.
ULX3S_85F_LARGE = dataclasses.replace(
    ULX3S_85F, name="ulx3s-85f-large", clock_hz=66_666_667, sdram_rate=2, seed=1,
    fabric=("attention",),
    config=Config(tokens=4, outputs=4, depth=8, queries=4, lanes=2, bus_bytes=8,
                  activation_banks=4, activation_words=5632, residual_words=24832,
                  weight_words=1024, param_words=512, tables=4, row_words=96, max_rows=260,
                  max_experts=16, max_chosen=2, queue=8),
)
