"""First stage, front: which query and key words to read."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import HEAD_WORDS, Opcode
from ..interfaces import READ_LATENCY, activation_address, fields_layout
from ..slices import RegisterSlice
from .shapes import Arrival, Group, delayed

__all__ = ["KeyReader"]


class KeyReader(wiring.Component):
    """Takes instructions and reads, for one group of `queries` rows after another, the group's
    query words by row and then its key words by key.

    One word a cycle, plus one cycle between groups. The next instruction is taken as soon as the
    last word of the one before was read, but at most two are in flight. The keys of a group wait
    until one of the two score buffers is free. A word refused by `address` holds everything.

    Members
    -------
    instruction : In(stream.Signature(fields_layout(Opcode.ATTENTION)))
    address : Out(stream.Signature(activation_address(config)))
    arrives : Out(1)
        A word arrives in this cycle, `READ_LATENCY` cycles after its address was accepted.
    arrival : Out(Arrival(config))
        What the arriving word is.
    groups : Out(stream.Signature(Group(config)))
        Every group, when its first key is read.
    released : In(1)
        A score buffer becomes free.
    retired : In(1)
        The oldest instruction in flight is done.
    nothing : Out(1)
        The only instruction in flight is done because it has no rows, keys or words.
    in_flight : Out(2)
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(fields_layout(Opcode.ATTENTION))),
            "address": Out(stream.Signature(activation_address(config))),
            "arrives": Out(1), "arrival": Out(Arrival(config)),
            "groups": Out(stream.Signature(Group(config))),
            "released": In(1), "retired": In(1), "nothing": Out(1),
            "in_flight": Out(2),
        })

    def elaborate(self, platform):
        m = Module()
        queries = self.config.queries
        fields = Signal(fields_layout(Opcode.ATTENTION))
        last_word = Signal(range(HEAD_WORDS))

        # The group, and the addresses of its next query row and result row.
        remaining = Signal(13)
        rows = Signal(range(queries + 1))
        last_key = Signal(13)
        over = Signal(signed(15))
        query_row, key_row, result_row, destination = (Signal(20) for _ in range(4))

        # The next word to read.
        cursor = Signal(20)
        word = Signal(range(HEAD_WORDS))
        row = Signal(range(queries + 1))
        key = Signal(13)
        key_over = Signal(signed(15))
        opening = Signal()  # the group has no score buffer yet
        buffers = Signal(2, init=2)  # free score buffers

        emit, take = Signal(), Signal()
        word_ends = Signal()
        tag = Signal(Arrival(self.config))
        m.d.comb += [
            word_ends.eq(word == last_word),
            tag.row.eq(row), tag.word.eq(word),
            tag.first.eq(word == 0), tag.last.eq(word_ends), tag.end.eq(key == last_key),
            tag.hidden.eq(Cat(fields.causal & (key_over > r) for r in range(queries))),
        ]
        free = self._issue(m, cursor, tag, emit)
        m.d.sync += self.in_flight.eq(self.in_flight + take - (self.retired | self.nothing))

        after_row, after_key = Signal(20), Signal(20)
        m.d.comb += [after_row.eq(query_row + fields.stride), after_key.eq(key_row + fields.stride)]

        opens = Signal()
        m.d.sync += buffers.eq(buffers + self.released - opens)
        m.d.comb += [
            self.groups.p.rows.eq(rows), self.groups.p.last_key.eq(last_key),
            self.groups.p.over.eq(over), self.groups.p.final.eq(remaining == rows),
            self.groups.p.destination.eq(destination),
        ]
        for name in ("causal", "words", "value", "stride", "destination_stride", "multiplier",
                     "shift", "out_multiplier", "out_shift"):
            m.d.comb += self.groups.p[name].eq(fields[name])

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [
                    self.instruction.ready.eq(self.in_flight != 2),
                    take.eq(self.instruction.valid & self.instruction.ready),
                ]
                with m.If(take):
                    m.d.sync += [
                        fields.eq(self.instruction.payload),
                        remaining.eq(self.instruction.p.rows),
                        over.eq(self.instruction.p.rows - self.instruction.p.keys),
                        last_word.eq(self.instruction.p.words - 1),
                        query_row.eq(self.instruction.p.query),
                        result_row.eq(self.instruction.p.destination),
                    ]
                    m.next = "GROUP"

            with m.State("GROUP"):
                m.d.sync += [
                    rows.eq(Mux(remaining > queries, queries, remaining)),
                    row.eq(0), cursor.eq(query_row), destination.eq(result_row),
                ]
                with m.If((fields.rows == 0) | (fields.keys == 0) | (fields.words == 0)):
                    m.next = "NOTHING"
                with m.Else():
                    m.next = "QUERIES"

            with m.State("NOTHING"):
                m.d.comb += self.nothing.eq(self.in_flight == 1)
                with m.If(self.nothing):
                    m.next = "IDLE"

            with m.State("QUERIES"):
                # The last key that the group's last row sees; key 0 if there is none.
                last_seen = Signal(signed(16))
                m.d.comb += [
                    emit.eq(1), tag.query.eq(1),
                    last_seen.eq(Mux(fields.causal, rows - over, fields.keys) - 1),
                ]
                m.d.sync += last_key.eq(Mux(last_seen < 0, 0, last_seen))
                with m.If(free):
                    m.d.sync += [word.eq(word + 1), cursor.eq(cursor + 1)]
                    with m.If(word_ends):
                        m.d.sync += [
                            word.eq(0), row.eq(row + 1), cursor.eq(after_row),
                            query_row.eq(after_row),
                            result_row.eq(result_row + fields.destination_stride),
                        ]
                        with m.If(row == rows - 1):
                            m.d.sync += [cursor.eq(fields.key), key_row.eq(fields.key),
                                         key.eq(0), key_over.eq(over), opening.eq(1)]
                            m.next = "KEYS"

            with m.State("KEYS"):
                m.d.comb += [
                    emit.eq(~opening | ((buffers != 0) & self.groups.ready)),
                    opens.eq(opening & emit & free),
                    self.groups.valid.eq(opening & (buffers != 0) & free),
                ]
                with m.If(free & emit):
                    m.d.sync += [opening.eq(0), word.eq(word + 1), cursor.eq(cursor + 1)]
                    with m.If(word_ends):
                        m.d.sync += [
                            word.eq(0), cursor.eq(after_key), key_row.eq(after_key),
                            key.eq(key + 1), key_over.eq(key_over + 1),
                        ]
                        with m.If(key == last_key):
                            m.d.sync += [remaining.eq(remaining - rows), over.eq(over - queries)]
                            with m.If(remaining == rows):
                                m.next = "IDLE"
                            with m.Else():
                                m.next = "GROUP"
        return m

    def _issue(self, m, cursor, tag, emit):
        """Sends the address `cursor` with its tag when `emit`; returns whether one can be taken."""
        address = activation_address(self.config)
        layout = data.StructLayout({"address": address, "tag": Arrival(self.config)})
        m.submodules.sent = sent = RegisterSlice(layout)
        accepted = Signal()
        m.d.comb += [
            sent.input.valid.eq(emit),
            sent.input.p.address.eq(address.of(cursor)), sent.input.p.tag.eq(tag),
            self.address.valid.eq(sent.output.valid), sent.output.ready.eq(self.address.ready),
            self.address.payload.eq(sent.output.p.address),
            accepted.eq(self.address.valid & self.address.ready),
            self.arrives.eq(delayed(m, accepted, READ_LATENCY, name="arrives", reset_less=False)),
            self.arrival.eq(delayed(m, sent.output.p.tag, READ_LATENCY, name="arrival")),
        ]
        return sent.input.ready
