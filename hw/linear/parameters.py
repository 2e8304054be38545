"""Bias and scale of the channels, fetched ahead of the results."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY, ReadPort, parameter_layout
from .jobs import IN_FLIGHT, job_layout

__all__ = ["Channel", "Parameters"]


class Channel(data.Struct):
    """Parameters of one output channel, without padding."""

    bias: signed(32)
    multiplier: 16
    shift: 6


class Parameters(wiring.Component):
    """Fetches the parameter words of one output group after another into a ring buffer, once for
    each token group, instruction after instruction, up to `depth` words ahead.

    One word per cycle, while there is room and `read` accepts addresses.

    Members
    -------
    jobs : In(stream.Signature(job_layout(*JOB)))
        With at least one row.
    read : Out(ReadPort(parameter_layout(config)))
    ready : Out(1)
        One cycle for each output group: its words are in the buffer.
    tails : Out(stream.Signature(range(outputs // lanes + 1)))
        Words of the last output group of each instruction; comes at least 3 cycles before that
        group is first `ready`, and is taken when the instruction is left.
    at : In(range(depth))
        Position in the buffer, which counts on from 0 since reset.
    word : Out(data.ArrayLayout(Channel, lanes))
        The word there, one cycle later.
    release : In(1)
        The oldest word is not needed any more.
    """

    JOB = ("rows", "channels", "param")

    def __init__(self, config: Config):
        self.config = config
        self.depth = max(32, 2 << (config.outputs // config.lanes - 1).bit_length())
        super().__init__({
            "jobs": In(stream.Signature(job_layout(*self.JOB))),
            "read": Out(ReadPort(parameter_layout(config))),
            "ready": Out(1),
            "tails": Out(stream.Signature(range(config.outputs // config.lanes + 1))),
            "at": In(range(self.depth)),
            "word": Out(data.ArrayLayout(Channel, config.lanes)),
            "release": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self.config, self.jobs.payload
        words = config.outputs // config.lanes
        m.submodules.tails = tails = SyncFIFO(width=len(self.tails.payload), depth=IN_FLIGHT)
        m.d.comb += [self.tails.payload.eq(tails.r_data), self.tails.valid.eq(tails.r_rdy),
                     tails.r_en.eq(self.tails.ready)]

        rows, left, word = Signal(13), Signal(16), Signal(range(words))
        room = Signal(range(self.depth + 1), init=self.depth)
        address = Signal(20)
        taken, pass_done, group_done, finish = Signal(), Signal(), Signal(), Signal()
        held, first = Signal(job.shape()), Signal()  # the job in work, and whether in its first pass
        m.d.comb += [
            self.read.address.valid.eq((rows != 0) & (room != 0) & tails.w_rdy),
            self.read.address.payload.eq(address),
            taken.eq(self.read.address.valid & self.read.address.ready),
            pass_done.eq(left <= config.lanes),
            group_done.eq(pass_done | (word == words - 1)),
        ]
        m.d.sync += room.eq(room - taken + self.release)
        with m.If(taken):
            m.d.sync += [address.eq(address + 1), left.eq(left - config.lanes), word.eq(word + 1)]
            with m.If(group_done):
                m.d.sync += word.eq(0)
            with m.If(pass_done):
                m.d.sync += [address.eq(held.param), left.eq(held.channels), first.eq(0),
                             rows.eq(Mux(finish, 0, rows - config.tokens))]
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [held.eq(job), first.eq(1), rows.eq(job.rows), left.eq(job.channels),
                         address.eq(job.param)]
        m.d.comb += [
            finish.eq(taken & pass_done & (rows <= config.tokens)),
            self.jobs.ready.eq((rows == 0) | finish),
            # Only the last output group can be shorter than the others, so this one is it.
            tails.w_data.eq(word + 1), tails.w_en.eq(taken & pass_done & first),
        ]

        arrives, completes = taken, taken & group_done
        for _ in range(READ_LATENCY):
            before, arrives = arrives, Signal(name="arrives")
            completes_before, completes = completes, Signal(name="completes")
            m.d.sync += [arrives.eq(before), completes.eq(completes_before)]
        m.d.sync += self.ready.eq(completes)

        m.submodules.buffer = buffer = Memory(shape=self.word.shape(), depth=self.depth, init=[])
        write, read = buffer.write_port(), buffer.read_port(domain="comb")
        m.d.comb += [write.en.eq(arrives), read.addr.eq(self.at)]
        for lane in range(config.lanes):
            for name in ("bias", "multiplier", "shift"):
                m.d.comb += write.data[lane][name].eq(self.read.data.payload[lane][name])
        with m.If(arrives):
            m.d.sync += write.addr.eq(write.addr + 1)
        m.d.sync += self.word.eq(read.data)
        return m
