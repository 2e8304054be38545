"""Bias and scale of the channels, fetched ahead of the results."""

from amaranth import Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Opcode
from ..interfaces import READ_LATENCY, ReadPort, fields_layout, parameter_layout

__all__ = ["Channel", "Parameters"]


class Channel(data.Struct):
    """Parameters of one output channel, without padding."""

    bias: signed(32)
    multiplier: 16
    shift: 6


class Parameters(wiring.Component):
    """Fetches the parameter words of one output group after another into a ring buffer, once for
    each token group, up to `depth` words ahead.

    One word per cycle, while there is room and `read` accepts addresses.

    Members
    -------
    start : In(1)
        One cycle, with `fields` and `count` valid; `fields` are held.
    fields : In(fields_layout(Opcode.LINEAR))
    count : In(13)
        Rows of the instruction, at least 1.
    read : Out(ReadPort(parameter_layout(config)))
    ready : Out(1)
        One cycle for each output group: its words are in the buffer.
    tail : Out(range(outputs // lanes + 1))
        Words of the last output group, from its `ready` on.
    at : In(range(depth))
        Position in the buffer, which counts on from 0 since reset.
    word : Out(data.ArrayLayout(Channel, lanes))
        The word there, one cycle later.
    release : In(1)
        The oldest word is not needed any more.
    """

    def __init__(self, config: Config):
        self.config = config
        self.depth = max(32, 2 << (config.outputs // config.lanes - 1).bit_length())
        super().__init__({
            "start": In(1),
            "fields": In(fields_layout(Opcode.LINEAR)),
            "count": In(13),
            "read": Out(ReadPort(parameter_layout(config))),
            "ready": Out(1),
            "tail": Out(range(config.outputs // config.lanes + 1)),
            "at": In(range(self.depth)),
            "word": Out(data.ArrayLayout(Channel, config.lanes)),
            "release": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, fields = self.config, self.fields
        words = config.outputs // config.lanes

        rows, left, word = Signal(13), Signal(16), Signal(range(words))
        room = Signal(range(self.depth + 1), init=self.depth)
        address = Signal(20)
        taken, pass_done, group_done = Signal(), Signal(), Signal()
        m.d.comb += [
            self.read.address.valid.eq((rows != 0) & (room != 0)),
            self.read.address.payload.eq(address),
            taken.eq(self.read.address.valid & self.read.address.ready),
            pass_done.eq(left <= config.lanes),
            group_done.eq(pass_done | (word == words - 1)),
        ]
        m.d.sync += room.eq(room - taken + self.release)
        with m.If(self.start):
            m.d.sync += [rows.eq(self.count), left.eq(fields.channels), address.eq(fields.param)]
        with m.Elif(taken):
            m.d.sync += [address.eq(address + 1), left.eq(left - config.lanes), word.eq(word + 1)]
            with m.If(group_done):
                m.d.sync += word.eq(0)
            with m.If(pass_done):
                m.d.sync += [address.eq(fields.param), left.eq(fields.channels), rows.eq(0)]
                with m.If(rows > config.tokens):
                    m.d.sync += rows.eq(rows - config.tokens)
                # Only the last output group can be shorter than the others, so this one is it.
                m.d.sync += self.tail.eq(word + 1)

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
