"""The accelerators that benchmarks measure, each with its memory and clock: defined here alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from record import RESULTS

from moeware.boards import BOARDS
from moeware.hw.arch.config import Config
from moeware.hw.sdram import SDRAMController
from moeware.hw.sdram_pins import INPUT_CYCLES, OUTPUT_CYCLES
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT, DramTiming

__all__ = ["TARGETS", "Target", "gemm_target", "in_flight"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """An accelerator in its surroundings.

    clock_hz : of the accelerator; clock : where that is from; text : conditions, for beside every
    figure; bits : of weights, as the compiler takes them; flight : fields of the configuration that
    hold two frames.
    """

    name: str
    config: Config
    dram: DramTiming
    clock_hz: float
    text: str
    clock: str = "assumed"
    flight: Mapping[str, int]
    bits: Mapping[str, int] = field(default_factory=dict)


# What `bitstream.py ulx3s-85f-large` has placed and routed, at the clock that it reached.
_LARGE = BOARDS["ulx3s-85f-large"]
_ROUTED = json.loads((RESULTS / f"bitstream-{_LARGE.name}.json").read_text())
_REACHED_HZ = 1e6 * _ROUTED["figures"]["clock `$glbnet$clk` reached, MHz"]
# Cycles from a read command to its first word, as `hw.sdram` states them for an open row, CAS latency
# 3 and capture after 2 cycles of the chip, and those of the four register slices of `hw.system`.
_READ_CYCLES = (SDRAMController.LATENCY + OUTPUT_CYCLES[_LARGE.sdram_rate]
                + INPUT_CYCLES[_LARGE.sdram_rate]
                + -(-(3 + 2 - 1 + _LARGE.config.bus_bytes // 2) // _LARGE.sdram_rate) + 4)
_INT8 = (
    # The chip at 133 MHz, no faster than the controller would clock it.
    Target(
        name="ecp5-85f", clock_hz=_REACHED_HZ, clock="as placed and routed",
        dram=replace(SDRAM_16BIT, read_latency_ns=_READ_CYCLES * 1e9 / _REACHED_HZ),
        text=f"ECP5-85F, the configuration {_LARGE.name}: 16-bit SDRAM at 133 MHz",
        config=_LARGE.config, flight={}),
    # A head of 64 channels is 4 output groups, as many as tokens, so that fetching rows is hidden.
    # Without narrow weights two tokens share a DSP48E2. Experts of 4 bits then save bytes on the bus and
    # no products, but the largest array for narrow weights that fits, of 3 tokens, or of 4 with 8
    # queries, is slower by the compiler's estimate.
    Target(
        name="zcu102", clock_hz=200e6, dram=DDR,
        text="ZCU102 size: DDR4 with 19.2 GB/s",
        config=Config(tokens=4, outputs=16, depth=32, queries=22, lanes=16, bus_bytes=128,
                      activation_banks=4, activation_words=2048, residual_words=4096,
                      weight_words=1024, param_words=512, tables=4, row_words=48,
                      max_rows=260, max_experts=16, max_chosen=2, queue=16),
        flight={"activation_words": 4096}),
)
TARGETS = {target.name: target for plain in _INT8
           for target in (plain, replace(plain, name=f"{plain.name}-int4", bits={"experts": 4},
                                         text=f"{plain.text}; experts of 4 bits"))}


def in_flight(target: Target) -> Target:
    """The same with memories for two frames in flight."""
    return replace(target, config=replace(target.config, **target.flight))


def gemm_target(multipliers: int, bus_bits: int) -> Target:
    """A linear unit of 16 or 64 multipliers with a memory that moves a bus word each cycle; the
    attention unit is as small as it can be.

    Raises
    ------
    KeyError
        Another number of multipliers.
    """
    shape = {16: dict(tokens=1, outputs=2, depth=8, lanes=2),
             64: dict(tokens=2, outputs=4, depth=8, lanes=4)}[multipliers]
    return Target(
        name=f"gemm-{multipliers}-{bus_bits}", flight={}, clock_hz=100e6, dram=IDEAL,
        text=f"{multipliers} multipliers, {bus_bits}-bit bus, one bus word a cycle",
        config=Config(**shape, queries=1, bus_bytes=bus_bits // 8, activation_banks=4,
                      activation_words=2048, residual_words=4, weight_words=256, param_words=256,
                      tables=1, row_words=16, max_rows=128, max_experts=2, max_chosen=1, queue=8))
