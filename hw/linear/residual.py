"""Saturating addition into the residual memory."""

from amaranth import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from ..arch.config import Config
from ..interfaces import READ_LATENCY, Masked, ReadPort, WritePort
from ..slices import RegisterSlice

__all__ = ["ResidualUpdate", "Update", "key_of"]

KEY_BITS = 8


class Update(data.StructLayout):
    """A word for the residual memory, to write or to add."""

    def __init__(self, config: Config):
        super().__init__({"word": Masked(16, config.lanes), "accumulate": 1,
                          "end": 1,  # last of its instruction
                          "key": KEY_BITS})  # `key_of` its address


def key_of(address: Value) -> Value:
    """By what addresses in work are told apart: equal for equal ones. Folded, so that neither words of
    a row nor those of rows that lie a power of two apart have the same; comparing all bits with every
    word in work was the longest path of the linear unit."""
    return address[:8] ^ address[8:16] ^ address[16:]


class ResidualUpdate(wiring.Component):
    """Writes words to the residual memory, or adds them to what is there, saturated to 16 bits.

    One word per cycle while the ports accept; an addition takes READ_LATENCY + 4 cycles. A word that
    is still being added to holds back the next addition to the same word, or one of the same key, and
    all additions a word that is only written, so that the order of writes is the order of `updates`.

    Members
    -------
    updates : In(stream.Signature(Update(config)))
    busy : Out(1)
        Additions are in work.
    ended : Out(1)
        An update with `end` is written in this cycle.
    read : Out(ReadPort(16 * lanes))
    write : Out(WritePort(16, lanes))
    """

    SLOTS = READ_LATENCY + RegisterSlice.LATENCY + 2

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "updates": In(stream.Signature(Update(config))),
            "busy": Out(1),
            "ended": Out(1),
            "read": Out(ReadPort(16 * config.lanes)),
            "write": Out(WritePort(16, config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        updates, read, write = self.updates, self.read, self.write.write
        update = updates.payload

        # A ring of words in work: taken, then added to, then written, each in order.
        busy, added = Signal(self.SLOTS), Signal(self.SLOTS)
        working = Signal(range(self.SLOTS + 1))  # words in the ring; `self.busy` says whether any
        keys = Signal(data.ArrayLayout(KEY_BITS, self.SLOTS))
        take, add, retire = (Signal(range(self.SLOTS), name=name)
                             for name in ("take", "add", "retire"))
        conflict = Cat(busy[i] & (keys[i] == update.key)
                       for i in range(self.SLOTS)).any()
        lanes = data.ArrayLayout(signed(16), self.config.lanes)
        word = data.StructLayout({"word": update.word.shape(), "end": 1})
        m.submodules.words = words = Memory(shape=word, depth=self.SLOTS, init=[])
        m.submodules.sums = sums = Memory(shape=lanes, depth=self.SLOTS, init=[])
        put_word, put_sum = words.write_port(), sums.write_port()
        adding, retiring = words.read_port(domain="comb"), words.read_port(domain="comb")
        total = sums.read_port(domain="comb")
        # What is compared here, and arbitration of the port, are apart.
        m.submodules.asked = asked = RegisterSlice(20)
        taken, retired = Signal(), Signal()
        m.d.comb += [
            asked.input.valid.eq(updates.valid & update.accumulate & ~conflict
                                 & ~busy.bit_select(take, 1)),
            asked.input.payload.eq(update.word.address),
            taken.eq(asked.input.valid & asked.input.ready),
            retired.eq(self.busy & write.valid & write.ready),
        ]
        m.d.sync += working.eq(working + taken - retired)
        with m.If(taken):
            m.d.sync += self.busy.eq(1)
        with m.Elif(retired):
            m.d.sync += self.busy.eq(working != 1)
        connect(m, asked.output, flipped(read.address))
        end = Signal()
        with m.If(self.busy):
            m.d.comb += [write.payload.eq(retiring.data.word), write.p.data.eq(total.data),
                         write.valid.eq((busy & added).bit_select(retire, 1)),
                         end.eq(retiring.data.end)]
        with m.Else():
            m.d.comb += [write.payload.eq(update.word), end.eq(update.end),
                         write.valid.eq(updates.valid & ~update.accumulate)]
        m.d.comb += [updates.ready.eq(Mux(update.accumulate, taken, write.ready & ~self.busy)),
                     self.ended.eq(write.valid & write.ready & end)]

        arrives = read.address.valid & read.address.ready
        for _ in range(READ_LATENCY):
            before, arrives = arrives, Signal(name="arrives")
            m.d.sync += arrives.eq(before)
        theirs = data.View(lanes, read.data.payload)
        ours = data.View(lanes, adding.data.word.data)
        m.d.comb += [
            put_word.en.eq(taken), put_word.addr.eq(take), put_word.data.word.eq(update.word),
            put_word.data.end.eq(update.end),
            adding.addr.eq(add), retiring.addr.eq(retire), total.addr.eq(retire),
            put_sum.en.eq(arrives), put_sum.addr.eq(add),
            put_sum.data.eq(Cat(_add(a, b) for a, b in zip(ours, theirs))),
        ]
        with m.If(retired):
            m.d.sync += [busy.bit_select(retire, 1).eq(0), retire.eq(_next(retire, self.SLOTS))]
        with m.If(taken):
            m.d.sync += [busy.bit_select(take, 1).eq(1), added.bit_select(take, 1).eq(0),
                         keys[take].eq(update.key), take.eq(_next(take, self.SLOTS))]
        with m.If(arrives):
            m.d.sync += [added.bit_select(add, 1).eq(1), add.eq(_next(add, self.SLOTS))]
        return m


def _next(pointer, slots):
    return Mux(pointer == slots - 1, 0, pointer + 1)


def _add(a, b):
    """Sum of two int16, saturated."""
    total = a + b
    return Mux(total[15] == total[16], total[:16], Mux(total[16], 0x8000, 0x7FFF))
