"""First stage, back: the scores of a key, and the maximum of each row."""

from amaranth import Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import HEAD_WORDS
from ..shared_multiply import SharedMultipliers
from .shapes import Arrival, delayed, score_shape

__all__ = ["ScoreLanes"]


class ScoreLanes(wiring.Component):
    """Holds a group's query words and multiplies them with the key words that arrive.

    A key word a cycle against all rows; the scores of a key appear `latency` cycles after its last
    word. Nothing stalls. The maxima hold from the group's last score to the first score of the next
    group; key 0 counts as seen by every row.

    Members
    -------
    arrives : In(1)
    arrival : In(Arrival(config))
    word : In(8 * depth)
        The arriving word.
    scored : Out(1)
        The scores of the group's next key, to be stored.
    scores : Out(data.ArrayLayout(score_shape(config), queries))
    maxima : Out(data.ArrayLayout(score_shape(config), queries))
    ended : Out(1)
        Those were the group's last scores; the maxima cover them one cycle later.
    """

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        self.latency = 3 + SharedMultipliers.LATENCY + (config.depth - 1).bit_length()
        scores = data.ArrayLayout(score_shape(config), config.queries)
        super().__init__({
            "arrives": In(1), "arrival": In(Arrival(config)), "word": In(8 * config.depth),
            "scored": Out(1), "scores": Out(scores), "maxima": Out(scores), "ended": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        depth, queries = self.config.depth, self.config.queries
        bytes_ = data.ArrayLayout(signed(8), depth)

        # The query words are read when a key word arrives, so that a key word can follow the last
        # query word directly, and meet it after the register behind their memory.
        key = delayed(m, data.View(bytes_, self.word), 2, name="key")
        m.submodules.multipliers = multipliers = SharedMultipliers(
            signed(8), signed(8), queries, depth, primitive=self.primitive)
        m.d.comb += multipliers.advance.eq(1)
        m.d.comb += [multipliers.b[column].eq(key[column]) for column in range(depth)]

        # Steps from an arrival to the sum over its word, and on to the score.
        to_sum = self.latency - 1
        is_key = Signal()
        m.d.comb += is_key.eq(self.arrives & ~self.arrival.query)
        summed = delayed(m, is_key, to_sum, name="summed", reset_less=False)
        carried = {"first": 1, "last": 1, "end": 1, "hidden": queries}
        place = Signal(data.StructLayout(carried))
        m.d.comb += [place[name].eq(self.arrival[name]) for name in carried]
        place = delayed(m, place, to_sum, name="place")
        hidden = Signal(queries, reset_less=True)
        m.d.sync += [
            self.scored.eq(summed & place.last),
            self.ended.eq(summed & place.last & place.end),
            hidden.eq(place.hidden),
        ]

        opening = Signal(init=1)  # no score of the group has come yet
        with m.If(self.scored):
            m.d.sync += opening.eq(self.ended)

        for row in range(queries):
            memory = Memory(shape=8 * depth, depth=HEAD_WORDS, init=[])
            m.submodules[f"queries_{row}"] = memory
            write, read = memory.write_port(), memory.read_port()
            query = Signal(bytes_, name=f"query_{row}", reset_less=True)
            m.d.sync += query.eq(read.data)
            m.d.comb += [
                write.addr.eq(self.arrival.word), write.data.eq(self.word),
                write.en.eq(self.arrives & self.arrival.query & (self.arrival.row == row)),
                read.addr.eq(self.arrival.word), read.en.eq(1),
            ]
            m.d.comb += [multipliers.a[column][row].eq(query[column]) for column in range(depth)]
            total = self._sum(m, [products[row] for products in multipliers.product], row)

            score, maximum = self.scores[row], self.maxima[row]
            with m.If(summed & place.first):
                m.d.sync += score.eq(total)
            with m.Elif(summed):
                m.d.sync += score.eq(score + total)
            with m.If(self.scored & (opening | (~hidden[row] & (score > maximum)))):
                m.d.sync += maximum.eq(score)
        return m

    def _sum(self, m, terms, row):
        """The sum of signed terms, by a tree of adders with a register behind each."""
        level = 0
        while len(terms) > 1:
            level += 1
            width = max(len(term) for term in terms) + 1
            sums = []
            for i in range(0, len(terms), 2):
                node = Signal(signed(width), name=f"sum_{row}_{level}_{i // 2}", reset_less=True)
                m.d.sync += node.eq(sum(terms[i + 1:i + 2], terms[i]))
                sums.append(node)
            terms = sums
        return terms[0]
