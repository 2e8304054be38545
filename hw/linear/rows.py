"""Where the rows of a LINEAR instruction lie: the first step of the linear unit."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Opcode, Target
from ..interfaces import READ_LATENCY, QueueEntry, fields_layout
from ..multiply import Multipliers

__all__ = ["Row", "RowAddresses"]


class Row(data.Struct):
    """One row of an instruction."""

    source: 20  # first activation word
    destination: 20  # first word in the target memory; for the router, the number of the row
    weight: 16  # gate weight of the queue entry
    end: 1  # last row of the instruction


class RowAddresses(wiring.Component):
    """Addresses of the rows of an instruction, in order: by row number, or by queue entry.

    One row every two cycles (its two addresses share a multiplier), the first `LATENCY` cycles
    after `start`, or `READ_LATENCY` later from a queue; up to `DEPTH` of them ahead of their use.

    Members
    -------
    start : In(1)
        One cycle, with `fields` and `count` valid and held until the last row was taken.
    fields : In(fields_layout(Opcode.LINEAR))
    count : In(13)
        Rows, at least 1.
    index : Out(stream.Signature(13, always_ready=True))
        As in `QueuePort`.
    entry : In(stream.Signature(QueueEntry, always_ready=True))
    rows : Out(stream.Signature(Row))
    """

    LATENCY = Multipliers.LATENCY + 3
    DEPTH = 8

    start: In(1)
    fields: In(fields_layout(Opcode.LINEAR))
    count: In(13)
    index: Out(stream.Signature(13, always_ready=True))
    entry: In(stream.Signature(QueueEntry, always_ready=True))
    rows: Out(stream.Signature(Row))

    def __init__(self, config: Config):
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        fields, queued = self.fields, self.fields.queued
        m.submodules.fifo = fifo = SyncFIFO(width=Row.as_shape().size, depth=self.DEPTH)
        m.submodules.multiply = multiply = Multipliers(13, 13)
        product = multiply.product[0]

        number, left, second = Signal(13), Signal(13), Signal()
        slots = Signal(range(self.DEPTH + 1), init=self.DEPTH)
        begin = Signal()
        m.d.comb += begin.eq((left != 0) & (slots != 0) & ~second)
        taken = self.rows.valid & self.rows.ready
        m.d.sync += [second.eq(begin), slots.eq(slots - begin + taken)]
        with m.If(self.start):
            m.d.sync += [number.eq(0), left.eq(self.count)]
        with m.Elif(begin):
            m.d.sync += [number.eq(number + 1), left.eq(left - 1)]
        m.d.comb += [self.index.valid.eq(begin & queued), self.index.payload.eq(number)]

        # A queue entry takes its time; row numbers are there at once.
        asked, asked_end, asked_number = (
            _delayed(m, signal, READ_LATENCY)[-1] for signal in (begin, left == 1, number))
        found, end, row, token = Signal(), Signal(), Signal(13), self.entry.p.token
        m.d.comb += [found.eq(Mux(queued, asked, begin)), end.eq(Mux(queued, asked_end, left == 1)),
                     row.eq(Mux(queued, asked_number, number))]

        # The first cycle multiplies for the source, the second for the destination.
        target_row = Signal(13)
        m.d.sync += target_row.eq(Mux(queued & fields.scatter, token, row))
        to_router = fields.target == Target.ROUTER
        m.d.comb += multiply.advance.eq(1)
        with m.If(found):
            m.d.comb += [multiply.a[0].eq(Mux(queued & fields.gather, token, row)),
                         multiply.b[0].eq(fields.source_stride)]
        with m.Else():
            m.d.comb += [multiply.a[0].eq(target_row),
                         multiply.b[0].eq(Mux(to_router, 1, fields.destination_stride))]

        complete = Signal(Row)
        both = Multipliers.LATENCY + 1  # cycles from `found` to the second product
        source = Signal(20)
        m.d.sync += source.eq(fields.source + product)
        m.d.comb += [
            complete.source.eq(source),
            complete.destination.eq(Mux(to_router, 0, fields.destination) + product),
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
