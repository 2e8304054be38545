"""The accelerators that benchmarks measure, each with its memory and clock: defined here alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeware.hw.arch.config import Config
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT, DramTiming

__all__ = ["TARGETS", "Target", "gemm_target", "in_flight"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """An accelerator in its surroundings.

    clock_hz : assumed where the text says so; text : conditions, for beside every figure; bits : of
    weights, as the compiler takes them.
    """

    name: str
    config: Config
    dram: DramTiming
    clock_hz: float
    text: str
    bits: Mapping[str, int] = field(default_factory=dict)


def _with_narrow_experts(target: Target) -> Target:
    """The same with a linear unit that takes two 4-bit weights to a multiplier, and such experts."""
    return replace(target, name=f"{target.name}-int4", text=f"{target.text}; experts of 4 bits",
                   config=replace(target.config, narrow=1), bits={"experts": 4})


_INT8 = (
    Target(
        name="ecp5-85f", clock_hz=100e6, dram=SDRAM_16BIT,
        text="ECP5-85F size: 16-bit SDRAM at 133 MHz",
        config=Config(tokens=4, outputs=4, depth=8, queries=4, lanes=4, bus_bytes=8,
                      activation_banks=4, activation_words=4096, residual_words=8192,
                      weight_words=1024, param_words=512, tables=4, row_words=96, max_rows=256,
                      max_experts=16, max_chosen=2, queue=8)),
    # 22 query rows take the 129 rows of the reference model in 6 groups with 3 places to spare, and
    # balance attention against QKV and projection. The memories named here fit into 230 of the ZCU102's
    # 912 block RAMs (of 512 x 72 bits).
    Target(
        name="zcu102", clock_hz=200e6, dram=DDR,
        text="ZCU102 size, not synthesised: DDR4 with 19.2 GB/s",
        config=Config(tokens=4, outputs=32, depth=16, queries=22, lanes=16, bus_bytes=128,
                      activation_banks=4, activation_words=4096, residual_words=4096,
                      weight_words=1024, param_words=512, tables=4, row_words=96, max_rows=256,
                      max_experts=16, max_chosen=2, queue=16)),
)
TARGETS = {target.name: target for plain in _INT8
           for target in (plain, _with_narrow_experts(plain))}


def in_flight(target: Target, frames: int, rows: int, channels: int) -> Target:
    """The same with room for frames in flight: the stream of each, of `rows` x `channels`, queues that
    hold the rows of all, and as many times the activations; else products would be done in parts, with
    their weights loaded again for each."""
    config = target.config
    words = frames * rows * -(-channels // config.lanes)
    more = {"activation_words": frames * config.activation_words,
            "max_rows": max(config.max_rows, frames * rows),
            "residual_words": max(config.residual_words, words)}
    return replace(target, config=replace(config, **more))


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
