"""The array of dot products."""

from itertools import pairwise

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY
from ..shared_multiply import SharedMultipliers
from .fill import TileWrite

__all__ = ["FIELD", "TERMS", "DotArray", "Work"]

_LEVELS = 1  # levels of an adder tree between registers

# Two weights w1, w0 of 4 bits make one operand ``w1 * 2**FIELD + w0`` of 18 bits, and its products
# with activations can be added, TERMS of them, before the two sums are told apart: that of w0 lies
# within TERMS * 128 * 7 = 7168 < 2**(FIELD - 1).
FIELD = 14
TERMS = 8


class Work(data.StructLayout):
    """What the array does in a cycle: sums the products of one tile word of each token row with
    one word of weights."""

    def __init__(self, config: Config):
        super().__init__({
            "enable": 1,
            "first": 1,  # of an output group: the accumulators start over
            "last": 1,  # of an output group: the results move on
            "address": range(2 * config.row_words),
            **({"narrow": 1} if config.narrow else {}),
        })


class DotArray(wiring.Component):
    """``tokens * outputs`` accumulated dot products, each `depth` wide, behind the tile memory;
    with narrow weights twice as many: those of the low halves of the bytes, then of the high ones.

    The token rows share their weights: without narrow weights, two of them share a DSP48E2.

    One word of `Work` per cycle, without stalls. The sums of an output group are results
    `latency` cycles after their last word and stay until the next group's; `load` announces them
    one cycle ahead.

    Parameters
    ----------
    primitive : as for `Multipliers`

    Members
    -------
    tile : In(TileWrite(config))
    work : In(Work(config))
    weights : In(8 * outputs * depth)
        Output-major, `READ_LATENCY` cycles after their `Work`.
    load : Out(1)
    row : In(range(tokens))
        Which results to show.
    word : In(range(words))
    results : Out(data.ArrayLayout(signed(32), lanes))
        Results ``[row][word * lanes + i]``, one cycle after `row` and `word`.
    """

    OPERANDS = READ_LATENCY + 1  # cycles from `work` to the multipliers' operands

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        stages = _stages(config.depth)
        if config.narrow:
            self.separate_at = (self.OPERANDS + SharedMultipliers.LATENCY
                                + _stages(min(TERMS, config.depth)))
            stages = (_stages(min(TERMS, config.depth)) + 1
                      + _stages(-(-config.depth // TERMS)))
        self.latency = self.OPERANDS + SharedMultipliers.LATENCY + stages + 1
        words = (config.outputs // config.lanes) << config.narrow
        super().__init__({
            "tile": In(TileWrite(config)),
            "work": In(Work(config)),
            "weights": In(8 * config.outputs * config.depth),
            "load": Out(1),
            "row": In(range(config.tokens)),
            "word": In(range(words)),
            "results": Out(data.ArrayLayout(signed(32), config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        tokens, outputs, depth = config.tokens, config.outputs, config.depth

        operand = signed(18 if config.narrow else 8)
        m.submodules.multiply = multiply = SharedMultipliers(
            signed(8), operand, tokens, outputs * depth, primitive=self.primitive)
        m.d.comb += multiply.advance.eq(1)

        # `work` now and after 1 to `latency` - 1 cycles, as its words, weights and sums come.
        flags = [self.work]
        for _ in range(self.latency - 1):
            before, after = flags[-1], Signal(self.work.shape(), name="flags")
            m.d.sync += [after[name].eq(before[name]) for name, _ in self.work.shape()
                         if name != "address"]
            flags.append(after)
        m.d.comb += self.load.eq(flags[-1].enable & flags[-1].last)

        # A register on the way from the memories to the multipliers, which lie all over the device.
        sent = Signal(len(self.weights), reset_less=True)
        m.d.sync += sent.eq(self.weights)
        weights = data.View(data.ArrayLayout(8, outputs * depth), sent)
        for i in range(outputs * depth):
            weight = Signal(operand, name=f"weight_{i}")
            m.d.comb += weight.eq(weights[i].as_signed())
            if config.narrow:
                with m.If(flags[self.OPERANDS].narrow):
                    m.d.comb += weight.eq(_packed(weights[i]))
            m.d.comb += multiply.b[i].eq(weight)
        for token in range(tokens):
            row = self._tile_bank(m, token)
            for i in range(outputs * depth):
                m.d.comb += multiply.a[i][token].eq(row[i % depth])

        # Sums by token, within it first those of the low halves, then those of the high ones.
        halves = 1 + config.narrow
        drain = Signal(data.ArrayLayout(signed(32), tokens * halves * outputs), reset_less=True)
        for token in range(tokens):
            for output in range(outputs):
                products = [multiply.product[output * depth + i][token] for i in range(depth)]
                totals = ([_tree(m, products)] if not config.narrow else
                          self._separated(m, products, flags[self.separate_at].narrow))
                for half, total in enumerate(totals):
                    self._accumulate(m, flags[-1], total,
                                     drain[(token * halves + half) * outputs + output])

        words = data.ArrayLayout(self.results.shape(), halves * outputs // config.lanes)
        rows = data.View(data.ArrayLayout(words, tokens), drain.as_value())
        m.d.sync += self.results.eq(rows[self.row][self.word])
        return m

    def _accumulate(self, m, flags, total, result):
        accumulator, after = Signal(signed(32), reset_less=True), Signal(signed(32))
        m.d.comb += after.eq(Mux(flags.first, 0, accumulator) + total)
        with m.If(flags.enable):
            m.d.sync += accumulator.eq(after)
        with m.If(self.load):
            m.d.sync += result.eq(after)

    def _separated(self, m, products, narrow):
        """The sums of the low and of the high halves; the first is that of all, if not `narrow`."""
        size = min(TERMS, len(products))
        products = products + [Const(0, signed(1))] * (-len(products) % size)
        sums = []
        for first in range(0, len(products), size):
            both = _tree(m, products[first:first + size])
            low, high = Signal(signed(19), reset_less=True), Signal(signed(FIELD), reset_less=True)
            m.d.sync += [low.eq(Mux(narrow, both[:FIELD].as_signed(), both)),
                         high.eq(both[FIELD:].as_signed() + both[FIELD - 1])]
            sums.append((low, high))
        return [_tree(m, list(half)) for half in zip(*sums)]

    def _tile_bank(self, m, token):
        """One token's bank of the tile memory; its word is `OPERANDS` cycles after `work`."""
        shape = data.ArrayLayout(signed(8), self.config.depth)
        m.submodules[f"tile_{token}"] = memory = Memory(
            shape=shape, depth=2 * self.config.row_words, init=[])
        write, read = memory.write_port(), memory.read_port()
        words = [Signal(shape, reset_less=True, name=f"tile_word_{token}_{i}")
                 for i in range(self.OPERANDS - 2)]
        address = Signal.like(self.work.address, reset_less=True, name=f"tile_address_{token}")
        m.d.comb += [
            write.en.eq(self.tile.enable & (self.tile.bank == token)),
            write.addr.eq(self.tile.address), write.data.eq(self.tile.data),
            read.addr.eq(address),
        ]
        m.d.sync += [address.eq(self.work.address), words[0].eq(read.data)]
        m.d.sync += [after.eq(before) for before, after in pairwise(words)]
        return words[-1]


def _packed(byte):
    """The operand ``w1 * 2**FIELD + w0`` of a byte of two weights, signed(18)."""
    borrow = byte[3]
    return Cat(byte[:4], borrow.replicate(FIELD - 4), byte[4:] - borrow)[:18].as_signed()


def _stages(terms):
    """Registers of `_tree`."""
    return -(-(terms - 1).bit_length() // _LEVELS)


def _tree(m, terms):
    """Sum of the terms, registered after every `_LEVELS` levels of additions and at the end."""
    level = 0
    while len(terms) > 1:
        terms = [sum(terms[i:i + 2][1:], terms[i]) for i in range(0, len(terms), 2)]
        level += 1
        if level % _LEVELS == 0 or len(terms) == 1:
            sums = [Signal(term.shape(), reset_less=True, name="sum") for term in terms]
            m.d.sync += [register.eq(term) for register, term in zip(sums, terms)]
            terms = sums
    return terms[0]
