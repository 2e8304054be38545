"""Which part of which burst an SDRAM controller works on next."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .ports import Burst
from .sdram_chunks import Chunk, Chunker

__all__ = ["QUEUE_WORDS", "Admission", "Admitted"]

QUEUE_WORDS = 32  # bus words of each data queue: one chunk on the pins, one being admitted
RUN_CHUNKS = 4  # chunks before waiting traffic of the other direction gets its turn


class Admitted(data.Struct):
    """A chunk of a burst that is read, or written."""

    write: 1
    chunk: Chunk


class Admission(wiring.Component):
    """Lets chunks of both directions in, one direction at a time.

    A chunk that is read is offered when the queue of read words has room for all of it, one that is
    written when all its words have arrived. The direction changes when the present one has nothing
    to offer, or after `RUN_CHUNKS` chunks while the other one has. A chunk is offered a cycle after
    it fits, and the next one at least 2 cycles after it; an offer may turn into another one until
    it is taken.

    Members
    -------
    read : In(stream.Signature(Burst))
    write : In(stream.Signature(Burst))
    read_leaves : In(1)
        A word that was read leaves its queue.
    write_arrives : In(1)
        A word that will be written arrives in its queue.
    admitted : Out(stream.Signature(Admitted))
    """

    read: In(stream.Signature(Burst))
    write: In(stream.Signature(Burst))
    read_leaves: In(1)
    write_arrives: In(1)
    admitted: Out(stream.Signature(Admitted))

    def __init__(self, bus_bytes: int):
        self._bus_bytes = bus_bytes
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.read_chunks = read_chunks = Chunker(self._bus_bytes)
        m.submodules.write_chunks = write_chunks = Chunker(self._bus_bytes)
        wiring.connect(m, wiring.flipped(self.read), read_chunks.burst)
        wiring.connect(m, wiring.flipped(self.write), write_chunks.burst)
        read, write = read_chunks.chunk, write_chunks.chunk

        read_fits, write_fits = Signal(), Signal()
        writing = Signal()  # direction of the last admitted chunk
        run = Signal(range(RUN_CHUNKS))
        change, may_read, may_write = Signal(), Signal(), Signal()
        m.d.comb += [
            change.eq(Mux(writing, read_fits & (~write_fits | (run == 0)),
                          write_fits & (~read_fits | (run == 0)))),
            may_read.eq(read_fits & (writing == change)),
            may_write.eq(write_fits & (writing != change)),
            read.ready.eq(self.admitted.ready & may_read),
            write.ready.eq(self.admitted.ready & may_write),
            self.admitted.valid.eq(may_read | may_write),
            self.admitted.p.write.eq(may_write),
            self.admitted.p.chunk.eq(Mux(may_write, write.payload.as_value(),
                                         read.payload.as_value())),
        ]
        with m.If(self.admitted.valid & self.admitted.ready):
            m.d.sync += writing.eq(may_write)
            with m.If(change):
                m.d.sync += run.eq(RUN_CHUNKS - 1)
            with m.Elif(run != 0):
                m.d.sync += run.eq(run - 1)

        read_room = Signal(range(QUEUE_WORDS + 1), init=QUEUE_WORDS)
        write_words = Signal(range(QUEUE_WORDS + 1))  # arrived and not yet part of such a chunk
        m.d.sync += [
            read_room.eq(read_room - Mux(read.ready, read.p.words, 0) + self.read_leaves),
            write_words.eq(write_words - Mux(write.ready, write.p.words, 0) + self.write_arrives),
            # Known a cycle late: room and words only grow until the chunk is admitted.
            read_fits.eq(read.valid & (read_room >= read.p.words) & ~read.ready),
            write_fits.eq(write.valid & (write_words >= write.p.words) & ~write.ready),
        ]
        return m
