"""The order of work of the array, and when it may go on."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Opcode
from ..interfaces import fields_layout
from .array import Work

__all__ = ["Issue"]


class Issue(wiring.Component):
    """Walks token groups, within them output groups, within them words: one `Work` per cycle.

    It waits for a filled half of the tile memory, and at the last word of an output group for the
    group's parameters and for the results of the groups before: these must have left the drain
    registers `latency` cycles later, when the new results get there, come what may. So what they
    have still to write must fit into the write-back buffer already (`outstanding <= space`) and
    take no longer than that (`busy_for <= latency`). The array itself never stalls.

    Parameters
    ----------
    latency : `DotArray.latency`
    capacity : most that `space` can be

    Members
    -------
    start : In(1)
        One cycle; `fields` are held until the last group is released.
    fields : In(fields_layout(Opcode.LINEAR))
    filled : In(1)
    counts : In(data.ArrayLayout(range(tokens + 1), 2))
    release : Out(1)
        As in `Fill`.
    ready : In(1)
        One cycle for each output group: its parameters are there.
    tail : In(range(outputs // lanes + 1))
        Parameter words of the last output group; valid when that is `ready`.
    space : In(range(capacity + 1))
        Results that the write-back buffer is sure to take.
    stepped : In(1)
        Results leave the drain registers in this cycle.
    held : In(1)
        Results wait in the drain registers in this cycle.
    work : Out(Work(config))
    weight : Out(20)
        Weight word of `work`.
    """

    def __init__(self, config: Config, latency: int, capacity: int):
        self.config, self.latency = config, latency
        super().__init__({
            "start": In(1),
            "fields": In(fields_layout(Opcode.LINEAR)),
            "filled": In(1),
            "counts": In(data.ArrayLayout(range(config.tokens + 1), 2)),
            "release": Out(1),
            "ready": In(1),
            "tail": In(range(config.outputs // config.lanes + 1)),
            "space": In(range(capacity + 1)),
            "stepped": In(1),
            "held": In(1),
            "work": Out(Work(config)),
            "weight": Out(20),
        })

    def elaborate(self, platform):
        m = Module()
        config, fields = self.config, self.fields
        words = config.outputs // config.lanes
        most_steps = config.tokens * words

        half, filled, ready = Signal(), Signal(range(3)), Signal(14)
        word, address, left = Signal(13), Signal(range(2 * config.row_words)), Signal(16)
        last_group, issue, complete = Signal(), Signal(), Signal()

        # Steps in which the results of an output group leave, for either half.
        full_steps = [Signal(range(most_steps + 1), name=f"full_steps_{i}") for i in range(2)]
        tail_steps = [Signal(range(most_steps + 1), name=f"tail_steps_{i}") for i in range(2)]
        for i in range(2):
            m.d.sync += [full_steps[i].eq(_times(self.counts[i], words)),
                         tail_steps[i].eq(_times(self.counts[i], self.tail))]
        steps = Signal(range(most_steps + 1))
        m.d.comb += steps.eq(Mux(last_group, Mux(half, tail_steps[1], tail_steps[0]),
                                 Mux(half, full_steps[1], full_steps[0])))

        busy_for = Signal(range(self.latency + most_steps + 1))
        outstanding = Signal(range(self.latency + most_steps + 1))
        m.d.comb += [
            self.work.enable.eq(issue), self.work.first.eq(word == 0),
            self.work.last.eq(word + 1 == fields.source_words), self.work.address.eq(address),
            last_group.eq(left <= config.outputs),
            issue.eq((filled != 0) & (~self.work.last | (
                (ready != 0) & (busy_for <= self.latency) & (outstanding <= self.space)))),
            complete.eq(issue & self.work.last),
            self.release.eq(complete & last_group),
        ]
        m.d.sync += [
            filled.eq(filled + self.filled - self.release),
            ready.eq(ready + self.ready - complete),
            outstanding.eq(outstanding + Mux(complete, steps, 0) - self.stepped),
        ]
        with m.If(complete):
            m.d.sync += busy_for.eq(self.latency + steps - 1)
        with m.Elif((busy_for != 0) & ~self.held):
            m.d.sync += busy_for.eq(busy_for - 1)

        base = Mux(half, config.row_words, 0)
        other_base = Mux(half, 0, config.row_words)
        with m.If(issue):
            m.d.sync += [word.eq(word + 1), address.eq(address + 1),
                         self.weight.eq(self.weight + 1)]
            with m.If(self.work.last):
                m.d.sync += [word.eq(0), address.eq(base), left.eq(left - config.outputs)]
                with m.If(last_group):
                    m.d.sync += [half.eq(~half), address.eq(other_base), left.eq(fields.channels),
                                 self.weight.eq(fields.weight)]
        with m.If(self.start):
            m.d.sync += [half.eq(0), address.eq(0), word.eq(0), left.eq(fields.channels),
                         self.weight.eq(fields.weight)]
        return m


def _times(number, factor):
    """A product of small numbers by additions, so that no multiplier block is spent on it."""
    if isinstance(factor, int):
        return sum((number << bit for bit in range(factor.bit_length()) if factor >> bit & 1), 0)
    return sum(Mux(factor[bit], number << bit, 0) for bit in range(len(factor)))
