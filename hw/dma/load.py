"""DRAM to on-chip memory."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Memory, Opcode
from ..interfaces import EngineSignature, TableWrite, WritePort, activation_address
from ..ports import Burst
from ..slices import RegisterSlice
from .bursts import BurstSplitter
from .geometry import geometries
from .unpack import Arrival, Unpacker

__all__ = ["LoadEngine"]

SHARED = (Memory.ACTIVATION, Memory.RESIDUAL)  # memories with other writers
JOBS = 4  # instructions whose bursts are requested while earlier ones still arrive


class Job(data.Struct):
    """What is left to do with the bus words of one instruction."""

    memory: 3
    local: 20
    words: 20


class LoadEngine(wiring.Component):
    """Executes LOAD: reads bus words and writes them, unpacked and repacked, to the memory that is
    named.

    Takes one bus word per cycle where a bus word is at most one memory word, else one memory word
    per cycle, as long as the memory accepts its writes; a packed bus word counts as those that it is
    unpacked to. A refused write holds the bus words back.
    Requests of up to `JOBS` further instructions are sent meanwhile, so that the bus never idles
    between two. `done` comes one cycle after the last write; the next instruction's words follow at
    once, or two cycles later where the memory has other writers and writes go through a register.

    Members
    -------
    engine : Out(EngineSignature(Opcode.LOAD))
    read_command : Out(stream.Signature(Burst))
    read_data : In(stream.Signature(8 * bus_bytes))
    activation_write : Out(WritePort(8, depth, activation_address(config)))
    residual_write : Out(WritePort(16, lanes))
    weight_write : Out(WritePort(8 * outputs * depth, 1))
    param_write : Out(WritePort(64 * lanes, 1))
    table_write : Out(stream.Signature(TableWrite))
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "engine": Out(EngineSignature(Opcode.LOAD)),
            "read_command": Out(stream.Signature(Burst)),
            "read_data": In(stream.Signature(8 * config.bus_bytes)),
            "activation_write": Out(WritePort(8, config.depth, activation_address(config))),
            "residual_write": Out(WritePort(16, config.lanes)),
            "weight_write": Out(WritePort(8 * config.outputs * config.depth, 1)),
            "param_write": Out(WritePort(64 * config.lanes, 1)),
            "table_write": Out(stream.Signature(TableWrite)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.splitter = splitter = BurstSplitter(self.config, list(Memory))
        wiring.connect(m, splitter.bursts, wiring.flipped(self.read_command))
        m.submodules.jobs = jobs = SyncFIFO(width=Job.as_shape().size, depth=JOBS)
        m.submodules.unpacker = unpacker = Unpacker(self.config)
        wiring.connect(m, wiring.flipped(self.read_data), unpacker.input)
        # Never full: the words of a transfer have left the unpacker when its job ends, and beside the
        # jobs that wait there is one.
        m.submodules.arrivals = arrivals = SyncFIFO(width=Arrival(self.config).size, depth=JOBS + 1)
        m.d.comb += [
            arrivals.w_en.eq(splitter.arrivals.valid), arrivals.w_data.eq(splitter.arrivals.payload),
            unpacker.arrivals.payload.eq(arrivals.r_data), unpacker.arrivals.valid.eq(arrivals.r_rdy),
            arrivals.r_en.eq(unpacker.arrivals.ready),
        ]

        instruction = self.engine.instruction
        transfer = splitter.transfer
        m.d.comb += [
            instruction.ready.eq(transfer.ready & jobs.w_rdy),
            transfer.valid.eq(instruction.valid & jobs.w_rdy),
            transfer.p.memory.eq(instruction.p.memory),
            transfer.p.words.eq(instruction.p.words),
            transfer.p.address.eq(instruction.p.address),
            transfer.p.packed.eq(instruction.p.packed),
            jobs.w_en.eq(instruction.valid & transfer.ready),
            jobs.w_data.eq(Cat(instruction.p.memory, instruction.p.local, instruction.p.words)),
        ]

        job, following = Signal(Job), Job(jobs.r_data)
        active = Signal()
        some, one = Signal(), Signal()  # words are left to an active job, or exactly one
        ending = Signal()  # the last words of the job before are in a register
        starts = ~active & ~ending
        with m.If(starts):
            m.d.comb += jobs.r_en.eq(1)
            m.d.sync += [job.eq(following), active.eq(jobs.r_rdy),
                         some.eq(jobs.r_rdy & (following.words != 0)), one.eq(following.words == 1)]
        streams, waits = self._streams(m)
        wrote, used = self._repack(m, job, starts, following.memory, some, one, unpacker.output,
                                   streams)
        with m.If(wrote):
            m.d.sync += [job.words.eq(job.words - 1), job.local.eq(job.local + 1),
                         some.eq(~one), one.eq(job.words == 2)]
        finished = active & (~some | (wrote & one))
        shared = Cat(job.memory == memory for memory in SHARED).any()
        m.d.sync += self.engine.done.eq((finished & ~shared) | (ending & ~waits))
        with m.If(finished):
            m.d.sync += [active.eq(0), ending.eq(shared)]
        with m.Elif(~waits):
            m.d.sync += ending.eq(0)

        busy = active | ending | jobs.r_rdy
        m.d.comb += [self.engine.busy.eq(busy | self.engine.done),
                     self.engine.stalled.eq(active & ~finished & ~used)]
        return m

    def _repack(self, m, job, starts, memory, some, one, arriving, streams):
        """The datapath; with `starts` the next job comes, for `memory`. Returns two signals: a word is
        written; a bus word, or part, is used."""
        bus_bits = 8 * self.config.bus_bytes
        table = geometries(self.config, list(Memory))
        beat = Signal(bus_bits)
        beat_valid = Signal()
        # The bus words of a wide word before its last one, newest at the top.
        most = max(geometry.beats_each for geometry in table.values())
        earlier = Signal(max(1, bus_bits * (most - 1)))

        # What depends on the job's memory, and whether its part is the last of a word or of a bus
        # word, stands in registers: paths start there and go to every memory.
        chosen = Signal(len(table))
        spread = Signal()
        part, final = (Signal(range(max(each.parts for each in table.values())), name=name)
                       for name in ("part", "final"))
        last_part = Signal()
        with m.If(starts):
            with m.Switch(memory):
                for number, (each, geometry) in enumerate(table.items()):
                    with m.Case(each):
                        m.d.sync += [chosen.eq(1 << number), spread.eq(geometry.spread),
                                     final.eq(geometry.parts - 1), last_part.eq(geometry.parts == 1)]

        goes, wrote, used, pop = some & beat_valid, Signal(), Signal(), Signal()
        writes = ~spread | last_part
        ready = Cat(~chosen[number] | streams[each].ready for number, each in enumerate(table)).all()
        m.d.comb += [used.eq(goes & (ready | ~writes)), wrote.eq(used & writes),
                     pop.eq(used & (spread | last_part | one))]
        located = {Memory.ACTIVATION: activation_address(self.config).of(job.local)}
        for number, (each, geometry) in enumerate(table.items()):
            out = streams[each]
            whole = Cat(earlier[len(earlier) - bus_bits * (geometry.beats_each - 1):], beat)
            m.d.comb += [out.valid.eq(goes & writes & chosen[number]),
                         out.p.address.eq(located.get(each, job.local)),
                         out.p.data.eq(whole[:geometry.word_bits])]
            if not geometry.spread:
                with m.If(used & chosen[number]):
                    m.d.sync += beat.eq(beat >> geometry.word_bits)

        with m.If(used):
            with m.If(wrote & pop):
                m.d.sync += [part.eq(0), last_part.eq(final == 0)]
            with m.Else():
                m.d.sync += [part.eq(part + 1), last_part.eq(part + 1 == final)]
        with m.If(pop):
            m.d.sync += [beat_valid.eq(0), earlier.eq(Cat(earlier, beat)[bus_bits:])]
        m.d.comb += arriving.ready.eq(~beat_valid | pop)
        with m.If(arriving.valid & arriving.ready):
            m.d.sync += [beat.eq(arriving.payload), beat_valid.eq(1)]
        return wrote, used

    def _streams(self, m):
        """Where words for each memory go, and whether a register holds one that was not accepted.
        Memories with other writers have arbiters, which nothing here should wait for."""
        ports = {Memory.ACTIVATION: self.activation_write, Memory.RESIDUAL: self.residual_write,
                 Memory.WEIGHT: self.weight_write, Memory.PARAM: self.param_write}
        streams = {Memory.TABLE: self.table_write} | {
            memory: port.write for memory, port in ports.items()}
        m.d.comb += [port.write.p.mask.eq(~0) for port in ports.values()]
        waits = []
        for memory in SHARED:
            port = streams[memory]
            layout = data.StructLayout({"address": port.p.address.shape(), "data": len(port.p.data)})
            m.submodules[f"{memory.name.lower()}_slice"] = held = RegisterSlice(layout)
            m.d.comb += [
                port.valid.eq(held.output.valid), held.output.ready.eq(port.ready),
                port.p.address.eq(held.output.p.address), port.p.data.eq(held.output.p.data),
            ]
            streams[memory] = held.input
            waits.append(held.output.valid)
        return streams, Cat(waits).any()
