"""Sum and sum of squares of a row."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..multiply import Multipliers
from .reader import Word

__all__ = ["Statistics", "Sums"]


class Sums(data.StructLayout):
    """Of a row of at most `channels` int16, each of which may be -2**15."""

    def __init__(self, channels: int):
        super().__init__({"total": range(-(channels << 15), channels * 0x7fff + 1),
                          "squares": range((channels << 30) + 1)})


def _delayed(m, advance, signal, cycles: int):
    for _ in range(cycles):
        after = Signal.like(signal, reset_less=True, name="delayed")
        with m.If(advance):
            m.d.sync += after.eq(signal)
        signal = after
    return signal


def _tree(m, advance, terms):
    """The sum of terms by registered pairwise additions, and the cycles that it takes."""
    levels = 0
    while len(terms) > 1:
        pairs = [sum(terms[i:i + 2][1:], terms[i]) for i in range(0, len(terms), 2)]
        registers = [Signal(pair.shape(), reset_less=True, name=f"sum_{levels}") for pair in pairs]
        with m.If(advance):
            m.d.sync += [register.eq(pair) for register, pair in zip(registers, pairs)]
        terms, levels = registers, levels + 1
    return terms[0], levels


class Statistics(wiring.Component):
    """Sums the values of each row, and their squares; lanes past the end of a row do not count.

    One word a cycle; the sums of a row `latency` = 4 + ceil(log2(lanes)) cycles after its last
    word. While sums are refused nothing moves and words wait.

    Parameters
    ----------
    lanes : values of a word
    channels : values of a row, at most

    Members
    -------
    words : In(stream.Signature(Word(data.ArrayLayout(signed(16), lanes), lanes)))
    sums : Out(stream.Signature(Sums(channels)))
    """

    def __init__(self, lanes: int, channels: int):
        self.lanes = lanes
        self.latency = Multipliers.LATENCY + (lanes - 1).bit_length() + 1
        super().__init__({
            "words": In(stream.Signature(Word(data.ArrayLayout(signed(16), lanes), lanes))),
            "sums": Out(stream.Signature(Sums(channels))),
        })

    def elaborate(self, platform):
        m = Module()
        advance = Signal()
        m.d.comb += [advance.eq(~self.sums.valid | self.sums.ready), self.words.ready.eq(advance)]

        m.submodules.squares = multipliers = Multipliers(signed(16), signed(16), self.lanes)
        m.d.comb += multipliers.advance.eq(advance)
        values = []
        for lane in range(self.lanes):
            value = Signal(signed(16), name=f"value_{lane}")
            m.d.comb += [
                value.eq(Mux(self.words.p.count > lane, self.words.p.data[lane], 0)),
                multipliers.a[lane].eq(value), multipliers.b[lane].eq(value),
            ]
            values.append(value)
        squares, levels = _tree(
            m, advance, [product.as_unsigned()[:31] for product in multipliers.product])
        total, _ = _tree(m, advance, values)
        total = _delayed(m, advance, total, Multipliers.LATENCY)
        depth = Multipliers.LATENCY + levels
        valid, last = Signal(depth), Signal(depth)

        fresh = Signal(init=1)  # the next word is the first of its row
        sums = self.sums.p
        with m.If(advance):
            m.d.sync += [
                valid.eq(valid << 1 | self.words.valid),
                last.eq(last << 1 | self.words.p.last),
                self.sums.valid.eq(valid[-1] & last[-1]),
            ]
            with m.If(valid[-1]):
                m.d.sync += [
                    sums.total.eq(Mux(fresh, 0, sums.total) + total),
                    sums.squares.eq(Mux(fresh, 0, sums.squares) + squares),
                    fresh.eq(last[-1]),
                ]
        return m
