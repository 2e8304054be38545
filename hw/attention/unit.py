"""The streaming attention unit: two stages on two groups of query rows."""

from amaranth import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out

from ..arch.config import Config
from ..arch.isa import Opcode
from ..interfaces import EngineSignature, ReadPort, WritePort, activation_address
from .keys import KeyReader
from .passes import PassReader
from .results import ResultWriter
from .scores import ScoreLanes
from .shapes import Group
from .sums import WeightedSums

__all__ = ["AttentionUnit"]


class AttentionUnit(wiring.Component):
    """Executes ATTENTION: one head of scaled dot-product attention, exactly as `arch.numerics`.

    For query row i and key j, as far as they see one another (all do, but with `causal` only
    ``j <= i + keys - rows``)::

        s[j] = sum of query[i] * key[j] over words * depth values
        p[j] = probability(octaves(max(s) - s[j], multiplier, shift))
        out[i] = requantise(sum of p[j] * value[j], *row_scale(sum of p, out_multiplier, out_shift))

    A row that sees no key gives zeros. `words` is at most `HEAD_WORDS`, `keys` at most
    `config.max_rows`; the results must not overlap the instruction's own keys and values.

    Rows are taken in groups of `queries`. The first stage holds the query words of a group and
    streams the keys; the second streams the values of the group before, once for each word.

    A group of r rows takes ``keys * words + max(r * words + 1, 10)`` cycles, where `keys` are those
    that any of its rows sees, and an instruction 6 more, as long as write-back keeps up: it needs
    ``r * depth / lanes + READ_LATENCY + 10`` of the `keys` cycles of a value word, and for the first
    word of a group `ResultWriter.reciprocal_cycles` more. A port that does not answer delays its own stage.

    The next instruction is taken while the second stage still works on the one before.

    Parameters
    ----------
    primitive : as for `Multipliers`

    Members
    -------
    engine : Out(EngineSignature(Opcode.ATTENTION))
    key_read : Out(ReadPort(8 * depth, activation_address(config)))
        Queries and keys.
    value_read : Out(ReadPort(8 * depth, activation_address(config)))
    activation_write : Out(WritePort(8, depth, activation_address(config)))
    """

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        super().__init__({
            "engine": Out(EngineSignature(Opcode.ATTENTION)),
            "key_read": Out(ReadPort(8 * config.depth, activation_address(config))),
            "value_read": Out(ReadPort(8 * config.depth, activation_address(config))),
            "activation_write": Out(WritePort(8, config.depth, activation_address(config))),
        })

    def elaborate(self, platform):
        m = Module()
        config, primitive = self.config, self.primitive
        m.submodules.keys = keys = KeyReader(config)
        m.submodules.scores = scores = ScoreLanes(config, primitive=primitive)
        m.submodules.passes = passes = PassReader(config, primitive=primitive)
        m.submodules.sums = sums = WeightedSums(config, primitive=primitive)
        m.submodules.results = results = ResultWriter(config, primitive=primitive)

        wiring.connect(m, wiring.flipped(self.engine.instruction), keys.instruction)
        wiring.connect(m, keys.address, wiring.flipped(self.key_read.address))
        wiring.connect(m, passes.address, wiring.flipped(self.value_read.address))
        wiring.connect(m, results.write, wiring.flipped(self.activation_write.write))
        wiring.connect(m, passes.passes, results.passes)

        m.d.comb += [
            scores.arrives.eq(keys.arrives), scores.arrival.eq(keys.arrival),
            scores.word.eq(self.key_read.data.payload),
            sums.arrives.eq(passes.arrives), sums.weights.eq(passes.weights),
            sums.word.eq(self.value_read.data.payload),
            results.totalled.eq(sums.totalled), results.totals.eq(sums.totals),
            results.summed.eq(sums.summed), results.sums.eq(sums.sums),
            results.claimed.eq(passes.sums_claimed), passes.sums_free.eq(results.free),

            keys.retired.eq(results.done), keys.released.eq(passes.released),
        ]
        self._hand_over(m, keys, scores, passes)

        ports = [keys.address, passes.address, results.write]
        # Known a cycle late: what every port does reaches here from all over the device.
        refused, moving = Signal(len(ports)), Signal(len(ports))
        m.d.sync += [refused.eq(Cat(port.valid & ~port.ready for port in ports)),
                     moving.eq(Cat(port.valid & port.ready for port in ports))]
        m.d.comb += [
            self.engine.done.eq(results.done | keys.nothing),
            self.engine.busy.eq(keys.in_flight != 0),
            self.engine.stalled.eq(refused.any() & ~moving.any()),
        ]
        return m

    def _hand_over(self, m, keys, scores, passes):
        """Groups, and their scores in two buffers, from the first stage to the second."""
        config = self.config
        size = 1 << (config.max_rows - 1).bit_length()
        m.submodules.buffers = buffers = Memory(shape=scores.scores.shape(), depth=2 * size,
                                                init=[])
        write, read = buffers.write_port(), buffers.read_port()
        next_key = Signal(range(size))
        written, read_from = Signal(), Signal()
        complete = Signal()  # the scores and maxima of the first group in the queue

        layout = Group(config)
        m.submodules.groups = groups = SyncFIFO(width=layout.size, depth=2)
        m.d.comb += [
            groups.w_data.eq(keys.groups.payload), groups.w_en.eq(keys.groups.valid),
            keys.groups.ready.eq(groups.w_rdy),
            passes.groups.payload.eq(groups.r_data), passes.maxima.eq(scores.maxima),
            passes.groups.valid.eq(groups.r_rdy & complete),
            groups.r_en.eq(passes.groups.ready & complete),

            write.addr.eq(Cat(next_key, written)), write.data.eq(scores.scores),
            write.en.eq(scores.scored),
            read.addr.eq(Cat(passes.score_address, read_from)), read.en.eq(1),
            passes.scores.eq(read.data),
        ]
        with m.If(scores.scored):
            m.d.sync += next_key.eq(next_key + 1)
        with m.If(passes.groups.valid & passes.groups.ready):
            m.d.sync += complete.eq(0)
        with m.If(scores.ended):
            m.d.sync += [next_key.eq(0), written.eq(~written), complete.eq(1)]
        with m.If(passes.released):
            m.d.sync += read_from.eq(~read_from)
        return m
