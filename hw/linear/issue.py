"""The order of work of the array, and when it may go on."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Target
from .array import Work
from .jobs import job_layout, per_group

__all__ = ["Issue"]


class Issue(wiring.Component):
    """Walks instructions, within them token groups, within them output groups, within them words:
    one `Work` per cycle, also from instruction to instruction. Only an instruction of a single word
    takes a cycle more.

    It waits for a filled half of the tile memory, and at the last word of an output group for the
    group's parameters and for the results of the groups before: these must have left the drain
    registers when the new results get there, `DotArray.latency` cycles later, come what may. So all
    that was issued must fit into the write-back buffer already (`slack >= 0`), and what is left of
    it in the drain registers by then must be nothing (`late == 0`). The array itself never stalls.
    The results of an instruction for the router also wait until all before are written.

    Parameters
    ----------
    capacity : results that the write-back buffer takes

    Members
    -------
    jobs : In(stream.Signature(job_layout(config, *JOB)))
    filled : In(1)
    counts : In(data.ArrayLayout(range(tokens + 1), 2))
    ends : In(2)
    release : Out(1)
        As in `Fill`.
    ready : In(1)
    tails : In(stream.Signature(range(most + 1)))
        As in `Parameters`.
    written : In(2)
        Results that left the write-back buffer.
    held : In(1)
        Results wait in the drain registers in this cycle.
    work : Out(Work(config))
    weight : Out(20)
        Weight word of `work`.
    """

    JOB = ("source_words", "weight", "channels", "target", "narrow")

    def __init__(self, config: Config, capacity: int):
        self.config, self.capacity = config, capacity
        most = (config.outputs // config.lanes) << config.narrow
        super().__init__({
            "jobs": In(stream.Signature(job_layout(config, *self.JOB))),
            "filled": In(1),
            "counts": In(data.ArrayLayout(range(config.tokens + 1), 2)),
            "ends": In(2),
            "release": Out(1),
            "ready": In(1),
            "tails": In(stream.Signature(range(most + 1))),
            "written": In(2),
            "held": In(1),
            "work": Out(Work(config)),
            "weight": Out(20),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self.config, self.jobs.payload
        words = config.outputs // config.lanes
        most_steps = config.tokens * words << config.narrow

        half, filled, ready = Signal(), Signal(range(3)), Signal(14)
        word, address, left = Signal(13), Signal(range(2 * config.row_words)), Signal(16)
        # Flags stand beside the counters that they speak of, so that no path begins with a
        # comparison: whether the word or group is the last one, and whether it is the only one.
        last_word, last_group, only_word, only_group = Signal(), Signal(), Signal(), Signal()
        issue, complete = Signal(), Signal()

        held = Signal(job.shape())  # the instruction in work
        active, alone, finish, load = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [finish.eq(self.release & self.ends.bit_select(half, 1)),
                     self.jobs.ready.eq(~active | finish), self.tails.ready.eq(finish),
                     load.eq(self.jobs.valid & self.jobs.ready)]
        outputs = per_group(config, held, config.outputs)

        # Steps in which the results of an output group leave, for either half.
        full_steps = [Signal(range(most_steps + 1), name=f"full_steps_{i}") for i in range(2)]
        tail_steps = [Signal(range(most_steps + 1), name=f"tail_steps_{i}") for i in range(2)]
        for i in range(2):
            m.d.sync += [full_steps[i].eq(_times(self.counts[i], words)),
                         tail_steps[i].eq(_times(self.counts[i], self.tails.payload))]
        steps = Signal(range(most_steps + 1))
        full = Mux(half, full_steps[1], full_steps[0])
        if config.narrow:
            full = Mux(held.narrow, full << 1, full)
        m.d.comb += steps.eq(Mux(last_group, Mux(half, tail_steps[1], tail_steps[0]), full))

        # Room in the write-back buffer less what is on its way there; steps of the last group issued
        # that the next one's results would meet in the drain registers.
        slack = Signal(range(-2 * most_steps, self.capacity + 1), init=self.capacity)
        late = Signal(range(most_steps))
        some_ready, punctual = Signal(), Signal(init=1)  # ready is not 0, late is
        written_all = Signal()  # slack == capacity, as of a cycle ago
        # Results of another output group may come. Known a cycle late, of what only the last word of a
        # group takes back; by then `alone` and `tail_steps` are those of a new instruction, too.
        free = Signal()
        m.d.comb += [
            self.work.enable.eq(issue), self.work.first.eq(word == 0),
            self.work.last.eq(last_word), self.work.address.eq(address),
            issue.eq(active & (filled != 0) & (~last_word | free)),
            complete.eq(issue & last_word),
            self.release.eq(complete & last_group),
        ]
        m.d.sync += [
            filled.eq(filled + self.filled - self.release),
            ready.eq(ready + self.ready - complete),
            slack.eq(slack + self.written - Mux(complete, steps, 0)),
            free.eq((some_ready | self.ready) & (punctual | (late == 1) & ~self.held)
                    & (slack + self.written >= 0) & active
                    & (~alone | written_all) & ~complete),
            some_ready.eq(self.ready | (ready > 1) | (some_ready & ~complete)),
            written_all.eq((slack == self.capacity) & ~complete),
        ]
        with m.If(complete):
            m.d.sync += [late.eq(steps - 1), punctual.eq(steps == 1), alone.eq(0)]
        with m.Elif(~punctual & ~self.held):
            m.d.sync += [late.eq(late - 1), punctual.eq(late == 1)]

        base = Mux(half, config.row_words, 0)
        other_base = Mux(half, 0, config.row_words)
        with m.If(issue):
            m.d.sync += [word.eq(word + 1), address.eq(address + 1),
                         last_word.eq(word + 2 == held.source_words),
                         self.weight.eq(self.weight + 1)]
            with m.If(last_word):
                m.d.sync += [word.eq(0), address.eq(base), last_word.eq(only_word),
                             left.eq(left - outputs), last_group.eq(left <= 2 * outputs)]
                with m.If(last_group):
                    m.d.sync += [half.eq(~half), address.eq(other_base), left.eq(held.channels),
                                 last_group.eq(only_group), self.weight.eq(held.weight)]
        if config.narrow:
            m.d.comb += self.work.narrow.eq(held.narrow)
        starts_last, starts_only = Signal(), Signal()
        m.d.comb += [starts_last.eq(job.channels <= per_group(config, job, config.outputs)),
                     starts_only.eq(job.source_words == 1)]
        with m.If(load):
            m.d.sync += [held.eq(job), active.eq(1), alone.eq(job.target == Target.ROUTER),
                         left.eq(job.channels), self.weight.eq(job.weight),
                         last_word.eq(starts_only), only_word.eq(starts_only),
                         last_group.eq(starts_last), only_group.eq(starts_last)]
        with m.Elif(finish):
            m.d.sync += active.eq(0)
        return m


def _times(number, factor):
    """A product of small numbers by additions, so that no multiplier block is spent on it."""
    if isinstance(factor, int):
        return sum((number << bit for bit in range(factor.bit_length()) if factor >> bit & 1), 0)
    return sum(Mux(factor[bit], number << bit, 0) for bit in range(len(factor)))
