"""The NORM engine."""

from itertools import pairwise

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import Out

from ..arch.config import Config
from ..arch.isa import NORM_CHANNELS, NormMode, Opcode
from ..credit import CreditQueue
from ..interfaces import (
    EngineSignature,
    ReadPort,
    WritePort,
    activation_address,
    parameter_layout,
)
from ..requantise import Requantise
from ..slices import sliced
from .inverse_root import InverseRoot
from .normalise import Normalise
from .reader import RowReader
from .rotate import Rotate
from .row_queue import RowQueue
from .statistics import Statistics
from .variance import Variance
from .writer import RowWriter

__all__ = ["NormUnit"]


class NormUnit(wiring.Component):
    """Executes NORM: rows of the residual memory to rows of int8 in the activation memory.

    ``y[c] = requantise(n[c] + bias[c], multiplier[c], shift[c])`` with n = `numerics.normalise` of
    the row, or the row itself in mode SCALE; n + bias must fit in int32. Rows start at residual
    word ``source + i * source_stride`` and at activation word
    ``destination + i * destination_stride``; parameters start at word `param`. Lanes past
    `channels` of the last activation word of a row are written as zero. `channels` is at most
    `max_channels`, in mode SCALE 65535.

    With `Config.rotary` statistics count `counted` channels, or all where that is 0; and where
    `factor_words` is not 0 results have 16 bits at first, and their pairs are turned by
    `numerics.rotate`, `channels` being even: by the factors of row i, from residual word
    ``factors + i * factor_stride`` on, which begin again every `factor_words` words.

    Each residual word is read once, and kept until the scale of its row is known: statistics of one
    row run beside the application of the one before, each `lanes` channels a cycle. A row takes
    ``max(ceil(channels / lanes), ROW_INTERVAL)`` cycles once the pipeline is full, which takes
    about 97 cycles, with `Config.rotary` `Rotate.LATENCY` more, and one row. The next instruction is
    taken, and its statistics begin, while the one before is being applied; results are written in
    program order.

    A refused address or write holds up what needs it, and nothing else.

    Members
    -------
    engine : Out(EngineSignature(Opcode.NORM))
    residual_read : Out(ReadPort(16 * lanes))
    factor_read : Out(ReadPort(16 * lanes))
        Of the residual memory, too; only with `Config.rotary`.
    param_read : Out(ReadPort(parameter_layout(config)))
    activation_write : Out(WritePort(8, depth, activation_address(config)))
    """

    ROW_INTERVAL = InverseRoot.INTERVAL
    # Words that follow a row while its scale is computed: room for them keeps the next row going.
    SCALE_LATENCY = 76

    def __init__(self, config: Config):
        self.config = config
        # Rows that no matrix product takes are of no use. What is known of a row, and of its values
        # before they are scaled, is as wide as so many channels make it.
        self.max_channels = min(NORM_CHANNELS, config.row_words * config.depth)
        super().__init__({
            "engine": Out(EngineSignature(Opcode.NORM)),
            "residual_read": Out(ReadPort(16 * config.lanes)),
            "param_read": Out(ReadPort(parameter_layout(config))),
            "activation_write": Out(WritePort(8, config.depth, activation_address(config))),
        } | ({"factor_read": Out(ReadPort(16 * config.lanes))} if config.rotary else {}))

    def elaborate(self, platform):
        m = Module()
        lanes = self.config.lanes
        m.submodules.residual_reader = residual_reader = RowReader(16 * lanes, lanes)
        m.submodules.param_reader = param_reader = RowReader(parameter_layout(self.config), lanes)
        m.submodules.statistics = statistics = Statistics(lanes, self.max_channels)
        words = -(-self.max_channels // lanes) + self.SCALE_LATENCY
        m.submodules.queue = queue = RowQueue(
            residual_reader.word, 1 << (words - 1).bit_length())
        m.submodules.variance = variance = Variance(self.max_channels)
        m.submodules.inverse_root = inverse_root = InverseRoot(self.max_channels)
        m.submodules.writer = writer = RowWriter(self.config)

        wiring.connect(m, residual_reader.port, wiring.flipped(self.residual_read))
        wiring.connect(m, param_reader.port, wiring.flipped(self.param_read))
        wiring.connect(m, writer.port, wiring.flipped(self.activation_write))
        # Every word goes to the queue, and to the statistics where they are wanted.
        word = residual_reader.words
        m.d.comb += [
            queue.arriving.payload.eq(word.payload),
            queue.arriving.valid.eq(word.valid & (statistics.words.ready | ~word.p.flag)),
            statistics.words.payload.eq(word.payload),
            statistics.words.valid.eq(word.valid & word.p.flag & queue.arriving.ready),
            word.ready.eq(queue.arriving.ready & (statistics.words.ready | ~word.p.flag)),
        ]
        wiring.connect(m, sliced(m, "sums", statistics.sums), variance.sums)
        wiring.connect(m, variance.moments, inverse_root.moments)

        factor_reader = None
        if self.config.rotary:
            m.submodules.factor_reader = factor_reader = RowReader(16 * lanes, lanes, repeats=True)
            wiring.connect(m, factor_reader.port, wiring.flipped(self.factor_read))
        self._distribute(m, residual_reader, param_reader, factor_reader, variance, writer)
        self._apply(m, sliced(m, "words", queue.leaving), sliced(m, "params", param_reader.words),
                    factor_reader and sliced(m, "factors", factor_reader.words), inverse_root.scales,
                    writer.words)
        self._report(m, writer.done)
        return m

    def _distribute(self, m, residual_reader, param_reader, factor_reader, variance, writer):
        """One instruction is held until each part has taken what it needs of it."""
        held = Signal(self.engine.instruction.payload.shape())
        takers = [residual_reader.rows, param_reader.rows, variance.setup, writer.rows]
        if factor_reader is not None:
            takers.append(factor_reader.rows)
        pending = Signal(len(takers))
        taken = Cat(taker.ready for taker in takers)
        m.d.comb += [taker.valid.eq(pending[i]) for i, taker in enumerate(takers)]
        m.d.comb += self.engine.instruction.ready.eq(pending == 0)
        m.d.sync += pending.eq(pending & ~taken)
        with m.If(self.engine.instruction.ready):
            m.d.sync += [held.eq(self.engine.instruction.payload),
                         pending.eq(self.engine.instruction.valid.replicate(len(takers)))]

        for taker, base, stride in (
                (residual_reader.rows, held.source, held.source_stride),
                (param_reader.rows, held.param, 0),
                (writer.rows, held.destination, held.destination_stride)):
            m.d.comb += [taker.p.base.eq(base), taker.p.stride.eq(stride),
                         taker.p.rows.eq(held.rows), taker.p.channels.eq(held.channels)]
        m.d.comb += [
            residual_reader.rows.p.flag.eq(held.mode != NormMode.SCALE),
            variance.setup.p.mode.eq(held.mode), variance.setup.p.rows.eq(
                Mux(held.channels == 0, 0, held.rows)),
            variance.setup.p.channels.eq(held.channels), variance.setup.p.epsilon.eq(held.epsilon),
        ]
        if factor_reader is not None:
            rows, turned = factor_reader.rows.p, held.factor_words != 0
            m.d.comb += [
                rows.base.eq(held.factors), rows.stride.eq(held.factor_stride),
                rows.period.eq(held.factor_words), rows.channels.eq(held.channels),
                rows.rows.eq(Mux(turned, held.rows, 0)),
                param_reader.rows.p.flag.eq(turned),
            ]
            with m.If(held.counted != 0):
                m.d.comb += variance.setup.p.channels.eq(held.counted)

    def _apply(self, m, words, params, factors, scales, results):
        """Words with the scale of their row, later with their parameters and factors, to results.
        Parameters say whether factors come with them."""
        lanes = self.config.lanes
        m.submodules.normalise = normalise = Normalise(lanes, self.max_channels)
        # With a register on the way to the multipliers.
        normalised = 1 + normalise.LATENCY
        scaled = normalised + 1 + Requantise.LATENCY
        latency = scaled + (Rotate.LATENCY if self.config.rotary else 0)
        m.submodules.results = queue = CreditQueue(results.payload.shape(), latency)
        wiring.connect(m, queue.output, results)

        # A word enters with its parameters where its row's scale is there, and takes that along if it
        # is the last.
        room = queue.room
        if self.config.rotary:
            room = Signal()
            m.d.comb += [
                room.eq(queue.room & (factors.valid | ~params.p.flag)),
                factors.ready.eq(words.valid & scales.valid & params.valid & queue.room
                                 & params.p.flag),
            ]
        enters = words.valid & scales.valid & params.valid & room
        m.d.comb += [
            normalise.advance.eq(1), queue.enters.eq(enters),
            words.ready.eq(scales.valid & params.valid & room),
            params.ready.eq(words.valid & scales.valid & room),
            scales.ready.eq(words.valid & params.valid & room & words.p.last),
        ]
        m.d.sync += [normalise.values.eq(words.p.data), normalise.scale.eq(scales.payload)]
        tag = data.StructLayout({"valid": 1, "count": range(lanes + 1), "last": 1})
        tags = [Signal(tag, name=f"tag_{i}") for i in range(latency + 1)]
        m.d.comb += [tags[0].valid.eq(enters), tags[0].count.eq(words.p.count),
                     tags[0].last.eq(words.p.last)]
        m.d.sync += [after.eq(before) for before, after in pairwise(tags)]
        m.d.comb += [queue.arrives.eq(tags[-1].valid), queue.element.count.eq(tags[-1].count),
                     queue.element.last.eq(tags[-1].last)]

        # The parameters wait beside the normalisation of their word.
        m.submodules.beside = beside = SyncFIFO(
            width=len(params.p.data.as_value()), depth=1 << normalised.bit_length())
        m.d.sync += beside.w_data.eq(params.p.data)
        m.d.comb += [beside.w_en.eq(tags[1].valid),
                     beside.r_en.eq(tags[normalised].valid)]
        meets = data.View(params.p.data.shape(), beside.r_data)
        scale_to = signed(8)  # or by way of 16 bits, which saturates alike
        if self.config.rotary:
            scale_to, rotate = signed(16), self._rotate(m, params.p.flag, factors, tags, scaled)
            m.d.comb += queue.element.data.eq(rotate.results)
        for lane in range(lanes):
            m.submodules[f"requantise_{lane}"] = requantise = Requantise(result=scale_to)
            biased = Signal(signed(32), reset_less=True, name=f"biased_{lane}")
            multiplier = Signal(16, reset_less=True, name=f"multiplier_{lane}")
            shift = Signal(6, reset_less=True, name=f"shift_{lane}")
            param = meets[lane]
            m.d.sync += [biased.eq(normalise.normalised[lane] + param.bias),
                         multiplier.eq(param.multiplier), shift.eq(param.shift)]
            m.d.comb += [
                requantise.advance.eq(1), requantise.value.eq(biased),
                requantise.multiplier.eq(multiplier), requantise.shift.eq(shift),
                (rotate.values if self.config.rotary else queue.element.data)[lane].eq(
                    requantise.result),
            ]

    def _rotate(self, m, turned, factors, tags, scaled):
        """The lanes behind the last, `scaled` cycles after a word entered; its factors wait beside."""
        m.submodules.rotate = rotate = Rotate(self.config.lanes)
        m.submodules.turning = turning = SyncFIFO(
            width=1 + 16 * self.config.lanes, depth=1 << scaled.bit_length())
        m.d.sync += turning.w_data.eq(Cat(turned, factors.p.data))
        m.d.comb += [turning.w_en.eq(tags[1].valid), turning.r_en.eq(tags[scaled].valid),
                     Cat(rotate.turned, rotate.factors).eq(turning.r_data)]
        return rotate

    def _report(self, m, done):
        engine = self.engine
        inside = Signal(range(4))
        m.d.sync += inside.eq(inside + (engine.instruction.valid & engine.instruction.ready) - done)
        transfers = [self.residual_read.address, self.param_read.address,
                     self.activation_write.write]
        if self.config.rotary:
            transfers.append(self.factor_read.address)
        # Known a cycle late: what every port does reaches here from all over the device.
        refused, moving = Signal(len(transfers)), Signal(len(transfers))
        m.d.sync += [refused.eq(Cat(t.valid & ~t.ready for t in transfers)),
                     moving.eq(Cat(t.valid & t.ready for t in transfers))]
        m.d.comb += [engine.done.eq(done), engine.busy.eq(inside != 0),
                     engine.stalled.eq(engine.busy & refused.any() & ~moving.any())]
