"""What logits are compared by: themselves, or their sigmoid scores plus corrections."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.routing import CORRECTION_BITS
from ..credit import CreditQueue
from ..interfaces import Corrections, RouteSetup
from ..sigmoid import Sigmoid
from ..slices import RegisterSlice
from .buffer import Logit, quotient

__all__ = ["Score", "Scored"]


class Scored(data.Struct):
    """What one expert is compared by, and its score."""

    value: signed(33)
    expert: 8
    score: 16
    last: 1  # of its row


class Score(wiring.Component):
    """The sigmoid score of each logit, and what is compared: `by_score` the score plus the expert's
    correction, else the logit.

    A logit a cycle, `LATENCY` cycles later. The corrections of `config.max_experts` experts are kept;
    those of a row come before its logits.

    Members
    -------
    setup : In(RouteSetup)
        Holds still while rows are inside.
    corrections : In(stream.Signature(Corrections(config), always_ready=True))
    logits : In(stream.Signature(Logit))
    scored : Out(stream.Signature(Scored))
    """

    LATENCY = Sigmoid.LATENCY + CreditQueue.LATENCY + RegisterSlice.LATENCY

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "setup": In(RouteSetup),
            "corrections": In(stream.Signature(Corrections(config), always_ready=True)),
            "logits": In(stream.Signature(Logit)),
            "scored": Out(stream.Signature(Scored)),
        })

    def elaborate(self, platform):
        m = Module()
        setup = self.setup
        m.submodules.sigmoid = sigmoid = Sigmoid()
        m.submodules.scores = scores = CreditQueue(16, Sigmoid.LATENCY)
        # The logits themselves wait beside the pipeline.
        m.submodules.logits = logits = SyncFIFO(width=Logit.as_shape().size, depth=scores.depth)
        inside = Signal(Sigmoid.LATENCY)
        m.d.comb += [
            sigmoid.logit.eq(self.logits.p.value), sigmoid.multiplier.eq(setup.multiplier),
            sigmoid.shift.eq(setup.shift),
            self.logits.ready.eq(scores.room & logits.w_rdy),
            scores.enters.eq(self.logits.valid & self.logits.ready),
            logits.w_data.eq(self.logits.payload), logits.w_en.eq(scores.enters),
            scores.arrives.eq(inside[-1]), scores.element.eq(sigmoid.score),
        ]
        m.d.sync += inside.eq((inside << 1) | scores.enters)

        m.submodules.joined = joined = RegisterSlice(data.StructLayout(
            {"logit": Logit, "score": 16, "correction": CORRECTION_BITS}))
        taken = scores.output.valid & joined.input.ready
        m.d.comb += [
            joined.input.valid.eq(scores.output.valid), scores.output.ready.eq(joined.input.ready),
            logits.r_en.eq(taken), joined.input.p.logit.eq(logits.r_data),
            joined.input.p.score.eq(scores.output.payload),
            joined.input.p.correction.eq(self._correction(m, taken, joined.input.p.logit.last)),
        ]
        found, scored = joined.output.p, self.scored.p
        m.d.comb += [
            self.scored.valid.eq(joined.output.valid), joined.output.ready.eq(self.scored.ready),
            scored.value.eq(Mux(setup.by_score, found.score + found.correction, found.logit.value)),
            scored.expert.eq(found.logit.expert), scored.last.eq(found.logit.last),
            scored.score.eq(found.score),
        ]
        return m

    def _correction(self, m, taken, last):
        """That of the next expert of the row."""
        lanes, experts = self.config.lanes, self.config.max_experts
        m.submodules.corrections = memory = Memory(
            shape=CORRECTION_BITS * lanes, depth=max(2, -(-experts // lanes)), init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        word, lane = Signal(range(memory.depth)), Signal(range(lanes))
        incoming = self.corrections
        m.d.comb += [
            write.en.eq(incoming.valid), write.data.eq(incoming.p.values),
            write.addr.eq(quotient(incoming.p.channel, lanes, experts)), read.addr.eq(word),
        ]
        with m.If(taken):
            m.d.sync += lane.eq(lane + 1)
            with m.If(lane == lanes - 1):
                m.d.sync += [lane.eq(0), word.eq(word + 1)]
            with m.If(last):
                m.d.sync += [lane.eq(0), word.eq(0)]
        return read.data.word_select(lane, CORRECTION_BITS)
