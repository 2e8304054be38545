"""Second stage, middle: sums of probabilities, and of probability times value."""

from amaranth import Module, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.numerics import PROBABILITY_BITS
from ..shared_multiply import SharedMultipliers
from .shapes import Weights, accumulator_shape, delayed, total_bits

__all__ = ["WeightedSums"]


class WeightedSums(wiring.Component):
    """Adds up, over the keys of a pass, a value word times the probabilities of its key.

    A word a cycle for all rows; `summed` comes `LATENCY` cycles after the last word of a pass.
    Nothing stalls, and the next pass may follow at once.

    Members
    -------
    arrives : In(1)
    weights : In(Weights(config))
    word : In(8 * depth)
        The value word.
    totalled : Out(1)
        `totals` are those of a group, in this cycle.
    totals : Out(data.ArrayLayout(total_bits(config), queries))
        The rows' sums of probabilities.
    summed : Out(1)
        `sums` are those of a pass, in this cycle.
    sums : Out(data.ArrayLayout(accumulator_shape(config), queries * depth))
        By row, then by byte of the word.
    """

    LATENCY = SharedMultipliers.LATENCY + 2

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        super().__init__({
            "arrives": In(1), "weights": In(Weights(config)), "word": In(8 * config.depth),
            "totalled": Out(1),
            "totals": Out(data.ArrayLayout(total_bits(config), config.queries)),
            "summed": Out(1),
            "sums": Out(data.ArrayLayout(accumulator_shape(config), config.queries * config.depth)),
        })

    def elaborate(self, platform):
        m = Module()
        queries, depth = self.config.queries, self.config.depth
        # Words come from many banks of memory and go to many multipliers: a register between.
        arrives = delayed(m, self.arrives, 1, name="arrives", reset_less=False)
        weights = delayed(m, self.weights, 1, name="weights")
        word = delayed(m, data.View(data.ArrayLayout(signed(8), depth), self.word), 1, name="word")

        m.submodules.multipliers = multipliers = SharedMultipliers(
            signed(8), unsigned(PROBABILITY_BITS), depth, queries, primitive=self.primitive)
        m.d.comb += multipliers.advance.eq(1)
        place = Signal(data.StructLayout({"first": 1, "last": 1}))
        m.d.comb += [place.first.eq(weights.first), place.last.eq(weights.last)]
        place = delayed(m, place, SharedMultipliers.LATENCY, name="place")
        multiplied = delayed(m, arrives, SharedMultipliers.LATENCY, name="multiplied",
                             reset_less=False)

        m.d.sync += self.totalled.eq(arrives & weights.last & weights.counted)
        m.d.sync += self.summed.eq(multiplied & place.last)
        for row in range(queries):
            probability, total = weights.probability[row], self.totals[row]
            with m.If(arrives & weights.first):
                m.d.sync += total.eq(probability)
            with m.Elif(arrives):
                m.d.sync += total.eq(total + probability)
            m.d.comb += multipliers.b[row].eq(probability)
            for i in range(depth):
                m.d.comb += multipliers.a[row][i].eq(word[i])
                product, accumulated = multipliers.product[row][i], self.sums[row * depth + i]
                with m.If(multiplied & place.first):
                    m.d.sync += accumulated.eq(product)
                with m.Elif(multiplied):
                    m.d.sync += accumulated.eq(accumulated + product)
        return m
