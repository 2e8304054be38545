"""Instruction fetch and dispatch."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from .arch.config import Config
from .arch.isa import BYTES, FIELDS, HEADER, Engine, Opcode
from .interfaces import fields_layout
from .ports import Burst

__all__ = ["Fetch", "dispatched_layout"]

BURST_BYTES = 256  # a power of two that divides a page; the buffer holds two


def dispatched_layout(opcode: Opcode) -> data.StructLayout:
    """An instruction on its way to its engine: what the sequencer uses, what the engine does."""
    return data.StructLayout({"wait": 5, "signal": 5, "conditional": 1,
                              "fields": fields_layout(opcode)})


class Fetch(wiring.Component):
    """Reads instructions from `program` on and hands each to its engine, in program order.

    An instruction goes out every ``32 / bus_bytes + 1`` cycles, two on wider buses every three,
    unless its engine's queue refuses it, which holds all that follow. Bursts are of `BURST_BYTES`
    bytes or up to the next multiple of these, and one is requested while the one before is used.
    END, and an opcode that does not exist, stop the dispatch; what was read beyond is thrown away.

    Members
    -------
    start : In(1)
        Starts at `program`; only while `idle`.
    program : In(32)
        Byte address, a multiple of `layout.ALIGNMENT`.
    stop : In(1)
        Ends the dispatch at once.
    read_command : Out(stream.Signature(Burst))
    read_data : In(stream.Signature(8 * bus_bytes))
        Never refused: requested only when there is room.
    load : Out(stream.Signature(dispatched_layout(Opcode.LOAD)))
    linear : Out(stream.Signature(dispatched_layout(Opcode.LINEAR)))
    attention : Out(stream.Signature(dispatched_layout(Opcode.ATTENTION)))
    norm : Out(stream.Signature(dispatched_layout(Opcode.NORM)))
    store : Out(stream.Signature(dispatched_layout(Opcode.STORE)))
    dispatched : Out(1)
        Pulses for each instruction that goes out, END included.
    blocked : Out(1)
        A queue refuses the next instruction.
    illegal : Out(1)
        The run stopped at an opcode that does not exist; until the next start.
    idle : Out(1)
        Nothing more will be dispatched, and no read is under way.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "start": In(1), "program": In(32), "stop": In(1),
            "read_command": Out(stream.Signature(Burst)),
            "read_data": In(stream.Signature(8 * config.bus_bytes)),
            **{engine.name.lower(): Out(stream.Signature(dispatched_layout(Opcode(engine))))
               for engine in Engine},
            "dispatched": Out(1), "blocked": Out(1), "illegal": Out(1), "idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        running, taken = Signal(), Signal()
        word, valid = self._instruction(m, running, taken)

        header, offset = {}, 0
        for name, width in HEADER:
            header[name] = word[offset:offset + width]
            offset += width
        for engine in Engine:
            out = getattr(self, engine.name.lower())
            length = sum(width for _, width in FIELDS[Opcode(engine)])
            m.d.comb += [out.p[name].eq(header[name]) for name in ("wait", "signal", "conditional")]
            m.d.comb += out.p.fields.eq(Cat(word[offset:offset + length], header["expert"]))

        m.d.comb += [self.blocked.eq(valid & ~taken),
                     self.dispatched.eq(taken)]
        with m.If(valid):
            with m.Switch(header["opcode"]):
                for engine in Engine:
                    out = getattr(self, engine.name.lower())
                    with m.Case(engine):
                        m.d.comb += [out.valid.eq(1), taken.eq(out.ready)]
                with m.Case(Opcode.END):
                    m.d.comb += taken.eq(1)
                    m.d.sync += running.eq(0)
                with m.Default():
                    m.d.comb += self.blocked.eq(0)
                    m.d.sync += [running.eq(0), self.illegal.eq(1)]
        with m.If(self.stop):
            m.d.sync += running.eq(0)
        with m.If(self.start):
            m.d.sync += [running.eq(1), self.illegal.eq(0)]
        return m

    def _instruction(self, m, running, taken):
        """The next instruction as 256 bits, and whether it is there; `taken` moves on."""
        bus_bits, bits = 8 * self.config.bus_bytes, 8 * BYTES
        word, word_valid, word_taken = self._prefetch(m, running)
        window = Signal(max(bus_bits, bits))
        have, valid = Signal(range(max(bits // bus_bits, bus_bits // bits) + 1)), Signal()
        if bus_bits <= bits:  # `have` counts bus words of an instruction
            filled, emptied, used = have + 1, 0, window
            fills = have == bits // bus_bits - 1
            joined = Cat(window, word)[bus_bits:]
        else:  # `have` counts instructions of a bus word
            filled, emptied, used = bus_bits // bits, have - 1, window >> bits
            fills = 1
            joined = word
        # `taken`, which the queues decide late, implies `valid`, and enables nothing wide on the way
        # from buses narrower than an instruction.
        with m.If(word_valid & ~valid):
            m.d.sync += [have.eq(filled), valid.eq(fills), window.eq(joined)]
        with m.Elif(taken):
            m.d.sync += [have.eq(emptied), valid.eq(emptied != 0), window.eq(used)]
        with m.If(~running):  # never full, so that it swallows what is still to come
            m.d.sync += [have.eq(0), valid.eq(0)]
        m.d.comb += word_taken.eq(~valid)
        return window[:bits], running & valid

    def _prefetch(self, m, running):
        """Bus words in order: the next one, whether it is there, and a signal that takes it."""
        shift = self.config.bus_bytes.bit_length() - 1
        beats = BURST_BYTES >> shift
        low = beats.bit_length() - 1
        m.submodules.words = words = SyncFIFOBuffered(width=8 * self.config.bus_bytes,
                                                      depth=2 * beats)
        position = Signal(32 - shift)  # of the next burst, in bus words
        reserved = Signal(range(2 * beats + 1))  # bus words asked for and not yet taken

        command = self.read_command
        length = beats - position[:low]
        # Only once a word of the last burst is taken: what came before that held no END.
        ask = running & ~command.valid & (reserved < beats)
        with m.If(ask):
            m.d.sync += [command.valid.eq(1), command.p.address.eq(position << shift),
                         command.p.beats.eq(length), position.eq(position + length)]
        with m.Elif(command.ready):
            m.d.sync += command.valid.eq(0)
        with m.If(self.start):
            m.d.sync += position.eq(self.program >> shift)
        m.d.sync += reserved.eq(reserved + Mux(ask, length, 0) - (words.r_rdy & words.r_en))

        m.d.comb += [
            words.w_data.eq(self.read_data.payload), words.w_en.eq(self.read_data.valid),
            self.read_data.ready.eq(1), self.idle.eq(~running & (reserved == 0)),
        ]
        return words.r_data, words.r_rdy, words.r_en
