"""Second stage, back: division by the sum of probabilities, int8 and write-back."""

from amaranth import Cat, Module, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..credit import CreditQueue
from ..divide import Reciprocal
from ..interfaces import Masked, activation_address
from ..multiply import Multipliers
from ..requantise import Requantise
from .shapes import Pass, accumulator_shape, delayed, total_bits

__all__ = ["ResultWriter"]


class ResultWriter(wiring.Component):
    """Copies the sums of a pass, scales `lanes` of them a cycle by the reciprocal of their row's
    sum of probabilities and writes them, while the next pass is summed.

    A pass takes rows * depth / lanes cycles; the first of a group waits up to `reciprocal_cycles`
    for its reciprocals, which up to `ROWS_PER_DIVIDER` rows compute one after another. A row
    without any probability gives zeros. While a write is refused, results behind it wait in a queue.

    Members
    -------
    claimed : In(1)
        Sums are on their way, and `free` falls.
    free : Out(1)
        No sums are on their way or here.
    passes : In(stream.Signature(Pass(config)))
        Taken with the sums, and must be there with them.
    totalled : In(1)
    totals : In(data.ArrayLayout(total_bits(config), queries))
        Come not later than the sums of a counted pass, and only for one.
    summed : In(1)
    sums : In(data.ArrayLayout(accumulator_shape(config), queries * depth))
    write : Out(stream.Signature(Masked(8, depth, activation_address(config))))
    done : Out(1)
        The last word of an instruction was written in the cycle before.
    """

    ROWS_PER_DIVIDER = 4
    SCALING = Multipliers.LATENCY + 1  # cycles until the scale of a result's row is known

    def __init__(self, config: Config, *, primitive: str | None = None):
        self.config, self.primitive = config, primitive
        self.reciprocal_cycles = (Reciprocal.LATENCY + 2 + Reciprocal.INTERVAL
                                  * (min(config.queries, self.ROWS_PER_DIVIDER) - 1))
        super().__init__({
            "claimed": In(1), "free": Out(1, init=1),
            "passes": In(stream.Signature(Pass(config))),
            "totalled": In(1),
            "totals": In(data.ArrayLayout(total_bits(config), config.queries)),
            "summed": In(1),
            "sums": In(data.ArrayLayout(accumulator_shape(config), config.queries * config.depth)),
            "write": Out(stream.Signature(
                Masked(8, config.depth, activation_address(config)))),
            "done": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        depth, lanes = self.config.depth, self.config.lanes
        chunks = depth // lanes
        scales, ready = self._reciprocals(m)
        place_layout = data.StructLayout({"address": 20, "chunk": range(chunks), "last": 1,
                                          "final": 1})
        address = activation_address(self.config)
        m.submodules.writes = writes = CreditQueue(
            data.StructLayout({"address": address, "place": place_layout, "results": 8 * lanes}),
            self.SCALING + Requantise.LATENCY)

        # What is to be written: one chunk of `lanes` results after another.
        work = Signal(Pass(self.config), reset_less=True)
        loaded = Signal()
        row = Signal(range(self.config.queries))
        chunk = Signal(range(chunks))
        waiting = Signal(self.sums.shape(), reset_less=True)
        emit = Signal()
        place = Signal(place_layout)
        m.d.comb += [
            self.passes.ready.eq(self.summed),
            emit.eq(loaded & ready & writes.room), writes.enters.eq(emit),
            place.address.eq(work.destination), place.chunk.eq(chunk),
            place.last.eq((row == work.rows - 1) & (chunk == chunks - 1)),
            place.final.eq(work.final),
        ]
        with m.If(emit):
            m.d.sync += chunk.eq(chunk + 1)
            with m.If(chunk == chunks - 1):
                m.d.sync += [chunk.eq(0), row.eq(row + 1),
                             work.destination.eq(work.destination + work.destination_stride)]
            with m.If(place.last):
                m.d.sync += [row.eq(0), loaded.eq(0)]

        # The row's scale, as `numerics.row_scale`.
        m.submodules.scale = scale = Multipliers(unsigned(16), unsigned(16),
                                                 primitive=self.primitive)
        row_scale = scales[row]
        shift = Signal(6)
        multiplier = Signal(16, reset_less=True)
        m.d.comb += [
            scale.advance.eq(1),
            scale.a[0].eq(row_scale.r), scale.b[0].eq(work.out_multiplier),
            shift.eq(work.out_shift + row_scale.e - 1),
        ]
        m.d.sync += multiplier.eq((scale.product[0] + (1 << 15)) >> 16)
        shift = delayed(m, shift, self.SCALING, name="shift")
        valid = delayed(m, emit, self.SCALING, name="scaled", reset_less=False)
        place = delayed(m, place, self.SCALING, name="scaled_place")

        # Sums leave in order, so they shift past the requantisers instead of being selected.
        with m.If(self.claimed):
            m.d.sync += self.free.eq(0)
        with m.If(self.summed):
            m.d.sync += [waiting.eq(self.sums), work.eq(self.passes.payload), loaded.eq(1)]
        with m.Elif(valid):
            m.d.sync += waiting.as_value().eq(waiting.as_value() >> (lanes * len(self.sums[0])))
            with m.If(place.last):
                m.d.sync += self.free.eq(1)

        results = []
        for lane in range(lanes):
            m.submodules[f"requantise_{lane}"] = requantise = Requantise(
                accumulator_shape(self.config), signed(8), primitive=self.primitive)
            m.d.comb += [
                requantise.advance.eq(1), requantise.value.eq(waiting[lane]),
                requantise.multiplier.eq(multiplier), requantise.shift.eq(shift),
            ]
            results.append(requantise.result)
        written = delayed(m, place, Requantise.LATENCY, name="place")
        m.d.comb += [
            writes.arrives.eq(delayed(m, valid, Requantise.LATENCY, name="valid", reset_less=False)),
            writes.element.place.eq(written), writes.element.address.eq(address.of(written.address)),
            writes.element.results.eq(Cat(results)),
        ]
        self._write(m, writes.output)
        return m

    def _write(self, m, sent):
        lanes = self.config.lanes
        m.d.comb += [
            self.write.valid.eq(sent.valid), sent.ready.eq(self.write.ready),
            self.write.p.address.eq(sent.p.address),
            self.write.p.data.eq(sent.p.results.replicate(self.config.depth // lanes)),
            self.write.p.mask.eq(((1 << lanes) - 1) << (sent.p.place.chunk * lanes)),
        ]
        m.d.sync += self.done.eq(self.write.valid & self.write.ready
                                 & sent.p.place.last & sent.p.place.final)

    def _reciprocals(self, m):
        """The reciprocals of the rows, and whether they are those of the newest totals."""
        queries, share = self.config.queries, self.ROWS_PER_DIVIDER
        scale_layout = data.StructLayout({"r": 16, "e": 6})
        scales = Signal(data.ArrayLayout(scale_layout, queries), reset_less=True)
        finished = []
        for first in range(0, queries, share):
            rows = range(first, min(first + share, queries))
            reciprocal = Reciprocal()
            m.submodules[f"reciprocal_{first}"] = reciprocal
            # Totals and reciprocals move through registers by one row at a time.
            totals = Signal(data.ArrayLayout(len(self.totals[0]), len(rows)), reset_less=True)
            to_send, to_come = Signal(range(len(rows) + 1)), Signal(range(len(rows) + 1))
            m.d.comb += [
                reciprocal.totals.payload.eq(totals[0]),
                reciprocal.totals.valid.eq(to_send != 0),
                reciprocal.reciprocals.ready.eq(1),
            ]
            with m.If(reciprocal.totals.valid & reciprocal.totals.ready):
                m.d.sync += to_send.eq(to_send - 1)
                m.d.sync += [totals[i].eq(totals[i + 1]) for i in range(len(rows) - 1)]
            with m.If(reciprocal.reciprocals.valid):
                m.d.sync += to_come.eq(to_come - 1)
                m.d.sync += scales[rows[-1]].eq(reciprocal.reciprocals.payload)
                m.d.sync += [scales[row].eq(scales[row + 1]) for row in rows[:-1]]
            with m.If(self.totalled):
                m.d.sync += [to_send.eq(len(rows)), to_come.eq(len(rows))]
                m.d.sync += [totals[i].eq(self.totals[row]) for i, row in enumerate(rows)]
            finished.append(to_come == 0)
        return scales, Cat(finished).all()
