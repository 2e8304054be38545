"""Second stage, front: scores to probabilities, and which value words to read."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..credit import CreditQueue
from ..exp2 import Exp2, Octaves
from ..interfaces import READ_LATENCY, activation_address
from .shapes import Group, Pass, Weights, delayed, difference_bits, score_shape

__all__ = ["PassReader"]


class PassReader(wiring.Component):
    """Walks over the keys of a group once for every value word: reads the scores of a key, turns
    them into probabilities, and then reads the value word, so that both come out together.

    One key a cycle, plus `GROUP_CYCLES` between groups. A pass begins while the one before is still
    on its way; its last value word waits until the results of the one before have left
    (`sums_free`). While a value word is refused by `address`, those behind it wait in a queue.

    Members
    -------
    groups : In(stream.Signature(Group(config)))
        Offered when all scores are stored.
    maxima : In(data.ArrayLayout(score_shape(config), queries))
        Taken with the group.
    score_address : Out(range(max_rows))
        The scores are to come a cycle later.
    scores : In(data.ArrayLayout(score_shape(config), queries))
    released : Out(1)
        All scores of the group have been read.
    address : Out(stream.Signature(activation_address(config)))
    arrives : Out(1)
        A value word arrives in this cycle, `READ_LATENCY` cycles after its address was accepted.
    weights : Out(Weights(config))
        What it is to be multiplied with.
    passes : Out(stream.Signature(Pass(config)))
        Every pass, when its last score is read; taken when its sums are complete.
    sums_free : In(1)
    sums_claimed : Out(1)
        The last value word of a pass was accepted.
    """

    GROUP_CYCLES = 3

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        scores = data.ArrayLayout(score_shape(config), config.queries)
        super().__init__({
            "groups": In(stream.Signature(Group(config))), "maxima": In(scores),
            "score_address": Out(range(config.max_rows)),
            "scores": In(scores), "released": Out(1),
            "address": Out(stream.Signature(activation_address(config))),
            "arrives": Out(1), "weights": Out(Weights(config)),
            "passes": Out(stream.Signature(Pass(config))),
            "sums_free": In(1), "sums_claimed": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        queries = self.config.queries
        address = activation_address(self.config)
        layout = data.StructLayout({"address": address, "weights": Weights(self.config)})
        cycles = 3 + Octaves.LATENCY + Exp2.LATENCY
        m.submodules.sent = sent = CreditQueue(layout, cycles)

        # What travels beside a score until its value word is read.
        place_layout = data.StructLayout({
            "first": 1, "last": 1, "counted": 1, "address": 20, "hidden": queries})
        place = Signal(place_layout)
        group, maxima = self._walk(m, sent, place)

        # Cycle 1: scores from the memory. 2: their copy. 3: differences.
        scores = Signal(self.scores.shape(), reset_less=True)
        differences = Signal(data.ArrayLayout(difference_bits(self.config), queries),
                             reset_less=True)
        multiplier, shift = Signal(16, reset_less=True), Signal(6, reset_less=True)
        m.d.sync += [scores.eq(self.scores), multiplier.eq(group.multiplier), shift.eq(group.shift)]
        m.d.sync += [differences[row].eq(maxima[row] - scores[row]) for row in range(queries)]

        place = delayed(m, place, cycles, name="place")
        element = sent.element
        m.d.comb += [
            sent.arrives.eq(delayed(m, sent.enters, cycles, name="valid", reset_less=False)),
            element.address.eq(address.of(place.address)), element.weights.first.eq(place.first),
            element.weights.last.eq(place.last), element.weights.counted.eq(place.counted),
        ]
        for row in range(queries):
            m.submodules[f"octaves_{row}"] = octaves = Octaves(
                difference_bits(self.config), primitive=self.primitive)
            m.submodules[f"exp2_{row}"] = exp2 = Exp2()
            m.d.comb += [
                octaves.advance.eq(1), octaves.difference.eq(differences[row]),
                octaves.multiplier.eq(multiplier), octaves.shift.eq(shift),
                exp2.advance.eq(1), exp2.steps.eq(octaves.steps),
                element.weights.probability[row].eq(
                    Mux(place.hidden[row], 0, exp2.probability)),
            ]
        self._issue(m, sent.output)
        return m

    def _walk(self, m, sent, place):
        """Lets one key after another enter, with its place; returns the group and its maxima."""
        group = Signal(Group(self.config))
        maxima = Signal(self.maxima.shape(), reset_less=True)
        key, over = Signal(13), Signal(signed(15))
        word, base, cursor = Signal(8), Signal(20), Signal(20)
        running, last_key, last_word = Signal(), Signal(), Signal()
        emit, leaves = Signal(), Signal()

        m.d.comb += [
            last_word.eq(word == group.words - 1),
            # `passes` holds one pass: the next one does not end before it has left.
            emit.eq(running & sent.room & ~(last_key & self.passes.valid)),
            sent.enters.eq(emit), leaves.eq(emit & last_key),
            self.score_address.eq(key),
            place.first.eq(key == 0), place.last.eq(last_key), place.counted.eq(word == 0),
            place.address.eq(cursor),
            place.hidden.eq(Cat(group.causal & (over > row) for row in range(self.config.queries))),
        ]

        with m.If(self.passes.ready):
            m.d.sync += self.passes.valid.eq(0)
        with m.If(emit):
            m.d.sync += [key.eq(key + 1), over.eq(over + 1), cursor.eq(cursor + group.stride),
                         last_key.eq(key + 1 == group.last_key)]
        with m.If(leaves):
            m.d.sync += [
                key.eq(0), last_key.eq(group.last_key == 0),
                over.eq(group.over), word.eq(word + 1),
                base.eq(base + 1), cursor.eq(base + 1),
                self.passes.valid.eq(1),
                self.passes.p.rows.eq(group.rows),
                self.passes.p.destination.eq(group.destination + word),
                self.passes.p.destination_stride.eq(group.destination_stride),
                self.passes.p.out_multiplier.eq(group.out_multiplier),
                self.passes.p.out_shift.eq(group.out_shift),
                self.passes.p.counted.eq(word == 0),
                self.passes.p.final.eq(last_word & group.final),
            ]

        with m.FSM():
            with m.State("IDLE"):
                # Taken at once: scores of the group after this one may follow as soon as a buffer is
                # released, and would overwrite the maxima.
                m.d.comb += self.groups.ready.eq(1)
                m.d.sync += [
                    group.eq(self.groups.payload), maxima.eq(self.maxima),
                    key.eq(0), last_key.eq(self.groups.p.last_key == 0),
                    word.eq(0), over.eq(self.groups.p.over),
                    base.eq(self.groups.p.value), cursor.eq(self.groups.p.value),
                ]
                with m.If(self.groups.valid):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += running.eq(1)
                with m.If(leaves & last_word):
                    m.next = "SCORES"
            # The last scores still need the group's maxima and scale.
            with m.State("SCORES"):
                m.next = "DIFFERENCES"
            with m.State("DIFFERENCES"):
                m.d.comb += self.released.eq(1)
                m.next = "IDLE"
        return group, maxima

    def _issue(self, m, sent):
        """Sends value addresses; what was accepted comes out with its word."""
        weights, accepted, held = sent.p.weights, Signal(), Signal()
        m.d.comb += [
            held.eq(weights.last & ~self.sums_free),
            self.address.valid.eq(sent.valid & ~held),
            self.address.payload.eq(sent.p.address),
            sent.ready.eq(self.address.ready & ~held),
            accepted.eq(self.address.valid & self.address.ready),
            self.sums_claimed.eq(accepted & weights.last),
            self.arrives.eq(delayed(m, accepted, READ_LATENCY, name="arrives", reset_less=False)),
            self.weights.eq(delayed(m, weights, READ_LATENCY, name="weights")),
        ]
