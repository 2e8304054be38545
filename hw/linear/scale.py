"""Accumulators to results: bias, requantisation, gate weight, pointwise table."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Opcode, Target
from ..arch.numerics import GATE_BITS
from ..interfaces import TableWrite, fields_layout
from ..multiply import Multipliers
from ..requantise import Requantise
from .parameters import Channel

__all__ = ["Scale"]

_TABLE_LATENCY = 2


class Scale(wiring.Component):
    """Adds the bias, and for other targets than the router scales: `lanes` results per cycle.

    No stalls. Results appear a number of cycles after their operands that depends on what the
    instruction asks for: 1 (router), 1 + `Requantise.LATENCY`, and after that 2 for a table or 4
    for a gate weight; never more than `LATENCY`.

    Members
    -------
    fields : In(fields_layout(Opcode.LINEAR))
        Held while operands are inside.
    valid : In(1)
    values : In(data.ArrayLayout(signed(32), lanes))
    channels : In(data.ArrayLayout(Channel, lanes))
    weight : In(16)
    table_write : In(stream.Signature(TableWrite, always_ready=True))
        One copy of the tables serves each lane.
    results_valid : Out(1)
    results : Out(data.ArrayLayout(signed(32), lanes))
        int8 for activations, int16 for the residual stream, int32 for the router.
    """

    LATENCY = 1 + Requantise.LATENCY + Multipliers.LATENCY + 1

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "fields": In(fields_layout(Opcode.LINEAR)),
            "valid": In(1),
            "values": In(data.ArrayLayout(signed(32), config.lanes)),
            "channels": In(data.ArrayLayout(Channel, config.lanes)),
            "weight": In(16),
            "table_write": In(stream.Signature(TableWrite, always_ready=True)),
            "results_valid": Out(1),
            "results": Out(data.ArrayLayout(signed(32), config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        fields = self.fields
        to_activation = fields.target == Target.ACTIVATION
        to_router = fields.target == Target.ROUTER
        gate = (fields.target == Target.RESIDUAL) & fields.queued & fields.gated
        look_up = to_activation & fields.tabled

        scaled = 1 + Requantise.LATENCY
        exits = {1: to_router, scaled: ~(to_router | look_up | gate),
                 scaled + _TABLE_LATENCY: look_up, self.LATENCY: gate}
        valid = self.valid
        for cycles in range(1, self.LATENCY + 1):
            # What has left must not appear again, when the next instruction takes a later exit.
            before, valid = valid & ~exits.get(cycles - 1, 0), Signal(name=f"valid_{cycles}")
            m.d.sync += valid.eq(before)
            with m.If(valid & exits.get(cycles, 0)):
                m.d.comb += self.results_valid.eq(1)

        weight = self.weight
        for _ in range(scaled):
            before, weight = weight, Signal(16, name="weight_after")
            m.d.sync += weight.eq(before)

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
            looked_up = self._table(m, lane, narrow)
            gated = self._gate(m, lane, requantise.result, weight)
            m.d.comb += self.results[lane].eq(
                Mux(to_router, biased, Mux(look_up, looked_up, Mux(to_activation, narrow,
                    Mux(gate, gated, requantise.result)))))
        return m

    def _table(self, m, lane, index):
        m.submodules[f"tables_{lane}"] = memory = Memory(
            shape=signed(8), depth=256 * self.config.tables, init=[])
        write, read = memory.write_port(), memory.read_port()
        found = Signal(signed(8), name=f"looked_up_{lane}")
        entry = self.table_write.payload
        m.d.comb += [
            write.en.eq(self.table_write.valid), write.addr.eq(entry.address),
            write.data.eq(entry.data),
            read.addr.eq((self.fields.table << 8) | index.as_unsigned()),
        ]
        m.d.sync += found.eq(read.data)
        return found

    def _gate(self, m, lane, update, weight):
        m.submodules[f"gate_{lane}"] = multiply = Multipliers(signed(16), GATE_BITS)
        gated = Signal(signed(16), name=f"gated_{lane}")
        m.d.comb += [multiply.advance.eq(1), multiply.a[0].eq(update), multiply.b[0].eq(weight)]
        m.d.sync += gated.eq((multiply.product[0] + (1 << (GATE_BITS - 1))) >> GATE_BITS)
        return gated
