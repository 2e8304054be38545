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
    after `start`, up to `DEPTH` of them ahead of their use; it holds while they wait.

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

    LATENCY = READ_LATENCY + Multipliers.LATENCY + 3
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
        m.d.sync += [second.eq(begin), slots.eq(slots - begin + (self.rows.valid & self.rows.ready))]
        with m.If(self.start):
            m.d.sync += [number.eq(0), left.eq(self.count)]
        with m.Elif(begin):
            m.d.sync += [number.eq(number + 1), left.eq(left - 1)]
        m.d.comb += [self.index.valid.eq(begin & queued), self.index.payload.eq(number)]

        # begun[i] is high i cycles after `begin`; the queue entry is there at begun[entry], the
        # products of source and destination arrive at begun[source] and one later.
        entry = READ_LATENCY
        source = entry + Multipliers.LATENCY
        begun = _delayed(m, begin, source + 1)
        end = _delayed(m, left == 1, source + 1)
        row = _delayed(m, number, entry)[-1]
        weight = _delayed(m, self.entry.p.weight, Multipliers.LATENCY + 1)[-1]
        target_row = Signal(13)
        m.d.sync += target_row.eq(Mux(queued & fields.scatter, self.entry.p.token, row))
        to_router = fields.target == Target.ROUTER
        m.d.comb += multiply.advance.eq(1)
        with m.If(begun[entry]):
            m.d.comb += [
                multiply.a[0].eq(Mux(queued & fields.gather, self.entry.p.token, row)),
                multiply.b[0].eq(fields.source_stride),
            ]
        with m.Else():
            m.d.comb += [
                multiply.a[0].eq(target_row),
                multiply.b[0].eq(Mux(to_router, 1, fields.destination_stride)),
            ]

        found = Signal(Row)
        source_word = Signal(20)
        m.d.sync += source_word.eq(fields.source + product)
        m.d.comb += [
            found.source.eq(source_word),
            found.destination.eq(Mux(to_router, 0, fields.destination) + product),
            found.weight.eq(weight), found.end.eq(end[-1]),
            fifo.w_data.eq(found), fifo.w_en.eq(begun[-1]),
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
