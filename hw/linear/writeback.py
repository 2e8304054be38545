"""Results into the activation memory, the residual memory or the router."""

from amaranth import Cat, Module, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out, connect, flipped

from ..arch.config import Config
from ..arch.isa import Target
from ..interfaces import Logits, ReadPort, WritePort, activation_address
from ..slices import RegisterSlice
from .drain import Place
from .residual import ResidualUpdate, key_of

__all__ = ["WriteBack"]


class WriteBack(wiring.Component):
    """Buffers up to `depth` results and writes them, one word per cycle, to their target.

    Whoever sends results reserves their place in advance: `space` counts what is left. Instructions
    end in order: their last results are written in order, whatever their targets.

    Members
    -------
    reserve : In(1)
        A result will come: only while `space` is not 0.
    spare : In(1)
        One for which a place was reserved will not come. Where the configuration has products.
    space : Out(range(depth + 1))
    has_space : Out(1)
        It is not 0.
    written : Out(2)
        Results that were written, or places spared, one cycle ago: `space` grows.
    ended : Out(1)
        The last result of an instruction, not for the router, was written one cycle ago.
    place_valid : In(1)
    place : In(Place(config))
        Places come in the order of their results, none later than its result.
    results_valid : In(1)
    results : In(data.ArrayLayout(signed(32), lanes))
    activation_write : Out(WritePort(8, depth, activation_address(config)))
    residual_read : Out(ReadPort(16 * lanes))
    residual_write : Out(WritePort(16, lanes))
    logits : Out(stream.Signature(Logits(config)))
    """

    def __init__(self, config: Config, depth: int):
        self.config, self.depth = config, depth
        super().__init__({
            "reserve": In(1),
            **({"spare": In(1)} if config.products else {}),
            "space": Out(range(depth + 1), init=depth),
            "has_space": Out(1, init=1),
            "written": Out(2),
            "ended": Out(1),
            "place_valid": In(1),
            "place": In(Place(config)),
            "results_valid": In(1),
            "results": In(data.ArrayLayout(signed(32), config.lanes)),
            "activation_write": Out(WritePort(8, config.depth, activation_address(config))),
            "residual_read": Out(ReadPort(16 * config.lanes)),
            "residual_write": Out(WritePort(16, config.lanes)),
            "logits": Out(stream.Signature(Logits(config))),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        lanes = config.lanes

        m.submodules.places = places = SyncFIFO(width=len(self.place.as_value()), depth=self.depth)
        m.submodules.values = values = SyncFIFO(width=32 * lanes, depth=self.depth)
        m.submodules.update = update = ResidualUpdate(config)
        m.submodules.updating = updating = RegisterSlice(update.updates.payload.shape())
        connect(m, updating.output, update.updates)
        connect(m, update.read, flipped(self.residual_read))
        connect(m, update.write, flipped(self.residual_write))

        # Registers behind the buffers keep their read time, and their counters, out of the paths
        # through the ports.
        m.submodules.leaving = leaving = RegisterSlice(data.StructLayout(
            {"place": self.place.shape(), "results": self.results.shape()}))
        valid, place, results = leaving.output.valid, leaving.output.p.place, leaving.output.p.results
        taken = leaving.output.ready
        load = leaving.input.valid & leaving.input.ready
        m.d.comb += [
            places.w_data.eq(self.place), places.w_en.eq(self.place_valid),
            values.w_data.eq(self.results), values.w_en.eq(self.results_valid),
            leaving.input.valid.eq(values.r_rdy),
            leaving.input.p.place.eq(places.r_data), leaving.input.p.results.eq(values.r_data),
            places.r_en.eq(load), values.r_en.eq(load),
        ]
        write, logits = self.activation_write.write, self.logits
        m.submodules.arranged = arranged = RegisterSlice(data.StructLayout(
            {"word": write.payload.shape(), "end": 1}))
        word = arranged.input.p.word
        m.d.comb += [
            word.address.eq(activation_address(config).of(place.address)),
            word.data.eq(Cat(value[:8] for value in results).replicate(config.depth // lanes)),
            word.mask.eq(Cat(place.mask & (place.part == part).replicate(lanes)
                             for part in range(config.depth // lanes))),
            arranged.input.p.end.eq(place.end),
            write.payload.eq(arranged.output.p.word), write.valid.eq(arranged.output.valid),
            arranged.output.ready.eq(write.ready),
            updating.input.p.word.address.eq(place.address), updating.input.p.key.eq(key_of(place.address)),
            updating.input.p.word.data.eq(Cat(value[:16] for value in results)),
            updating.input.p.word.mask.eq(place.mask),
            updating.input.p.accumulate.eq(place.accumulate), updating.input.p.end.eq(place.end),
            logits.p.row.eq(place.row), logits.p.channel.eq(place.channel),
            logits.p.logits.eq(results),
        ]
        # The last result of an instruction waits for those before it that go elsewhere.
        residual = self.residual_write.write
        with m.Switch(place.target):
            with m.Case(Target.ACTIVATION):
                may = ~(place.end & (updating.output.valid | update.busy))
                m.d.comb += [arranged.input.valid.eq(valid & may),
                             taken.eq(may & arranged.input.ready)]
            with m.Case(Target.RESIDUAL):
                may = ~(place.end & arranged.output.valid)
                m.d.comb += [updating.input.valid.eq(valid & may),
                             taken.eq(may & updating.input.ready)]
            with m.Case(Target.ROUTER):
                m.d.comb += [logits.valid.eq(valid), taken.eq(logits.ready)]
        arrives = write.valid & write.ready
        left = arrives + (residual.valid & residual.ready) + (logits.valid & logits.ready)
        if config.products:
            left += self.spare
        m.d.sync += [
            self.written.eq(left),
            self.space.eq(self.space - self.reserve + self.written),
            self.has_space.eq((self.written != 0) | (self.space > 1)
                              | (self.has_space & ~self.reserve)),
            self.ended.eq(arrives & arranged.output.p.end | update.ended),
        ]
        return m
