"""Gate weights of a row, and what goes to the queues."""

from itertools import pairwise

from amaranth import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..divide import Reciprocal
from ..multiply import Multipliers
from ..slices import RegisterSlice, sliced
from .weigh import weights_layout

__all__ = ["Append", "Gate"]


class Append(data.Struct):
    """An entry for the queue of an expert."""

    expert: 8
    weight: 16
    last: 1  # of its row


class Gate(wiring.Component):
    """``weight * r >> (e - 1)`` with (r, e) the reciprocal of the row's total.

    A row every max(`Reciprocal.INTERVAL`, `chosen`) cycles, its first entry `LATENCY` cycles
    after its weights, one more with `scores`; one entry a cycle, largest value first. Up to `DEPTH`
    rows wait inside.

    Parameters
    ----------
    scores : weights may be scores, of any size; else a row's largest weight is that of its maximum

    Members
    -------
    chosen : In(5)
        Holds still while rows are inside.
    experts : In(stream.Signature(data.ArrayLayout(8, count)))
        The experts of a row; may come before its weights.
    weights : In(stream.Signature(weights_layout(count)))
    entries : Out(stream.Signature(Append, always_ready=True))
    """

    DEPTH = 4
    LATENCY = Reciprocal.LATENCY + RegisterSlice.LATENCY + Multipliers.LATENCY + 2

    def __init__(self, count: int, *, scores: bool = False):
        self.count, self.scores = count, scores
        super().__init__({
            "chosen": In(5),
            "experts": In(stream.Signature(data.ArrayLayout(8, count))),
            "weights": In(stream.Signature(weights_layout(count))),
            "entries": Out(stream.Signature(Append, always_ready=True)),
        })

    def elaborate(self, platform):
        m = Module()
        count = self.count
        m.submodules.reciprocal = reciprocal = Reciprocal()
        m.submodules.experts = experts = SyncFIFO(width=8 * count, depth=2 * self.DEPTH)
        m.submodules.weights = weights = SyncFIFO(width=16 * count, depth=self.DEPTH)
        m.submodules.multiplier = multiplier = Multipliers(unsigned(16), unsigned(16))

        # A row's total goes to the reciprocal, its weights and experts wait for that.
        both = reciprocal.totals.ready & weights.w_rdy
        m.d.comb += [
            experts.w_data.eq(self.experts.payload), experts.w_en.eq(self.experts.valid),
            self.experts.ready.eq(experts.w_rdy),
            reciprocal.totals.payload.eq(self.weights.p.total),
            reciprocal.totals.valid.eq(self.weights.valid & weights.w_rdy),
            weights.w_data.eq(self.weights.p.weights),
            weights.w_en.eq(self.weights.valid & reciprocal.totals.ready),
            self.weights.ready.eq(both),
        ]

        position = Signal(range(count))
        last = position + 1 == self.chosen
        # The result is copied, so that the next division runs beside the products.
        inverses = sliced(m, "inverses", reciprocal.reciprocals)
        inverse, valid = Signal.like(inverses.payload), Signal()
        with m.If(~valid | last):
            m.d.sync += [inverse.eq(inverses.payload), valid.eq(inverses.valid)]
        m.d.comb += [
            inverses.ready.eq(~valid | last), experts.r_en.eq(valid & last),
            weights.r_en.eq(valid & last),
            multiplier.advance.eq(1),
            multiplier.a[0].eq(weights.r_data.word_select(position, 16)),
            multiplier.b[0].eq(inverse.r),
        ]
        with m.If(valid):
            m.d.sync += position.eq(Mux(last, 0, position + 1))

        # Where the row's maximum has the weight 65472 and is part of every total: 16 <= e <= 24, and a
        # shift by e - 1 is one by 15 and one by at most 8; scores are shifted by 0 to 23. No weight
        # exceeds its total < 2**e, so that weight * r <= 2**(e + 15), and with that power of two as
        # the total r is 65535: 65535 is never exceeded.
        low, least = (0, 1) if self.scores else (15, 16)
        tag = data.StructLayout({"valid": 1, "expert": 8, "last": 1, "shift": 5 if self.scores else 4})
        tags = [Signal(tag, name=f"tag_{i}")
                for i in range(Multipliers.LATENCY + 1 + self.scores)]
        m.d.comb += [
            tags[0].valid.eq(valid), tags[0].last.eq(last),
            tags[0].expert.eq(experts.r_data.word_select(position, 8)),
            tags[0].shift.eq(inverse.e - least),
        ]
        entry = self.entries.p
        product, shift = multiplier.product[0][low:], tags[-1].shift
        if self.scores:
            coarse = Signal.like(product)
            m.d.sync += coarse.eq(product >> (tags[-2].shift[3:] << 3))
            product, shift = coarse, shift[:3]
        m.d.sync += [after.eq(before) for before, after in pairwise(tags)]
        m.d.sync += [
            entry.weight.eq(product >> shift),
            entry.expert.eq(tags[-1].expert), entry.last.eq(tags[-1].last),
            self.entries.valid.eq(tags[-1].valid),
        ]
        return m
