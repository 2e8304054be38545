"""Bursts in the parts that the SDRAM controller admits at once."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from .ports import Burst
from .slices import RegisterSlice

__all__ = ["CHUNK_WORDS", "Chunk", "Chunker"]

CHUNK_WORDS = 16  # bus words


class Chunk(data.Struct):
    """A part of a burst within an aligned group of `CHUNK_WORDS` bus words."""

    word: 32  # first bus word, counted from the start of memory
    words: range(CHUNK_WORDS + 1)
    last: 1  # of its burst


class Chunker(wiring.Component):
    """Cuts bursts into chunks, in order.

    One chunk per cycle, `LATENCY` cycles after its burst; no cycle is lost between bursts. It
    holds while a chunk is refused.

    Members
    -------
    burst : In(stream.Signature(Burst))
    chunk : Out(stream.Signature(Chunk))
    """

    LATENCY = 3

    burst: In(stream.Signature(Burst))
    chunk: Out(stream.Signature(Chunk))

    def __init__(self, bus_bytes: int):
        self._bus_bytes = bus_bytes
        super().__init__()

    def elaborate(self, platform):
        m = Module()

        # Whoever sends bursts must not wait for whoever admits chunks in the same cycle.
        m.submodules.chunks = chunks = RegisterSlice(Chunk)
        burst = self.burst
        wiring.connect(m, chunks.output, wiring.flipped(self.chunk))

        # First where the burst ends, counted from the start of its first group; then its groups.
        bits = exact_log2(CHUNK_WORDS)
        length = len(burst.p.beats) + 1
        known, pending = Signal(), Signal()
        start, end = Signal(32), Signal(length)  # end: the last word
        word, more, tail = Signal(32), Signal(length - bits), Signal(bits)
        last = Signal()  # more == 0
        advance, taken = Signal(), Signal()
        m.d.comb += [
            advance.eq(pending & chunks.input.ready), taken.eq(known & (~pending | advance & last)),
            burst.ready.eq(~known | taken),
            chunks.input.valid.eq(pending), chunks.input.p.word.eq(word),
            chunks.input.p.words.eq(Mux(last, tail + 1, CHUNK_WORDS) - word[:bits]),
            chunks.input.p.last.eq(last),
        ]
        first = (burst.p.address >> exact_log2(self._bus_bytes))[:32]
        with m.If(burst.ready):
            m.d.sync += [known.eq(burst.valid), start.eq(first),
                         end.eq(first[:bits] + burst.p.beats - 1)]
        with m.If(advance):
            m.d.sync += [word.eq((word[bits:] + 1) << bits), more.eq(more - 1), last.eq(more == 1)]
            with m.If(last):
                m.d.sync += pending.eq(0)
        with m.If(taken):
            m.d.sync += [pending.eq(1), word.eq(start), more.eq(end[bits:]), tail.eq(end[:bits]),
                         last.eq(end[bits:] == 0)]
        return m
