"""What the gate weights of the chosen experts are quotients of: softmax numerators or scores, and
their denominator."""

from itertools import pairwise

from amaranth import Array, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.numerics import GATE_BITS
from ..credit import CreditQueue
from ..exp2 import Exp2, Octaves
from ..interfaces import RouteSetup
from .buffer import Logit
from .choose import choices_layout
from .near import Near
from .score import Scored

__all__ = ["Weigh", "weights_layout"]

TOTAL_BITS = 24  # 256 experts of at most 65472


def weights_layout(count: int) -> data.StructLayout:
    """Of a row: `exp2_weight` or the score of each chosen expert, and what divides them."""
    return data.StructLayout({"weights": data.ArrayLayout(16, count), "total": TOTAL_BITS})


class Weigh(wiring.Component):
    """``exp2_weight(octaves(maximum - logit))`` of the chosen logits of each row, and its sum over
    the chosen or, without `over_chosen`, over all logits of the row; for a sparse mixer over those
    that are near the one that is chosen and were not chosen before. For sigmoid scores these and
    their sum, or one.

    A logit a cycle: a row takes `chosen` cycles, and as many more as it has logits if they all
    count. The weights come `LATENCY` cycles after the last of them. While they are refused they wait
    in a queue, and what is on the way is let in only as far as that has room.

    Parameters
    ----------
    shape : `Scored` where there are sigmoid scores, or `Logit`

    Members
    -------
    setup : In(RouteSetup)
        Holds still while rows are inside.
    choices : In(stream.Signature(choices_layout(shape, count)))
    logits : In(stream.Signature(Logit))
        All logits of the row; nothing comes here if they do not count.
    weights : Out(stream.Signature(weights_layout(count)))
        Those past `chosen` are undefined.
    """

    SUMMING = 2 + Octaves.LATENCY + Exp2.LATENCY + 1  # cycles until a row's weights are complete
    LATENCY = SUMMING + CreditQueue.LATENCY

    def __init__(self, shape, count: int):
        self.count, self.scores = count, shape is Scored
        super().__init__({
            "setup": In(RouteSetup),
            "choices": In(stream.Signature(choices_layout(shape, count))),
            "logits": In(stream.Signature(Logit)),
            "weights": Out(stream.Signature(weights_layout(count))),
        })

    def elaborate(self, platform):
        m = Module()
        setup = self.setup
        m.submodules.rows = rows = CreditQueue(self.weights.payload.shape(), self.SUMMING)
        wiring.connect(m, rows.output, wiring.flipped(self.weights))

        # What enters: the chosen, then all.
        tag = data.StructLayout({"valid": 1, "position": range(self.count + 1), "counts": 1,
                                 "last": 1} | ({"score": 16} if self.scores else {}))
        position = Signal(range(self.count + 1))
        picking = position != setup.chosen
        entering = Signal(tag)
        chosen = Array(self.choices.payload)[position]
        alone = setup.over_chosen | setup.sigmoid if self.scores else setup.over_chosen
        m.d.comb += [
            entering.position.eq(Mux(picking, position, self.count)),
            entering.counts.eq(~picking | setup.over_chosen),
            entering.valid.eq(rows.room & self.choices.valid & (picking | self.logits.valid)),
            entering.last.eq(Mux(picking, alone & (position + 1 == setup.chosen),
                                 self.logits.p.last)),
            rows.enters.eq(entering.valid & entering.last),
            self.logits.ready.eq(rows.room & self.choices.valid & ~picking),
            self.choices.ready.eq(rows.enters),
        ]
        value, maximum = Signal(signed(32)), Signal(signed(32))
        difference = Signal(32)
        m.d.sync += [
            value.eq(Mux(picking, chosen.value, self.logits.p.value)),
            maximum.eq(self.choices.payload[0].value),
            difference.eq(maximum - value),
        ]
        with m.If(entering.valid & picking):
            m.d.sync += position.eq(position + 1)
        with m.If(rows.enters):
            m.d.sync += position.eq(0)

        m.submodules.octaves = octaves = Octaves()
        m.submodules.exp2 = exp2 = Exp2()
        m.d.comb += [
            octaves.advance.eq(1), exp2.advance.eq(1),
            octaves.difference.eq(difference), octaves.multiplier.eq(setup.multiplier),
            octaves.shift.eq(setup.shift), exp2.steps.eq(octaves.steps),
        ]
        if self.scores:
            m.d.comb += entering.score.eq(chosen.score)
        tags = [entering] + [Signal(tag, name=f"tag_{i}") for i in range(self.SUMMING - 1)]
        leaving = tags[-1]
        fresh = Signal(init=1)  # the next to leave is the first of its row
        weights, complete = Signal.like(rows.element), Signal()
        weight, begin = exp2.weight, 0
        if self.scores:
            weight = Mux(setup.sigmoid, leaving.score, weight)
            begin = (setup.sigmoid & ~setup.over_chosen) << GATE_BITS
        m.d.comb += [rows.arrives.eq(complete), rows.element.eq(weights)]
        m.d.sync += [after.eq(before) for before, after in pairwise(tags)]
        if self.scores:
            self._leave_out(m, tags, value, maximum)
        m.d.sync += complete.eq(leaving.valid & leaving.last)
        with m.If(leaving.valid):
            m.d.sync += [
                fresh.eq(leaving.last),
                weights.total.eq(Mux(fresh, begin, weights.total)
                                 + Mux(leaving.counts, weight, 0)),
            ]
            for i in range(self.count):
                with m.If(leaving.position == i):
                    m.d.sync += weights.weights[i].eq(weight)
        return m

    def _leave_out(self, m, tags, value, largest):
        """What a sparse mixer does not count, on its way through the stages."""
        m.submodules.near = near = Near()
        m.d.sync += near.earlier.eq(self.logits.p.expert < self.choices.payload[0].expert)
        m.d.comb += [near.value.eq(value), near.largest.eq(largest),
                     near.threshold.eq(self.setup.threshold)]
        before, after = tags[1 + Near.LATENCY:][:2]
        m.d.sync += after.counts.eq(before.counts & (near.near | ~self.setup.sparse))
