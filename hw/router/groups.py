"""Only experts of the best groups."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.routing import HIDDEN
from ..interfaces import RouteSetup
from ..slices import RegisterSlice, sliced
from .choose import Choose
from .score import Scored

__all__ = ["Groups"]


class Candidate(data.Struct):
    """A group and what it is compared by."""

    value: signed(33)
    group: 8
    last: 1  # of its row


class Walk(wiring.Component):
    """Which group of a row the next expert is of.

    Members
    -------
    size : In(8)
        Experts of a group.
    step : In(1)
        To the next expert.
    last : In(1)
        This one is the last of its row.
    group : Out(8)
    ends : Out(1)
        It is the last of its group.
    """

    size: In(8)
    step: In(1)
    last: In(1)
    group: Out(8)
    ends: Out(1)

    def elaborate(self, platform):
        m = Module()
        place = Signal(8)
        m.d.comb += self.ends.eq(place + 1 == self.size)
        with m.If(self.step):
            m.d.sync += place.eq(place + 1)
            with m.If(self.ends):
                m.d.sync += [place.eq(0), self.group.eq(self.group + 1)]
            with m.If(self.last):
                m.d.sync += [place.eq(0), self.group.eq(0)]
        return m


class Groups(wiring.Component):
    """Where there are groups, the value of every expert outside of the best ones is `HIDDEN`, as
    `routing.in_best_groups` says.

    One expert a cycle, and rows follow one another without a gap, as a row waits in a queue while
    the one before leaves it. A row leaves it, `LATENCY` cycles late, when it is complete; without
    groups, at once.

    Members
    -------
    setup : In(RouteSetup)
        Holds still while rows are inside.
    scored : In(stream.Signature(Scored))
    grouped : Out(stream.Signature(Scored))
    """

    DECISION = 3  # cycles from the last expert of a row to the first that leaves
    LATENCY = 2  # from an expert to the same one, without groups

    def __init__(self, config: Config):
        self.config = config
        super().__init__({"setup": In(RouteSetup), "scored": In(stream.Signature(Scored)),
                          "grouped": Out(stream.Signature(Scored))})

    def elaborate(self, platform):
        m = Module()
        config, setup = self.config, self.setup
        # Room for a row and what comes until it is decided on.
        m.submodules.waiting = waiting = SyncFIFOBuffered(
            width=Scored.as_shape().size,
            depth=1 << (config.max_experts + self.DECISION + 2).bit_length())
        m.submodules.arriving, m.submodules.leaving = arriving, leaving = Walk(), Walk()
        grouped, incoming = Signal(), self.scored.p
        m.d.sync += grouped.eq(setup.group != 0)

        # The two largest values of the group, and in the cycle after its last one their sum.
        best, second, fresh, complete = Signal(signed(33)), Signal(signed(33)), Signal(init=1), Signal()
        group, last = Signal(8), Signal()
        m.submodules.sums = sums = RegisterSlice(Candidate)
        m.submodules.choose = choose = Choose(Candidate, config.max_chosen)
        wiring.connect(m, sums.output, choose.candidates)
        taken = self.scored.valid & self.scored.ready
        m.d.comb += [
            self.scored.ready.eq(waiting.w_rdy & (~complete | sums.input.ready)),
            waiting.w_data.eq(self.scored.payload), waiting.w_en.eq(taken),
            arriving.size.eq(setup.group), arriving.step.eq(taken), arriving.last.eq(incoming.last),
            sums.input.valid.eq(complete), sums.input.p.group.eq(group), sums.input.p.last.eq(last),
            sums.input.p.value.eq(best + Mux(setup.pair, second, 0)),
        ]
        with m.If(sums.input.ready):
            m.d.sync += complete.eq(0)
        with m.If(taken):
            m.d.sync += [group.eq(arriving.group), last.eq(incoming.last),
                         fresh.eq(arriving.ends | incoming.last),
                         complete.eq(arriving.ends & grouped)]
            # Pairs are of scores, above 0.
            with m.If(fresh | (incoming.value > best)):
                m.d.sync += [best.eq(incoming.value), second.eq(Mux(fresh, 0, best))]
            with m.Elif(incoming.value > second):
                m.d.sync += second.eq(incoming.value)

        choices = sliced(m, "choices", choose.choices)
        passed = Signal(Scored)
        member = Cat((choice.group == leaving.group) & (number < setup.chosen_groups)
                     for number, choice in enumerate(choices.payload)).any()
        leaves = self.grouped.valid & self.grouped.ready
        m.d.comb += [
            passed.eq(waiting.r_data), waiting.r_en.eq(leaves),
            self.grouped.valid.eq(waiting.r_rdy & (~grouped | choices.valid)),
            self.grouped.payload.eq(passed),
            leaving.size.eq(setup.group), leaving.step.eq(leaves), leaving.last.eq(passed.last),
            choices.ready.eq(leaves & passed.last & grouped),
        ]
        with m.If(grouped & ~member):
            m.d.comb += self.grouped.p.value.eq(HIDDEN)
        return m
