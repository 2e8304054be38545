"""Rows of memory words, read ahead into a small queue."""

from itertools import pairwise

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..interfaces import READ_LATENCY, ReadPort
from ..slices import RegisterSlice

__all__ = ["RowReader", "Rows", "Word"]


class Rows(data.Struct):
    """Rows of a memory: row i starts at word ``base + i * stride``."""

    base: 20
    stride: 13
    rows: 13
    channels: 16
    flag: 1  # goes with every word
    period: 13  # of a reader that repeats: words after which a row begins again


class Word(data.StructLayout):
    """A memory word of a row: its first `count` lanes belong to the row, and `last` ends it."""

    def __init__(self, shape, lanes: int):
        super().__init__({"data": shape, "count": range(lanes + 1), "last": 1, "flag": 1})


class RowReader(wiring.Component):
    """Reads the words of rows of `channels` values, `lanes` to a word.

    One word a cycle where the port and the consumer allow it; the first word 5 cycles after its
    rows were taken. At most `DEPTH` words are on the way or waiting, so that a consumer that stops
    loses none. Rows are taken when all addresses of the rows before are on their way; no rows,
    or rows of no channels, read nothing.

    Parameters
    ----------
    shape : of a memory word
    lanes : values of a word
    repeats : after `period` words a row begins again, until it has given words for all channels

    Members
    -------
    rows : In(stream.Signature(Rows))
    port : Out(ReadPort(shape))
    words : Out(stream.Signature(Word(shape, lanes)))
    """

    DEPTH = 8

    def __init__(self, shape, lanes: int, *, repeats: bool = False):
        self.lanes, self.repeats = lanes, repeats
        self.word = Word(shape, lanes)
        super().__init__({
            "rows": In(stream.Signature(Rows)),
            "port": Out(ReadPort(shape)),
            "words": Out(stream.Signature(self.word)),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.lanes
        job = Signal(Rows)  # its base is that of the row being read, its rows those left
        active = Signal()
        address = Signal(20)
        left = Signal(16)  # channels of the row that were not asked for
        until = Signal(13)  # words until the row begins again
        free = Signal(range(self.DEPTH + 1), init=self.DEPTH)

        # What is known of a word travels beside its address and its read.
        tag = data.StructLayout({"valid": 1, "count": range(lanes + 1), "last": 1, "flag": 1})
        m.submodules.sent = sent = RegisterSlice(data.StructLayout({"address": 20, "tag": tag}))
        asked = sent.input.valid & sent.input.ready
        last = left <= lanes
        next_base = (job.base + job.stride)[:20]
        m.d.comb += [
            self.rows.ready.eq(~active),
            sent.input.valid.eq(active & (free != 0)),
            sent.input.p.address.eq(address),
            sent.input.p.tag.valid.eq(1), sent.input.p.tag.last.eq(last),
            sent.input.p.tag.count.eq(Mux(last, left, lanes)),
            sent.input.p.tag.flag.eq(job.flag),
            self.port.address.payload.eq(sent.output.p.address),
            self.port.address.valid.eq(sent.output.valid),
            sent.output.ready.eq(self.port.address.ready),
        ]
        with m.If(~active):
            m.d.sync += [
                job.eq(self.rows.payload),
                address.eq(self.rows.p.base),
                left.eq(self.rows.p.channels),
                active.eq(self.rows.valid & (self.rows.p.rows != 0)
                          & (self.rows.p.channels != 0)),
            ]
            if self.repeats:
                m.d.sync += until.eq(self.rows.p.period)
        with m.Elif(asked):
            with m.If(last):
                m.d.sync += [
                    job.base.eq(next_base), address.eq(next_base), left.eq(job.channels),
                    job.rows.eq(job.rows - 1), active.eq(job.rows != 1),
                ]
            with m.Else():
                m.d.sync += [address.eq(address + 1), left.eq(left - lanes)]
            if self.repeats:
                m.d.sync += until.eq(until - 1)
                with m.If(last | (until == 1)):
                    m.d.sync += until.eq(job.period)
                with m.If(~last & (until == 1)):
                    m.d.sync += address.eq(job.base)

        tags = [Signal(tag, name=f"tag_{i}") for i in range(READ_LATENCY + 1)]
        m.d.comb += [
            tags[0].eq(sent.output.p.tag),
            tags[0].valid.eq(self.port.address.valid & self.port.address.ready),
        ]
        m.d.sync += [after.eq(before) for before, after in pairwise(tags)]

        m.submodules.queue = queue = SyncFIFO(width=self.word.size, depth=self.DEPTH)
        arriving = Signal(self.word)
        m.d.comb += [
            arriving.data.eq(self.port.data.payload), arriving.count.eq(tags[-1].count),
            arriving.last.eq(tags[-1].last), arriving.flag.eq(tags[-1].flag),
            queue.w_data.eq(arriving), queue.w_en.eq(tags[-1].valid),
            self.words.payload.eq(queue.r_data), self.words.valid.eq(queue.r_rdy),
            queue.r_en.eq(self.words.ready),
        ]
        taken = self.words.valid & self.words.ready
        m.d.sync += free.eq(free - asked + taken)
        return m
