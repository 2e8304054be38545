"""Accumulators to results: bias, requantisation, gate weight, pointwise table, products."""

from itertools import pairwise

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Target
from ..arch.numerics import GATE_BITS, PRODUCT_BITS
from ..interfaces import TableWrite
from ..multiply import Multipliers
from ..requantise import Requantise, halved
from .drain import Mode
from .parameters import Channel

__all__ = ["Scale"]


class Scale(wiring.Component):
    """Adds the bias, and for other targets than the router scales: `lanes` results per cycle.

    No stalls. Results appear `latency` cycles after their operands; those for the router 1 cycle
    after, so operands for the router and for others must not be inside together. The first results
    of a pair appear nowhere: of each row they are held until the second ones come.

    Members
    -------
    valid : In(1)
    mode : In(Mode(config))
    values : In(data.ArrayLayout(signed(32), lanes))
    channels : In(data.ArrayLayout(Channel, lanes))
    weight : In(16)
    table_write : In(stream.Signature(TableWrite, always_ready=True))
        One copy of the tables serves each lane.
    results_valid : Out(1)
    results : Out(data.ArrayLayout(signed(32), lanes))
        int8 for activations, int16 for the residual stream, int32 for the router.
    """

    LOOK_UP = 2  # cycles from a result to its entry in the table

    def __init__(self, config: Config):
        self.config = config
        # Where there are pairs, what is multiplied waits for the table's entry of the cycle before.
        self.scaled = 1 + Requantise.LATENCY
        self.multiplied = self.scaled + (self.LOOK_UP if config.products else 0)
        self.latency = self.multiplied + 1 + Multipliers.LATENCY + 1
        super().__init__({
            "valid": In(1),
            "mode": In(Mode(config)),
            "values": In(data.ArrayLayout(signed(32), config.lanes)),
            "channels": In(data.ArrayLayout(Channel, config.lanes)),
            "weight": In(16),
            "table_write": In(stream.Signature(TableWrite, always_ready=True)),
            "results_valid": Out(1),
            "results": Out(data.ArrayLayout(signed(32), config.lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        products = self.config.products
        entering = data.StructLayout({"valid": 1, "mode": self.mode.shape(), "weight": GATE_BITS + 1})
        stages = [Signal(entering, name=f"stage_{i}") for i in range(self.latency + 1)]
        first, scaled, last = stages[1], stages[self.scaled], stages[self.latency]
        to_router = first.valid & (first.mode.target == Target.ROUTER)
        m.d.comb += [
            stages[0].valid.eq(self.valid), stages[0].mode.eq(self.mode),
            # Whatever has no gate weight is multiplied by one, which changes nothing.
            stages[0].weight.eq(Mux(self.mode.gate, self.weight, 1 << GATE_BITS)),
            self.results_valid.eq(to_router | (last.valid & ~last.mode.hold if products
                                               else last.valid)),
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
            looked_up = self._table(m, lane, scaled.mode.table, narrow)
            to_activation = scaled.mode.target == Target.ACTIVATION
            if products:
                to_activation &= ~scaled.mode.multiply
            update = Mux(to_activation, narrow, requantise.result)
            multiplied = self._multiply(m, lane, update, stages, looked_up[self.LOOK_UP])
            m.d.comb += self.results[lane].eq(
                Mux(to_router, biased, Mux(last.mode.look_up, looked_up[-1], multiplied)))
        return m

    def _table(self, m, lane, table, index):
        """What is found, by the cycles since the index came, from `LOOK_UP` to `latency` on."""
        m.submodules[f"tables_{lane}"] = memory = Memory(
            shape=signed(8), depth=256 * self.config.tables, init=[])
        write, read = memory.write_port(), memory.read_port()
        entry = self.table_write.payload
        m.d.comb += [
            write.en.eq(self.table_write.valid), write.addr.eq(entry.address),
            write.data.eq(entry.data),
            read.addr.eq((table << 8) | index.as_unsigned()),
        ]
        found = [None, read.data]
        for _ in range(self.latency - self.scaled - 1):
            found.append(Signal(signed(8), name=f"looked_up_{lane}"))
            m.d.sync += found[-1].eq(found[-2])
        return found

    def _multiply(self, m, lane, update, stages, looked_up):
        """What is gated, and where there are pairs their products, by one multiplier."""
        for stage in range(self.multiplied - self.scaled):
            before, update = update, Signal(signed(16), name=f"update_{lane}_{stage}")
            m.d.sync += update.eq(before)
        mode, factor = stages[self.multiplied].mode, stages[self.multiplied].weight
        bits = GATE_BITS + 1
        if self.config.products:
            m.submodules[f"held_{lane}"] = held = Memory(shape=signed(8), depth=self.config.tokens,
                                                         init=[])
            write, read = held.write_port(), held.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(stages[self.multiplied].valid & mode.hold),
                write.addr.eq(mode.row), read.addr.eq(mode.row),
                write.data.eq(Mux(mode.look_up, looked_up, update)),
            ]
            factor, bits = Mux(mode.multiply, read.data, factor), signed(GATE_BITS + 2)
        m.submodules[f"gate_{lane}"] = multiply = Multipliers(signed(16), bits)
        gated = Signal(signed(16), name=f"gated_{lane}")
        # A register on the way to the multiplier.
        m.d.comb += multiply.advance.eq(1)
        m.d.sync += [multiply.a[0].eq(update), multiply.b[0].eq(factor)]
        product = multiply.product[0]
        result = (product + (1 << (GATE_BITS - 1))) >> GATE_BITS
        if self.config.products:  # of 8 bits and 16
            paired = halved(m, product[PRODUCT_BITS - 1:24].as_signed(), signed(8))
            result = Mux(stages[self.latency - 1].mode.multiply, paired.as_signed(), result)
        m.d.sync += gated.eq(result)
        return gated
