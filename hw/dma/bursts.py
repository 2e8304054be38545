"""From a run of memory words to bursts."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Memory
from ..ports import Burst
from .geometry import geometries
from .unpack import Arrival

__all__ = ["BurstSplitter", "Transfer", "ceil_divide", "longest_burst"]

PAGE_BYTES = 4096  # no burst crosses a multiple of it
LONGEST = 64  # beats: long enough to hide a command's cost, short enough to share the bus


def longest_burst(config: Config) -> int:
    """Beats of a full burst: a power of two whose bytes divide a page."""
    return min(LONGEST, PAGE_BYTES // config.bus_bytes)


def ceil_divide(value: Value, divisor: int) -> Value:
    """``ceil(value / divisor)`` of a value of up to 20 bits, without a divider.

    For n below 2**21 and d up to 64, ``floor(n / d) == n * ceil(2**27 / d) >> 27``: the factor is
    too large by less than d / 2**27 of itself, which moves no quotient past the next integer.
    """
    if divisor & (divisor - 1) == 0:
        return (value + (divisor - 1)) >> (divisor.bit_length() - 1)
    return ((value + (divisor - 1)) * -(-(1 << 27) // divisor)) >> 27


class Transfer(data.Struct):
    """Words of one memory that lie in DRAM from `address` (bytes) on, perhaps packed (LOAD.packed)."""

    memory: 3
    words: 20
    address: 32
    packed: 2


class BurstSplitter(wiring.Component):
    """Cuts transfers into bursts.

    Bursts end at multiples of the longest burst, so only the first and the last are short and none
    crosses a page. The first burst comes three cycles after its transfer, then one every other
    cycle, which is faster than any bus takes full ones; those of a packed transfer come a cycle later.
    A transfer without words has no bursts.

    Members
    -------
    transfer : In(stream.Signature(Transfer))
        Taken when the bursts of the last one are out.
    bursts : Out(stream.Signature(Burst))
    arrivals : Out(stream.Signature(Arrival(config), always_ready=True))
        Of each transfer with words, before its first burst.
    """

    def __init__(self, config: Config, memories: list[Memory]):
        super().__init__({
            "transfer": In(stream.Signature(Transfer)),
            "bursts": Out(stream.Signature(Burst)),
            "arrivals": Out(stream.Signature(Arrival(config), always_ready=True)),
        })
        self.config, self.memories = config, memories

    def elaborate(self, platform):
        m = Module()
        shift = self.config.bus_bytes.bit_length() - 1
        longest = longest_burst(self.config)
        low = longest.bit_length() - 1
        taken = Signal(Transfer)
        beat = Signal(32 - shift)  # address in bus words
        left = Signal(32 - shift + 1)
        length = Signal(low + 1)

        m.d.comb += [self.arrivals.p.packed.eq(taken.packed), self.arrivals.p.beats.eq(left)]
        m.d.sync += self.arrivals.valid.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.transfer.ready.eq(1)
                m.d.sync += [taken.eq(self.transfer.payload)]
                with m.If(self.transfer.valid):
                    m.next = "COUNT"
            with m.State("COUNT"):
                m.d.sync += [beat.eq(taken.address >> shift),
                             self.arrivals.valid.eq(taken.words != 0)]
                with m.Switch(taken.memory):
                    for memory, geometry in geometries(self.config, self.memories).items():
                        with m.Case(memory):
                            m.d.sync += left.eq(ceil_divide(taken.words, geometry.per_beat)
                                                * geometry.beats_each)
                m.next = "CUT"
                with m.If(taken.packed != 0):
                    m.next = "PACK"
            with m.State("PACK"):
                pairs = taken.packed[0]  # not fours
                filled = left + Mux(pairs, 1, 3)
                m.d.sync += left.eq(Mux(pairs, filled >> 1, filled >> 2))
                m.next = "CUT"
            with m.State("CUT"):
                room = longest - beat[:low]
                m.d.sync += length.eq(Mux(left > room, room, left))
                m.next = "SEND"
                with m.If(left == 0):
                    m.next = "IDLE"
            with m.State("SEND"):
                m.d.comb += self.bursts.valid.eq(1)
                with m.If(self.bursts.ready):
                    m.d.sync += [left.eq(left - length), beat.eq(beat + length)]
                    m.next = "CUT"
        m.d.comb += [self.bursts.p.address.eq(beat << shift), self.bursts.p.beats.eq(length)]
        return m
