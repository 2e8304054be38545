"""The memory and the clock that cycles are counted with, as options of commands."""

__all__ = ["add_memory_options", "find_dram"]

MEMORIES = {"ideal": "IDEAL", "sdram": "SDRAM_16BIT", "ddr": "DDR"}


def add_memory_options(parser, purpose: str) -> None:
    parser.add_argument("--dram", default="sdram", choices=list(MEMORIES),
                        help=f"memory, for {purpose} (default: sdram, of 16 bits at 133 MHz)")
    parser.add_argument("--clock-mhz", type=float, default=100.0, metavar="MHZ",
                        help=f"clock of the accelerator, for {purpose} (default: 100)")


def find_dram(name: str):
    """The `moeware.sim.dram.DramTiming` of an option's value."""
    from moeware.sim import dram
    return getattr(dram, MEMORIES[name])
