"""The array of dot products."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import READ_LATENCY
from ..multiply import Multipliers
from .fill import TileWrite

__all__ = ["DotArray", "Work"]

_LEVELS = 2  # levels of an adder tree between registers


class Work(data.StructLayout):
    """What the array does in a cycle: sums the products of one tile word of each token row with
    one word of weights."""

    def __init__(self, config: Config):
        super().__init__({
            "enable": 1,
            "first": 1,  # of an output group: the accumulators start over
            "last": 1,  # of an output group: the results move on
            "address": range(2 * config.row_words),
        })


class DotArray(wiring.Component):
    """``tokens * outputs`` accumulated dot products, each `depth` wide, behind the tile memory.

    One word of `Work` per cycle, without stalls. The sums of an output group are results
    `latency` cycles after their last word and stay until the next group's; `load` announces them
    one cycle ahead.

    Members
    -------
    tile : In(TileWrite(config))
    work : In(Work(config))
    weights : In(8 * outputs * depth)
        Output-major, `READ_LATENCY` cycles after their `Work`.
    load : Out(1)
    row : In(range(tokens))
        Which results to show.
    word : In(range(outputs // lanes))
    results : Out(data.ArrayLayout(signed(32), lanes))
        Results ``[row][word * lanes + i]``, one cycle after `row` and `word`.
    """

    def __init__(self, config: Config):
        self.config = config
        stages = -(-(config.depth - 1).bit_length() // _LEVELS)
        self.latency = READ_LATENCY + Multipliers.LATENCY + stages + 1
        super().__init__({
            "tile": In(TileWrite(config)),
            "work": In(Work(config)),
            "weights": In(8 * config.outputs * config.depth),
            "load": Out(1),
            "row": In(range(config.tokens)),
            "word": In(range(config.outputs // config.lanes)),
            "results": Out(data.ArrayLayout(signed(32), config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        tokens, outputs, depth = config.tokens, config.outputs, config.depth

        m.submodules.multiply = multiply = Multipliers(
            signed(8), signed(8), tokens * outputs * depth)
        m.d.comb += multiply.advance.eq(1)
        weights = data.View(data.ArrayLayout(signed(8), outputs * depth), self.weights)
        for token in range(tokens):
            row = self._tile_bank(m, token)
            for output in range(outputs):
                for i in range(depth):
                    at = (token * outputs + output) * depth + i
                    m.d.comb += [multiply.a[at].eq(row[i]),
                                 multiply.b[at].eq(weights[output * depth + i])]

        # `enable`, `first` and `last` as the sums come out of the trees.
        flags = self.work
        for _ in range(self.latency - 1):
            before, flags = flags, Signal(self.work.shape(), name="flags")
            m.d.sync += [flags.enable.eq(before.enable), flags.first.eq(before.first),
                         flags.last.eq(before.last)]
        m.d.comb += self.load.eq(flags.enable & flags.last)

        drain = Signal(data.ArrayLayout(signed(32), tokens * outputs), reset_less=True)
        for at in range(tokens * outputs):
            total = _tree(m, [multiply.product[at * depth + i] for i in range(depth)])
            accumulator = Signal(signed(32), reset_less=True, name=f"accumulator_{at}")
            after = Signal(signed(32), name=f"after_{at}")
            m.d.comb += after.eq(Mux(flags.first, 0, accumulator) + total)
            with m.If(flags.enable):
                m.d.sync += accumulator.eq(after)
            with m.If(self.load):
                m.d.sync += drain[at].eq(after)

        words = data.ArrayLayout(self.results.shape(), outputs // config.lanes)
        rows = data.View(data.ArrayLayout(words, tokens), drain.as_value())
        m.d.sync += self.results.eq(rows[self.row][self.word])
        return m

    def _tile_bank(self, m, token):
        """One token's bank of the tile memory; its word is `READ_LATENCY` cycles after `work`."""
        shape = data.ArrayLayout(signed(8), self.config.depth)
        m.submodules[f"tile_{token}"] = memory = Memory(
            shape=shape, depth=2 * self.config.row_words, init=[])
        write, read = memory.write_port(), memory.read_port()
        word = Signal(shape, reset_less=True, name=f"tile_word_{token}")
        address = Signal.like(self.work.address, reset_less=True, name=f"tile_address_{token}")
        m.d.comb += [
            write.en.eq(self.tile.enable & (self.tile.bank == token)),
            write.addr.eq(self.tile.address), write.data.eq(self.tile.data),
            read.addr.eq(address),
        ]
        m.d.sync += [address.eq(self.work.address), word.eq(read.data)]
        return word


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
