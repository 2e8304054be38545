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

        pending = Signal()
        word = Signal(32)
        words = Signal.like(self.burst.p.beats)

        room = CHUNK_WORDS - word[:exact_log2(CHUNK_WORDS)]
        last = words <= room
        size = Mux(last, words, room)

        # Whoever sends bursts must not wait for whoever admits chunks in the same cycle, nor for
        # the arithmetic here.
        m.submodules.bursts = bursts = RegisterSlice(Burst)
        m.submodules.chunks = chunks = RegisterSlice(Chunk)
        wiring.connect(m, wiring.flipped(self.burst), bursts.input)
        burst = bursts.output
        wiring.connect(m, chunks.output, wiring.flipped(self.chunk))
        advance = chunks.input.ready
        m.d.comb += burst.ready.eq(~pending | (advance & last))

        m.d.comb += [
            chunks.input.valid.eq(pending), chunks.input.p.word.eq(word),
            chunks.input.p.words.eq(size), chunks.input.p.last.eq(last),
        ]
        with m.If(advance):
            m.d.sync += [word.eq(word + size), words.eq(words - size)]
            with m.If(last):
                m.d.sync += pending.eq(0)
        with m.If(burst.valid & burst.ready):
            m.d.sync += [
                pending.eq(1),
                word.eq(burst.p.address >> exact_log2(self._bus_bytes)),
                words.eq(burst.p.beats),
            ]
        return m
