"""The router."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..interfaces import Corrections, Logits, QueuePort, RouteSetup
from ..slices import RegisterSlice, sliced
from .buffer import Logit, LogitBuffer
from .choose import Choose
from .gate import Gate
from .groups import Groups
from .places import Places
from .queues import Queues
from .rounds import Rounds
from .score import Score, Scored
from .weigh import Weigh

__all__ = ["Router"]


class Router(wiring.Component):
    """Chooses experts for each token row, and queues the token with its gate weight at each.

    A setup empties all queues, unless it appends. Then the logits of its rows come; for each row, in
    order, an entry (token, weight) is appended to the queue of each of its `chosen` experts:
    `routing.route`. With a `capacity` a queue takes so many tokens of a frame, and with a `choice`
    only these are appended. Limits: ``1 <= chosen <= max_chosen``, ``chosen <= experts <=
    max_experts``, ``rows <= max_rows``, ``1 <= chosen_groups <= max_chosen``. Without
    `config.router_forms` there are softmax and the choice by logits alone, and no capacity.

    One logit a cycle and stage, and stages work on successive rows: a row takes
    ``max(experts, ROW_INTERVAL)`` cycles if the weights are over the chosen or sigmoid scores, and
    ``max(experts + chosen, ROW_INTERVAL)`` if over all. A lone row is done ``LATENCY + experts +
    2 * chosen`` cycles after its last logits, and `experts` later over all; with
    `config.router_forms` `FORMS_LATENCY` later, and with groups `experts + GROUPS_LATENCY`. In a
    sparse mixer a row takes `chosen` rounds, each as long as a row of one chosen over all; the first
    round of a lone row ends when that would. Two token groups of logits are buffered, at least; more
    are refused.

    Members
    -------
    setup : In(stream.Signature(RouteSetup))
        Taken once the rows of the one before are done.
    logits : In(stream.Signature(Logits(config)))
        Of the rows of the last setup; refused before it.
    corrections : In(stream.Signature(Corrections(config), always_ready=True))
        With `config.router_forms`; those of the setup, before its logits.
    queue : In(QueuePort())
        Use it from `done` to the next setup.
    done : Out(1)
        Pulses once for each setup, when all its rows can be read; soon after it, if it has none.
    empty : Out(max_experts)
        Bit e: no entry in queue e.
    """

    ROW_INTERVAL = 18
    LATENCY = Weigh.LATENCY + Gate.LATENCY + 2 * RegisterSlice.LATENCY + 3
    FORMS_LATENCY = (Score.LATENCY + Groups.LATENCY + Places.LATENCY + 2 * RegisterSlice.LATENCY
                     + 1)
    GROUPS_LATENCY = Groups.DECISION - Groups.LATENCY

    def __init__(self, config: Config):
        self.config = config
        corrections = stream.Signature(Corrections(config), always_ready=True)
        super().__init__({
            "setup": In(stream.Signature(RouteSetup)),
            "logits": In(stream.Signature(Logits(config))),
            "queue": In(QueuePort()),
            "done": Out(1),
            "empty": Out(config.max_experts),
        } | ({"corrections": In(corrections)} if config.router_forms else {}))

    def elaborate(self, platform):
        m = Module()
        count = self.config.max_chosen
        m.submodules.buffer = buffer = LogitBuffer(self.config)
        forms = bool(self.config.router_forms)
        shape = Scored if forms else Logit
        m.submodules.choose = choose = Choose(shape, count)
        m.submodules.weigh = weigh = Weigh(shape, count)
        m.submodules.gate = gate = Gate(count, scores=forms)
        m.submodules.queues = queues = Queues(self.config)

        setup = Signal(RouteSetup)
        row = Signal(13)  # the next to be appended
        finishing = Signal(Queues.LATENCY)
        active = Signal()

        # A setup clears much: it does so from a register.
        setups = sliced(m, "setup", wiring.flipped(self.setup))
        following = setups.p
        starts = setups.valid & setups.ready
        m.d.comb += [
            setups.ready.eq(~active),
            buffer.restart.eq(starts), queues.clear.eq(starts & ~following.append),
            buffer.experts.eq(setup.experts),
            *([buffer.times.eq(Mux(setup.sparse, setup.chosen, 1))] if forms else []),
            buffer.twice.eq(~setup.over_chosen & ~setup.sigmoid if forms else ~setup.over_chosen),
            weigh.setup.eq(setup), queues.token.eq(setup.token + row),
            self.empty.eq(queues.empty), self.done.eq(finishing[-1]),

            buffer.logits.payload.eq(self.logits.payload),
            buffer.logits.valid.eq(self.logits.valid & active),
            self.logits.ready.eq(buffer.logits.ready & active),
        ]
        wiring.connect(m, wiring.flipped(self.queue), queues.queue)
        # No stage waits in the same cycle for another.
        first = sliced(m, "first", buffer.first)
        entries, ends = gate.entries, gate.entries.valid & gate.entries.p.last
        if forms:
            first = self._forms(m, first, setup)
            m.submodules.places = places = Places(self.config)
            wiring.connect(m, gate.entries, places.choices)
            m.d.comb += [places.setup.eq(setup), places.restart.eq(starts & ~following.same_frame)]
            entries, ends = places.entries, places.ended
        wiring.connect(m, first, choose.candidates)
        wiring.connect(m, sliced(m, "second", buffer.second), weigh.logits)
        wiring.connect(m, weigh.weights, gate.weights)
        wiring.connect(m, entries, queues.entries)
        choices = sliced(m, "choices", choose.choices)
        if forms:
            choices = self._rounds(m, choices, setup)
        chosen = Mux(setup.sparse, 1, setup.chosen) if forms else setup.chosen
        m.d.comb += [weigh.setup.chosen.eq(chosen), gate.chosen.eq(chosen)]

        # The choices of a row: experts to wait for its weights, and values to the softmax, not
        # earlier.
        sent = Signal()  # the experts went ahead
        m.d.comb += [
            weigh.choices.payload.eq(choices.payload),
            gate.experts.payload.eq(Cat(choice.expert for choice in choices.payload)),
            gate.experts.valid.eq(choices.valid & ~sent),
            weigh.choices.valid.eq(choices.valid & (sent | gate.experts.ready)),
            choices.ready.eq(weigh.choices.ready & (sent | gate.experts.ready)),
        ]
        with m.If(choices.valid & choices.ready):
            m.d.sync += sent.eq(0)
        with m.Elif(gate.experts.valid & gate.experts.ready):
            m.d.sync += sent.eq(1)

        m.d.sync += finishing.eq(finishing << 1)
        with m.If(ends):
            m.d.sync += row.eq(row + 1)
            with m.If(row + 1 == setup.rows):
                m.d.sync += finishing[0].eq(1)
        with m.If(starts):
            m.d.sync += [setup.eq(following), row.eq(0), active.eq(1)]
            with m.If(following.rows == 0):
                m.d.sync += finishing[0].eq(1)
        with m.If(self.done):
            m.d.sync += active.eq(0)
        return m

    def _forms(self, m, logits, setup):
        """Scores and groups, on the way of the logits to the choice."""
        m.submodules.score = score = Score(self.config)
        m.submodules.groups = groups = Groups(self.config)
        m.d.comb += [score.setup.eq(setup), groups.setup.eq(setup),
                     score.corrections.valid.eq(self.corrections.valid),
                     score.corrections.payload.eq(self.corrections.payload)]
        wiring.connect(m, logits, score.logits)
        wiring.connect(m, sliced(m, "scored", score.scored), groups.scored)
        return sliced(m, "grouped", groups.grouped)

    def _rounds(self, m, choices, setup):
        """A sparse mixer's choices, weighed one by one."""
        m.submodules.rounds = rounds = Rounds(choices.payload.shape())
        m.d.comb += rounds.setup.eq(setup)
        wiring.connect(m, choices, rounds.choices)
        return rounds.rounds
