"""Bus words to and from the data pins of an SDRAM chip, burst by burst."""

from amaranth import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .sdram_pins import INPUT_CYCLES, OUTPUT_CYCLES

__all__ = ["WordPath"]


class WordPath(wiring.Component):
    """Moves words between their queues and the pins, when a READ or WRITE was chosen.

    A word is `parts` bursts of `burst` columns, the lowest first. Bursts start with a cycle and
    fill it. Nothing stalls: who chooses a command has words, or room for them.

    Parameters
    ----------
    parts : bursts of a word; burst : columns of one; rate : columns of a cycle, 1 or 2.
    captured : chip clocks from the start of the cycle in which a READ is at the pads to the first
        column's capture, a multiple of `rate`.

    Members
    -------
    read : In(1)
    write : In(1)
        Chosen in this cycle.
    part : In(range(parts))
        The burst of its word that was chosen.
    free : In(1)
        As of now, the burst chosen before this cycle has left the pins in the next one.
    word_in : In(16 * burst * parts)
        The first word that is to be written.
    taken : Out(1)
        Its last burst is on its way: another one, from the next cycle on.
    word_out : Out(16 * burst * parts)
    arrived : Out(1)
        `word_out` was read.
    dq_o : Out(16 * rate)
    dq_oe : Out(1)
    dq_i : In(16 * rate)
        As in `SDRAMPins`.
    """

    def __init__(self, parts: int, burst: int, rate: int, captured: int):
        self._parts, self._burst, self._rate, self._captured = parts, burst, rate, captured
        super().__init__({
            "read": In(1), "write": In(1), "part": In(range(parts)), "free": In(1),
            "word_in": In(16 * burst * parts), "taken": Out(1),
            "word_out": Out(16 * burst * parts), "arrived": Out(1),
            "dq_o": Out(16 * rate), "dq_oe": Out(1), "dq_i": In(16 * rate),
        })

    def elaborate(self, platform):
        m = Module()
        burst, rate = self._burst, self._rate

        out = Signal(16 * burst)
        part, starts, ends = Signal.like(self.part), Signal(), Signal()
        m.d.comb += self.dq_o.eq(out[:16 * rate])
        m.d.sync += [part.eq(self.part), starts.eq(self.write), ends.eq(self.free),
                     self.taken.eq(self.write & self.part.all())]
        with m.If(starts):
            m.d.sync += [out.eq(self.word_in.word_select(part, len(out))), self.dq_oe.eq(1)]
        with m.Else():
            m.d.sync += out.eq(out >> 16 * rate)
            with m.If(ends):
                m.d.sync += self.dq_oe.eq(0)

        # From the choice of a READ to its last columns in `dq_i`: two cycles to the pins, the way
        # out, chip and burst less the cycle of the last columns, the way in.
        arriving = Signal(2 + OUTPUT_CYCLES[rate] + (self._captured + burst) // rate - 1
                          + INPUT_CYCLES[rate])
        earlier = Signal(16 * (burst - rate))  # columns of the burst before the present ones
        columns = Cat(earlier, self.dq_i)
        parts = Signal(range(self._parts))  # of the word that came before
        m.d.sync += [
            arriving.eq(Cat(self.read, arriving)),
            earlier.eq(columns[16 * rate:]),
            self.arrived.eq(arriving[-1] & (parts == self._parts - 1)),
        ]
        with m.If(arriving[-1]):
            m.d.sync += [self.word_out.eq(Cat(self.word_out, columns)[len(columns):]),
                         parts.eq(parts + 1)]
        return m
