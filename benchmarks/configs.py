"""The accelerators that benchmarks measure, each with its memory and clock: defined here alone."""

from dataclasses import dataclass

from moeware.hw.arch.config import Config
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT, DramTiming

__all__ = ["TARGETS", "Target", "gemm_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """An accelerator in its surroundings.

    clock_hz : assumed where the text says so; text : conditions, for beside every figure.
    """

    name: str
    config: Config
    dram: DramTiming
    clock_hz: float
    text: str


TARGETS = {target.name: target for target in (
    Target(
        name="ecp5-85f", clock_hz=100e6, dram=SDRAM_16BIT,
        text="ECP5-85F size: 16-bit SDRAM at 133 MHz",
        config=Config(tokens=4, outputs=4, depth=8, queries=4, lanes=4, bus_bytes=8,
                      activation_banks=4, activation_words=4096, residual_words=8192,
                      weight_words=1024, param_words=512, tables=4, row_words=96, max_rows=256,
                      max_experts=16, max_chosen=2, queue=8)),
    # 22 query rows take the 129 rows of the reference model in 6 groups with 3 places to spare, and
    # balance attention against QKV and projection. Memories, packed into 36 Kbit blocks of 512 x 72,
    # take about half of the ZCU102's 912.
    Target(
        name="zcu102", clock_hz=200e6, dram=DDR,
        text="ZCU102 size, not synthesised: DDR4 with 19.2 GB/s",
        config=Config(tokens=4, outputs=32, depth=16, queries=22, lanes=16, bus_bytes=128,
                      activation_banks=4, activation_words=4096, residual_words=4096,
                      weight_words=1024, param_words=512, tables=4, row_words=96, max_rows=256,
                      max_experts=16, max_chosen=2, queue=16)),
)}


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
        name=f"gemm-{multipliers}-{bus_bits}", clock_hz=100e6, dram=IDEAL,
        text=f"{multipliers} multipliers, {bus_bits}-bit bus, one bus word a cycle",
        config=Config(**shape, queries=1, bus_bytes=bus_bits // 8, activation_banks=4,
                      activation_words=2048, residual_words=4, weight_words=256, param_words=256,
                      tables=1, row_words=16, max_rows=128, max_experts=2, max_chosen=1, queue=8))
