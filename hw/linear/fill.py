"""Token rows from the activation memory into the tile memory of the array."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY, ReadPort, activation_address
from ..slices import RegisterSlice
from .rows import Row

__all__ = ["Fill", "RowTarget", "TargetWrite", "TileWrite", "groups_kept"]


def groups_kept(config: Config) -> int:
    """Token groups whose row targets are kept: one being filled, one computed, one written back,
    and on small arrays, where several can be in the pipeline, what fits into 16 rows."""
    return max(4, 16 >> (config.tokens - 1).bit_length())


class TileWrite(data.StructLayout):
    """A word for the tile memory: `tokens` banks of two halves of `row_words` words."""

    def __init__(self, config: Config):
        super().__init__({"enable": 1, "bank": range(config.tokens),
                          "address": range(2 * config.row_words), "data": 8 * config.depth})


class RowTarget(data.Struct):
    """Where the results of a row go."""

    destination: 20
    weight: 16
    last: 1  # last row of its token group
    end: 1  # last row of its instruction


class TargetWrite(data.StructLayout):
    """An entry for the memory of row targets."""

    def __init__(self, config: Config):
        super().__init__({"enable": 1, "group": range(groups_kept(config)),
                          "row": range(config.tokens), "target": RowTarget})


class Fill(wiring.Component):
    """Copies the rows of one token group after another into alternating halves of the tile memory.

    One word per cycle, while a half and a place for row targets are free and `read` accepts
    addresses, which are `RegisterSlice.LATENCY` cycles behind the rows. A group is `filled` when its last word is written; nothing is written for the rows
    that a ragged last group lacks. The first row after the last of an instruction begins a group.

    Members
    -------
    rows : In(stream.Signature(Row(config)))
    read : Out(ReadPort(8 * depth, activation_address(config)))
    tile : Out(TileWrite(config))
    target : Out(TargetWrite(config))
        Written before the group is filled.
    filled : Out(1)
        One cycle for each group; the half may be read from the next cycle on.
    counts : Out(data.ArrayLayout(range(tokens + 1), 2))
        Rows in each half, valid one cycle before `filled`.
    ends : Out(2)
        Likewise, whether the half is the last of its instruction.
    release : In(1)
        One cycle for each group: it was read for the last time.
    drained : In(1)
        One cycle for each group: its row targets were read for the last time.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "rows": In(stream.Signature(Row(config))),
            "read": Out(ReadPort(8 * config.depth, activation_address(config))),
            "tile": Out(TileWrite(config)),
            "target": Out(TargetWrite(config)),
            "filled": Out(1),
            "counts": Out(data.ArrayLayout(range(config.tokens + 1), 2)),
            "ends": Out(2),
            "release": In(1),
            "drained": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, row = self.config, self.rows.payload

        groups = groups_kept(config)
        half, group = Signal(), Signal(range(groups))
        occupied, kept = Signal(range(3)), Signal(range(groups + 1))  # halves, row targets
        bank, word = Signal(range(config.tokens)), Signal(13)
        last = Signal()  # as seen from the row's second word on: the word is the last
        taken, row_done, group_done = Signal(), Signal(), Signal()
        tag = data.StructLayout({"bank": bank.shape(), "address": range(2 * config.row_words),
                                 "done": 1})
        address = activation_address(config)
        m.submodules.sent = sent = RegisterSlice(
            data.StructLayout({"address": address, "tag": tag}))
        m.d.comb += [
            sent.input.valid.eq(self.rows.valid & (occupied != 2) & (kept != groups)),
            sent.input.p.address.eq(address.of(row.source + word)),
            sent.input.p.tag.bank.eq(bank), sent.input.p.tag.done.eq(group_done),
            sent.input.p.tag.address.eq(Mux(half, config.row_words + word, word)),
            taken.eq(sent.input.valid & sent.input.ready),
            self.read.address.valid.eq(sent.output.valid),
            self.read.address.payload.eq(sent.output.p.address),
            sent.output.ready.eq(self.read.address.ready),
            row_done.eq(taken & (last | row.single)),
            group_done.eq(row_done & ((bank == config.tokens - 1) | row.end)),
            self.rows.ready.eq(row_done),
        ]
        m.d.sync += [occupied.eq(occupied + group_done - self.release),
                     kept.eq(kept + group_done - self.drained)]
        with m.If(taken):
            m.d.sync += [word.eq(word + 1), last.eq(word + 2 == row.source_words)]
        with m.If(row_done):
            m.d.sync += [word.eq(0), last.eq(0), bank.eq(bank + 1)]
        with m.If(group_done):
            m.d.sync += [bank.eq(0), half.eq(~half), group.eq(group + 1),
                         self.counts[half].eq(bank + 1),
                         self.ends.bit_select(half, 1).eq(row.end)]

        m.d.comb += [
            self.target.enable.eq(row_done), self.target.group.eq(group),
            self.target.row.eq(bank), self.target.target.destination.eq(row.destination),
            self.target.target.weight.eq(row.weight), self.target.target.end.eq(row.end),
            self.target.target.last.eq(group_done),
        ]

        # The tile address travels beside the word on its way out of the memory.
        place = sent.output.p.tag
        arrives = self.read.address.valid & self.read.address.ready
        for _ in range(READ_LATENCY):
            place_before, place = place, Signal(tag, name="place")
            before, arrives = arrives, Signal(name="arrives")
            m.d.sync += [place.eq(place_before), arrives.eq(before)]
        m.d.comb += [self.tile.enable.eq(arrives), self.tile.bank.eq(place.bank),
                     self.tile.address.eq(place.address),
                     self.tile.data.eq(self.read.data.payload),
                     self.filled.eq(arrives & place.done)]
        return m
