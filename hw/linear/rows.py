"""Where the rows of a LINEAR instruction lie: the first step of the linear unit."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Target
from ..interfaces import READ_LATENCY, QueueEntry, QueueIndex
from ..multiply import Multipliers
from .jobs import job_layout

__all__ = ["Row", "RowAddresses"]


class Row(data.StructLayout):
    """One row of an instruction."""

    def __init__(self, config: Config):
        super().__init__({
            "source": 20,  # first activation word
            "source_words": range(config.row_words + 1),
            "single": 1,  # source_words == 1
            "destination": 20,  # first word in the target memory; router: the number of the row
            "weight": 16,  # gate weight of the queue entry
            "end": 1,  # last row of its instruction
        })


class RowAddresses(wiring.Component):
    """Addresses of the rows of one instruction after another: by row number, or by queue entry.

    One row every two cycles (its two addresses share a multiplier), also from instruction to
    instruction; the first `LATENCY` cycles after its job; up to `DEPTH` of them ahead of their use.

    Members
    -------
    jobs : In(stream.Signature(job_layout(config, *JOB)))
        With at least one row.
    index : Out(stream.Signature(QueueIndex, always_ready=True))
        As in `QueuePort`.
    entry : In(stream.Signature(QueueEntry, always_ready=True))
    rows : Out(stream.Signature(Row(config)))
    """

    JOB = ("rows", "queued", "gather", "scatter", "target", "source", "source_stride",
           "source_words", "destination", "destination_stride", "expert")
    LATENCY = READ_LATENCY + Multipliers.LATENCY + 3
    DEPTH = 8

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "jobs": In(stream.Signature(job_layout(config, *self.JOB))),
            "index": Out(stream.Signature(QueueIndex, always_ready=True)),
            "entry": In(stream.Signature(QueueEntry, always_ready=True)),
            "rows": Out(stream.Signature(Row(config))),
        })

    def elaborate(self, platform):
        m = Module()
        job = self.jobs.payload
        row_layout = self.rows.payload.shape()
        m.submodules.fifo = fifo = SyncFIFO(width=row_layout.size, depth=self.DEPTH)
        m.submodules.multiply = multiply = Multipliers(13, 13)
        product = multiply.product[0]

        number, left, second = Signal(13), Signal(13), Signal()
        slots = Signal(range(self.DEPTH + 1), init=self.DEPTH)
        begin, load, queued, expert = Signal(), Signal(), Signal(), Signal(8)
        taken = self.rows.valid & self.rows.ready
        m.d.comb += [begin.eq((left != 0) & (slots != 0) & ~second), load.eq(left == 0),
                     self.jobs.ready.eq(load),
                     self.index.valid.eq(begin & queued), self.index.p.expert.eq(expert),
                     self.index.p.index.eq(number)]
        m.d.sync += [second.eq(begin), slots.eq(slots - begin + taken)]
        with m.If(begin):
            m.d.sync += [number.eq(number + 1), left.eq(left - 1)]
        with m.If(load & self.jobs.valid):
            m.d.sync += [number.eq(0), left.eq(job.rows), queued.eq(job.queued),
                         expert.eq(job.expert)]

        # What the later steps need of a job lies in a ring, and the rows carry its place in it: as
        # fewer than 2**3 rows are between `begin` and the end of the products, none is overwritten.
        to_router = job.target == Target.ROUTER
        place = Signal(3)
        with m.If(load & self.jobs.valid):
            m.d.sync += place.eq(place + 1)

        def kept(name, layout):
            m.submodules[name] = memory = Memory(shape=layout, depth=1 << len(place), init=[])
            write, read = memory.write_port(), memory.read_port(domain="comb")
            m.d.comb += [write.en.eq(load & self.jobs.valid), write.addr.eq(place + 1)]
            m.d.comb += [write.data[field].eq(job[field]) for field, _ in layout]
            return write.data, read

        steps_in, steps_read = kept("steps", data.StructLayout({
            "gather": 1, "scatter": 1, "source_stride": 13, "destination_stride": 13}))
        bases_in, bases_read = kept("bases", data.StructLayout({
            "source": 20, "source_words": row_layout["source_words"].shape, "destination": 20}))
        steps, bases = steps_read.data, bases_read.data
        m.d.comb += [steps_in.gather.eq(job.queued & job.gather),
                     steps_in.scatter.eq(job.queued & job.scatter)]
        with m.If(to_router):
            m.d.comb += [steps_in.destination_stride.eq(1), bases_in.destination.eq(0)]

        # Every row waits as long as a queue entry takes, so that they stay in order.
        found, end, row, at = (_delayed(m, signal, READ_LATENCY)[-1]
                               for signal in (begin, left == 1, number, place))
        token = self.entry.p.token

        # The first cycle multiplies for the source, the second for the destination.
        target_row = Signal(13)
        m.d.sync += target_row.eq(Mux(steps.scatter, token, row))
        m.d.comb += [multiply.advance.eq(1), steps_read.addr.eq(at)]
        with m.If(found):
            m.d.comb += [multiply.a[0].eq(Mux(steps.gather, token, row)),
                         multiply.b[0].eq(steps.source_stride)]
        with m.Else():
            m.d.comb += [multiply.a[0].eq(target_row), multiply.b[0].eq(steps.destination_stride)]

        complete = Signal(row_layout)
        both = Multipliers.LATENCY + 1  # cycles from `found` to the second product
        source = Signal(20)
        m.d.comb += bases_read.addr.eq(_delayed(m, at, Multipliers.LATENCY)[-1])
        m.d.sync += source.eq(bases.source + product)
        m.d.comb += [
            complete.source.eq(source), complete.source_words.eq(bases.source_words),
            complete.single.eq(bases.source_words == 1),
            complete.destination.eq(bases.destination + product),
            complete.weight.eq(_delayed(m, self.entry.p.weight, both)[-1]),
            complete.end.eq(_delayed(m, end, both)[-1]),
            fifo.w_data.eq(complete), fifo.w_en.eq(_delayed(m, found, both)[-1]),
            self.rows.payload.eq(fifo.r_data), self.rows.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.rows.ready),
        ]
        return m


def _delayed(m, value, cycles):
    """The value now and after 1 to `cycles` cycles."""
    stages = [value]
    for _ in range(cycles):
        stages.append(Signal.like(stages[-1], name="delayed"))
        m.d.sync += stages[-1].eq(stages[-2])
    return stages
