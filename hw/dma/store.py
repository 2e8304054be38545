"""On-chip memory to DRAM."""

from amaranth import Array, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Memory, Opcode
from ..interfaces import EngineSignature, ReadPort, activation_address
from ..ports import Burst
from ..slices import RegisterSlice
from .bursts import BurstSplitter
from .geometry import geometries

__all__ = ["StoreEngine"]

MEMORIES = [Memory.ACTIVATION, Memory.RESIDUAL]
WORDS_HELD = 8  # words read and not yet packed: covers the latency of the memories
WRITES = 15  # bursts in flight


class StoreEngine(wiring.Component):
    """Executes STORE: reads words of the activation or residual memory, packs them into bus words
    and writes these to DRAM in bursts.

    One bus word per cycle where a memory word is at least a bus word, else one memory word per
    cycle; refused bus words and reads that have to wait hold the rest back. Takes one instruction
    at a time and is `done` once all its bursts are reported `written`. What is left over of a bus
    word is zero.

    Members
    -------
    engine : Out(EngineSignature(Opcode.STORE))
    activation_read : Out(ReadPort(8 * depth, activation_address(config)))
    residual_read : Out(ReadPort(16 * lanes))
    write_command : Out(stream.Signature(Burst))
    write_data : Out(stream.Signature(8 * bus_bytes))
    written : In(1)
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "engine": Out(EngineSignature(Opcode.STORE)),
            "activation_read": Out(ReadPort(8 * config.depth, activation_address(config))),
            "residual_read": Out(ReadPort(16 * config.lanes)),
            "write_command": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(8 * config.bus_bytes)),
            "written": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.splitter = splitter = BurstSplitter(self.config, MEMORIES)
        instruction, transfer = self.engine.instruction, splitter.transfer

        active = Signal()
        job = Signal(data.StructLayout({"memory": 3, "local": 20, "words": 20}))
        to_read = Signal(20)  # words; `job.words` counts those not packed yet
        wanted, one, none = Signal(), Signal(), Signal()  # to_read is not 0; words is 1, is 0
        m.d.comb += [instruction.ready.eq(~active & transfer.ready),
                     transfer.valid.eq(~active & instruction.valid)]
        m.d.comb += [transfer.p[name].eq(instruction.p[name])
                     for name in ("memory", "words", "address")]

        in_flight = Signal(range(WRITES + 1))
        room = in_flight != WRITES
        m.d.comb += [
            self.write_command.payload.eq(splitter.bursts.payload),
            self.write_command.valid.eq(splitter.bursts.valid & room),
            splitter.bursts.ready.eq(self.write_command.ready & room),
        ]
        m.d.sync += in_flight.eq(in_flight + (self.write_command.valid & self.write_command.ready)
                                 - self.written)

        read, word, word_valid, word_taken = self._read(m, job, wanted)
        packed, sent = self._pack(m, job, one, word, word_valid, word_taken)

        with m.If(read):
            m.d.sync += [to_read.eq(to_read - 1), wanted.eq(to_read != 1),
                         job.local.eq(job.local + 1)]
        with m.If(packed):
            m.d.sync += [job.words.eq(job.words - 1), one.eq(job.words == 2), none.eq(one)]
        with m.If(instruction.valid & instruction.ready):
            m.d.sync += [active.eq(1), to_read.eq(instruction.p.words),
                         wanted.eq(instruction.p.words != 0), one.eq(instruction.p.words == 1),
                         none.eq(instruction.p.words == 0)]
            m.d.sync += [job[name].eq(instruction.p[name]) for name in ("memory", "local", "words")]

        finished = (active & none & ~self.write_data.valid & transfer.ready
                    & (in_flight == 0))
        with m.If(finished):
            m.d.sync += active.eq(0)
        m.d.comb += [self.engine.done.eq(finished), self.engine.busy.eq(active),
                     self.engine.stalled.eq(active & ~finished & ~packed & ~sent)]
        return m

    def _read(self, m, job, wanted):
        """Reads words into a queue. Returns: a read is on its way; the oldest word, whether there is
        one, and a signal that takes it."""
        ports = {Memory.ACTIVATION: self.activation_read, Memory.RESIDUAL: self.residual_read}
        width = max(8 * self.config.depth, 16 * self.config.lanes)
        m.submodules.words = words = SyncFIFO(width=width, depth=WORDS_HELD)
        located = {Memory.ACTIVATION: activation_address(self.config).of(job.local)}
        held = Signal(range(WORDS_HELD + 1))  # in the queue or on their way
        read = Signal()
        for memory, port in ports.items():
            m.submodules[f"{memory.name.lower()}_address"] = address = RegisterSlice(
                port.address.payload.shape())
            wiring.connect(m, address.output, wiring.flipped(port.address))
            m.d.comb += [
                address.input.payload.eq(located.get(memory, job.local)),
                address.input.valid.eq(wanted & (job.memory == memory) & (held != WORDS_HELD)),
            ]
            with m.If(address.input.valid & address.input.ready):
                m.d.comb += read.eq(1)
            with m.If(port.data.valid):
                m.d.comb += [words.w_en.eq(1), words.w_data.eq(port.data.payload)]
        m.d.sync += held.eq(held + read - (words.r_en & words.r_rdy))
        return read, words.r_data, words.r_rdy, words.r_en

    def _pack(self, m, job, one, word, word_valid, word_taken):
        """Packs words into `write_data`. Returns: a word is packed; a bus word is taken."""
        bus_bits = 8 * self.config.bus_bytes
        m.submodules.leaving = leaving = RegisterSlice(bus_bits)
        wiring.connect(m, leaving.output, wiring.flipped(self.write_data))
        out = leaving.input
        table = geometries(self.config, MEMORIES)
        part = Signal(range(max(geometry.parts for geometry in table.values()) + 1))
        beat = Signal(bus_bits)  # words of the present bus word so far
        packed, moved = Signal(), Signal()
        with m.Switch(job.memory):
            for memory, geometry in table.items():
                last_part = part == geometry.parts - 1
                bits = geometry.word_bits
                with m.Case(memory):
                    if geometry.spread:
                        # A word stays in the queue until its last bus word is made.
                        padded = word[:bits]
                        slices = [padded[i:i + bus_bits] for i in range(0, bits, bus_bits)]
                        m.d.comb += [moved.eq(word_valid & out.ready), packed.eq(moved & last_part)]
                        m.d.comb += [out.payload.eq(Array(slices)[part]), out.valid.eq(word_valid)]
                        with m.If(moved):
                            m.d.sync += part.eq(Mux(last_part, 0, part + 1))
                    else:
                        full = last_part | one
                        joined = beat | (word[:bits] << (part * bits))[:bus_bits]
                        m.d.comb += [moved.eq(word_valid & (out.ready | ~full)), packed.eq(moved)]
                        m.d.comb += [out.payload.eq(joined), out.valid.eq(word_valid & full)]
                        with m.If(moved):
                            m.d.sync += [beat.eq(joined), part.eq(part + 1)]
                            with m.If(full):
                                m.d.sync += [beat.eq(0), part.eq(0)]
        m.d.comb += word_taken.eq(packed)
        return packed, self.write_data.valid & self.write_data.ready
