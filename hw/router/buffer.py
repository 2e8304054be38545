"""Logits in the order of the linear unit, to logits token by token."""

from amaranth import Array, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import Logits

__all__ = ["Logit", "LogitBuffer", "quotient"]


class Logit(data.Struct):
    """One logit of the current token row; the row's experts come in order."""

    value: signed(32)
    expert: 8
    last: 1  # of its row


def quotient(value, divisor: int, limit: int):
    """``value // divisor`` for a value below `limit`: a table where it is no shift."""
    if divisor & (divisor - 1) == 0:
        return value[divisor.bit_length() - 1:]
    return Array(number // divisor for number in range(limit))[value]


class LogitBuffer(wiring.Component):
    """Holds the logits of two token groups at least, and reads rows back in order, one logit a cycle.

    Each of two readers sends every complete row, from row 0, where `twice` is set, the second with
    `config.router_forms` `times` over; without it the second sends nothing. Logits of a row are refused until the row that has its place was read by
    all. A word is taken in every cycle otherwise; a row's first logit comes 4 cycles after its last
    word, and rows follow one another without a gap.

    Members
    -------
    restart : In(1)
        Forgets all rows; row 0 is next. Logits are refused in this cycle.
    experts : In(range(max_experts + 1))
        Logits of a row; holds still from `restart` on.
    twice : In(1)
        Likewise.
    times : In(5)
        Likewise, at least 1; with `config.router_forms`.
    logits : In(stream.Signature(Logits(config)))
    first : Out(stream.Signature(Logit))
    second : Out(stream.Signature(Logit))
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "restart": In(1), "experts": In(range(config.max_experts + 1)), "twice": In(1),
            "logits": In(stream.Signature(Logits(config))),
            "first": Out(stream.Signature(Logit)),
            "second": Out(stream.Signature(Logit)),
        } | ({"times": In(5)} if config.router_forms else {}))

    def elaborate(self, platform):
        m = Module()
        lanes, experts = self.config.lanes, self.config.max_experts
        # Places and words of a place are rounded up to powers of two: a place is the low bits of a
        # row number, and an address is two fields side by side.
        # The second reader comes late where groups are chosen first: it needs more than a few rows.
        rows = max(2 * self.config.tokens, 8 * self.config.router_forms)
        place_bits = (rows - 1).bit_length()
        word_bits = (-(-experts // lanes) - 1).bit_length()
        m.submodules.memory = memory = Memory(
            shape=32 * lanes, depth=1 << (place_bits + word_bits), init=[])
        write = memory.write_port()

        def address(row, word):
            return (row[:place_bits] << word_bits) | word

        complete = Signal(13)  # rows
        released = Signal(13)
        incoming = self.logits.p
        taken = self.logits.valid & self.logits.ready
        m.d.comb += [
            self.logits.ready.eq(
                ~self.restart & ((incoming.row - released)[:13] < (1 << place_bits))),
            write.addr.eq(address(incoming.row, quotient(incoming.channel, lanes, experts))),
            write.data.eq(incoming.logits),
            write.en.eq(taken),
        ]
        with m.If(taken & (incoming.channel + lanes >= self.experts)):
            m.d.sync += complete.eq(incoming.row + 1)

        first_row = self._scan(m, "first", self.first, memory, address, complete)
        second_row = self._scan(m, "second", self.second, memory, address, complete,
                                enable=self.twice,
                                times=self.times if self.config.router_forms else None)
        with m.If(self.twice):
            m.d.sync += released.eq(second_row)
        with m.Else():
            m.d.sync += released.eq(first_row)
        with m.If(self.restart):
            m.d.sync += [complete.eq(0), released.eq(0)]
        return m

    def _scan(self, m, name, outlet, memory, address, complete, enable=1, times=None):
        """Reads complete rows, each `times` over; the number of the row being read."""
        lanes = self.config.lanes
        read = memory.read_port()
        row = Signal(13, name=f"{name}_row")
        expert = Signal(8, name=f"{name}_expert")
        word = Signal(range(max(2, self.config.max_experts)), name=f"{name}_word")
        lane = Signal(range(lanes), name=f"{name}_lane")
        place = Signal(range(lanes), name=f"{name}_place")
        tag = data.StructLayout({"valid": 1, "expert": 8, "last": 1})
        asked, read_tag = Signal(tag, name=f"{name}_asked"), Signal(tag, name=f"{name}_read")

        advance = ~outlet.valid | outlet.ready
        last = expert + 1 == self.experts
        through = 1  # with the row
        if times is not None:
            time = Signal(5, name=f"{name}_time")
            through = time + 1 == times
            with m.If(advance & asked.valid & last):
                m.d.sync += time.eq(Mux(through, 0, time + 1))
        m.d.comb += [
            asked.valid.eq(enable & (row != complete)), asked.expert.eq(expert),
            asked.last.eq(last),
            read.addr.eq(address(row, word)), read.en.eq(advance),
        ]
        with m.If(advance):
            m.d.sync += [
                read_tag.eq(asked), place.eq(lane),
                outlet.valid.eq(read_tag.valid),
                outlet.p.value.eq(read.data.word_select(place, 32).as_signed()),
                outlet.p.expert.eq(read_tag.expert), outlet.p.last.eq(read_tag.last),
            ]
            with m.If(asked.valid):
                m.d.sync += [expert.eq(expert + 1), lane.eq(lane + 1)]
                with m.If(lane == lanes - 1):
                    m.d.sync += [lane.eq(0), word.eq(word + 1)]
                with m.If(last):
                    m.d.sync += [expert.eq(0), lane.eq(0), word.eq(0), row.eq(row + through)]
        with m.If(self.restart):
            m.d.sync += [row.eq(0), expert.eq(0), lane.eq(0), word.eq(0)]
        return row
