"""Accumulators to results: bias, requantisation, gate weight, pointwise table."""

from itertools import pairwise

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Target
from ..arch.numerics import GATE_BITS
from ..interfaces import TableWrite
from ..multiply import Multipliers
from ..requantise import Requantise
from .drain import Mode
from .parameters import Channel

__all__ = ["Scale"]


class Scale(wiring.Component):
    """Adds the bias, and for other targets than the router scales: `lanes` results per cycle.

    No stalls. Results appear `LATENCY` cycles after their operands; those for the router 1 cycle
    after, so operands for the router and for others must not be inside together.

    Members
    -------
    valid : In(1)
    mode : In(Mode)
    values : In(data.ArrayLayout(signed(32), lanes))
    channels : In(data.ArrayLayout(Channel, lanes))
    weight : In(16)
    table_write : In(stream.Signature(TableWrite, always_ready=True))
        One copy of the tables serves each lane.
    results_valid : Out(1)
    results : Out(data.ArrayLayout(signed(32), lanes))
        int8 for activations, int16 for the residual stream, int32 for the router.
    """

    LATENCY = 1 + Requantise.LATENCY + 1 + Multipliers.LATENCY + 1

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "valid": In(1),
            "mode": In(Mode),
            "values": In(data.ArrayLayout(signed(32), config.lanes)),
            "channels": In(data.ArrayLayout(Channel, config.lanes)),
            "weight": In(16),
            "table_write": In(stream.Signature(TableWrite, always_ready=True)),
            "results_valid": Out(1),
            "results": Out(data.ArrayLayout(signed(32), config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        entering = data.StructLayout({"valid": 1, "mode": Mode, "weight": GATE_BITS + 1})
        stages = [Signal(entering, name=f"stage_{i}") for i in range(self.LATENCY + 1)]
        first, scaled, last = stages[1], stages[1 + Requantise.LATENCY], stages[self.LATENCY]
        to_router = first.valid & (first.mode.target == Target.ROUTER)
        m.d.comb += [
            stages[0].valid.eq(self.valid), stages[0].mode.eq(self.mode),
            # Whatever has no gate weight is multiplied by one, which changes nothing.
            stages[0].weight.eq(Mux(self.mode.gate, self.weight, 1 << GATE_BITS)),
            self.results_valid.eq(to_router | last.valid),
        ]
        m.d.sync += [after.eq(before) for before, after in pairwise(stages)]
        with m.If(to_router):
            m.d.sync += stages[2].valid.eq(0)

        for lane in range(self.config.lanes):
            channel = self.channels[lane]
            biased = Signal(signed(32), name=f"biased_{lane}")
            m.submodules[f"requantise_{lane}"] = requantise = Requantise(
                signed(32), signed(16))
            m.d.sync += [biased.eq(self.values[lane] + channel.bias),
                         requantise.multiplier.eq(channel.multiplier),
                         requantise.shift.eq(channel.shift)]
            m.d.comb += [requantise.advance.eq(1), requantise.value.eq(biased)]

            # Saturating to 16 and then to 8 bits is saturating to 8 bits.
            upper = requantise.result[7:]
            narrow = Signal(signed(8), name=f"narrow_{lane}")
            m.d.comb += narrow.eq(Mux(upper.all() | ~upper.any(), requantise.result,
                                      Mux(requantise.result < 0, -128, 127)))
            update = Mux(scaled.mode.target == Target.ACTIVATION, narrow, requantise.result)
            looked_up = self._table(m, lane, scaled.mode.table, narrow)
            gated = self._gate(m, lane, update, scaled.weight)
            m.d.comb += self.results[lane].eq(
                Mux(to_router, biased, Mux(last.mode.look_up, looked_up, gated)))
        return m

    def _table(self, m, lane, table, index):
        """Found `Multipliers.LATENCY` + 2 cycles after the index, as what is multiplied."""
        m.submodules[f"tables_{lane}"] = memory = Memory(
            shape=signed(8), depth=256 * self.config.tables, init=[])
        write, read = memory.write_port(), memory.read_port()
        entry = self.table_write.payload
        m.d.comb += [
            write.en.eq(self.table_write.valid), write.addr.eq(entry.address),
            write.data.eq(entry.data),
            read.addr.eq((table << 8) | index.as_unsigned()),
        ]
        found = read.data
        for _ in range(Multipliers.LATENCY + 1):
            before, found = found, Signal(signed(8), name=f"looked_up_{lane}")
            m.d.sync += found.eq(before)
        return found

    def _gate(self, m, lane, update, weight):
        m.submodules[f"gate_{lane}"] = multiply = Multipliers(signed(16), GATE_BITS + 1)
        gated = Signal(signed(16), name=f"gated_{lane}")
        # A register on the way to the multiplier.
        m.d.comb += multiply.advance.eq(1)
        m.d.sync += [multiply.a[0].eq(update), multiply.b[0].eq(weight)]
        m.d.sync += gated.eq((multiply.product[0] + (1 << (GATE_BITS - 1))) >> GATE_BITS)
        return gated
