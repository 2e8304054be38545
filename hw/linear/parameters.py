"""Bias and scale of the channels, fetched ahead of the results."""

from amaranth import Module, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY, ReadPort, parameter_layout
from ..slices import RegisterSlice
from .jobs import IN_FLIGHT, job_layout, per_group

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
    jobs : In(stream.Signature(job_layout(config, *JOB)))
        With at least one row.
    read : Out(ReadPort(parameter_layout(config)))
    ready : Out(1)
        One cycle for each output group: its words are in the buffer.
    tails : Out(stream.Signature(range(most + 1)))
        Words of the last output group of each instruction; comes at least 3 cycles before that
        group is first `ready`, and is taken when the instruction is left.
    at : In(range(depth))
        Position in the buffer, which counts on from 0 since reset.
    word : Out(data.ArrayLayout(Channel, lanes))
        The word there, one cycle later.
    release : In(1)
        The oldest word is not needed any more.
    """

    JOB = ("rows", "channels", "param", "narrow")

    def __init__(self, config: Config):
        self.config = config
        most = (config.outputs // config.lanes) << config.narrow  # words of an output group
        self.depth = max(32, 2 << (most - 1).bit_length())
        super().__init__({
            "jobs": In(stream.Signature(job_layout(config, *self.JOB))),
            "read": Out(ReadPort(parameter_layout(config))),
            "ready": Out(1),
            "tails": Out(stream.Signature(range(most + 1))),
            "at": In(range(self.depth)),
            "word": Out(data.ArrayLayout(Channel, config.lanes)),
            "release": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self.config, self.jobs.payload
        m.submodules.tails = tails = SyncFIFO(width=len(self.tails.payload), depth=IN_FLIGHT)
        m.d.comb += [self.tails.payload.eq(tails.r_data), self.tails.valid.eq(tails.r_rdy),
                     tails.r_en.eq(self.tails.ready)]

        rows, left, word = Signal(13), Signal(16), Signal.like(tails.w_data)
        # Flags stand beside the counters that they speak of.
        working, last_pass = Signal(), Signal()  # rows != 0, rows <= tokens
        pass_done, single = Signal(), Signal()  # left <= lanes, as at the start of a pass
        last_word = Signal()  # of an output group
        room = Signal(range(self.depth + 1), init=self.depth)
        address = Signal(20)
        taken, group_done, finish = Signal(), Signal(), Signal()
        held, first = Signal(job.shape()), Signal()  # the job in work, and whether in its first pass
        words = per_group(config, held, config.outputs // config.lanes)
        m.submodules.sent = sent = RegisterSlice(data.StructLayout({"address": 20, "completes": 1}))
        m.d.comb += [
            sent.input.valid.eq(working & (room != 0) & tails.w_rdy),
            sent.input.p.address.eq(address), sent.input.p.completes.eq(group_done),
            taken.eq(sent.input.valid & sent.input.ready),
            group_done.eq(pass_done | last_word),
            self.read.address.valid.eq(sent.output.valid),
            self.read.address.payload.eq(sent.output.p.address),
            sent.output.ready.eq(self.read.address.ready),
        ]
        m.d.sync += room.eq(room - taken + self.release)
        with m.If(taken):
            m.d.sync += [address.eq(address + 1), left.eq(left - config.lanes),
                         pass_done.eq(left <= 2 * config.lanes), word.eq(word + 1),
                         last_word.eq(word + 2 == words)]
            with m.If(group_done):
                m.d.sync += [word.eq(0), last_word.eq(words == 1)]
            with m.If(pass_done):
                m.d.sync += [address.eq(held.param), left.eq(held.channels), pass_done.eq(single),
                             first.eq(0), rows.eq(rows - config.tokens),
                             last_pass.eq(rows <= 2 * config.tokens), working.eq(~last_pass)]
        short = Signal()
        m.d.comb += short.eq(job.channels <= config.lanes)
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [held.eq(job), first.eq(1), address.eq(job.param), rows.eq(job.rows),
                         working.eq(1), last_pass.eq(job.rows <= config.tokens),
                         left.eq(job.channels), pass_done.eq(short), single.eq(short),
                         last_word.eq(per_group(config, job, config.outputs // config.lanes) == 1)]
        m.d.comb += [
            finish.eq(taken & pass_done & last_pass),
            self.jobs.ready.eq(~working | finish),
            # Only the last output group can be shorter than the others, so this one is it.
            tails.w_data.eq(word + 1), tails.w_en.eq(taken & pass_done & first),
        ]

        arrives = self.read.address.valid & self.read.address.ready
        completes = arrives & sent.output.p.completes
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
