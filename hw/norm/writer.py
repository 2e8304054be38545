"""Rows of int8 results into whole words of the activation memory."""

from amaranth import Module, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import WritePort, activation_address
from ..slices import RegisterSlice
from .reader import Rows, Word

__all__ = ["RowWriter"]


class RowWriter(wiring.Component):
    """Collects the `lanes` values of each word into activation words of `depth` values.

    Takes a word a cycle, and writes where an activation word or a row is complete: all lanes of
    the word, zeros past the end of the row. While writes are refused, two wait and the next one is
    collected; words wait only where that is complete, too.

    Members
    -------
    rows : In(stream.Signature(Rows))
        Taken after `done` of the ones before.
    words : In(stream.Signature(Word(data.ArrayLayout(signed(8), lanes), lanes)))
    port : Out(WritePort(8, depth, activation_address(config)))
    done : Out(1)
        Pulses once for each `rows`, after its last write was accepted.
    """

    def __init__(self, config: Config):
        self.lanes, self.depth = lanes, depth = config.lanes, config.depth
        self.address = activation_address(config)
        super().__init__({
            "rows": In(stream.Signature(Rows)),
            "words": In(stream.Signature(Word(data.ArrayLayout(signed(8), lanes), lanes))),
            "port": Out(WritePort(8, depth, self.address)),
            "done": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        groups = self.depth // self.lanes
        job = Signal(Rows)  # its base is that of the row being written, its rows those left
        active, finished = Signal(), Signal()
        address = Signal(20)
        position = Signal(range(groups))
        collected = Signal(data.ArrayLayout(8 * self.lanes, groups))
        merged = Signal.like(collected)
        current = Signal(data.ArrayLayout(8, self.lanes))
        layout = data.StructLayout({"address": self.address, "data": 8 * self.depth})
        m.submodules.writes = writes = RegisterSlice(layout)

        for lane in range(self.lanes):
            with m.If(self.words.p.count > lane):
                m.d.comb += current[lane].eq(self.words.p.data[lane])
        for group in range(groups):
            with m.If(position == group):
                m.d.comb += merged[group].eq(current)
            with m.Elif(position > group):
                m.d.comb += merged[group].eq(collected[group])

        complete = self.words.p.last | (position == groups - 1)
        taken = self.words.valid & self.words.ready
        next_base = (job.base + job.stride)[:20]
        m.d.comb += [
            self.rows.ready.eq(~active & ~finished),
            self.words.ready.eq(active & (~complete | writes.input.ready)),
            writes.input.valid.eq(active & self.words.valid & complete),
            writes.input.p.address.eq(self.address.of(address)), writes.input.p.data.eq(merged),
            self.port.write.valid.eq(writes.output.valid),
            self.port.write.p.address.eq(writes.output.p.address),
            self.port.write.p.data.eq(writes.output.p.data), self.port.write.p.mask.eq(-1),
            writes.output.ready.eq(self.port.write.ready),
        ]
        with m.If(taken):
            m.d.sync += [collected.eq(merged), position.eq(position + 1)]
            with m.If(complete):
                m.d.sync += [position.eq(0), address.eq(address + 1)]
            with m.If(self.words.p.last):
                m.d.sync += [
                    job.base.eq(next_base), address.eq(next_base), job.rows.eq(job.rows - 1),
                    active.eq(job.rows != 1), finished.eq(job.rows == 1),
                ]
        m.d.sync += self.done.eq(0)
        with m.If(finished & ~writes.output.valid):
            m.d.sync += [finished.eq(0), self.done.eq(1)]
        with m.If(self.rows.valid & self.rows.ready):
            some = (self.rows.p.rows != 0) & (self.rows.p.channels != 0)
            m.d.sync += [job.eq(self.rows.payload), address.eq(self.rows.p.base),
                         active.eq(some), finished.eq(~some)]
        return m
