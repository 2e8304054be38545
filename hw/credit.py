"""Pipelines that never stand still."""

from amaranth import Module, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from .slices import RegisterSlice

__all__ = ["CreditQueue"]


class CreditQueue(wiring.Component):
    """Takes what comes out of a pipeline that cannot be stopped, and lets no more enter than it has
    room for: so that nothing has to enable all registers of the pipeline at once, wherever they lie.

    An element a cycle, if whatever takes them does; they leave `LATENCY` cycles after they came.

    Parameters
    ----------
    shape : of an element
    latency : of the pipeline: cycles from `enters` to `arrives`, at most

    Members
    -------
    room : Out(1)
        An element may enter the pipeline in this cycle. From a register.
    enters : In(1)
        It does; only with `room`.
    arrives : In(1)
        An element comes out of the pipeline.
    element : In(shape)
    output : Out(stream.Signature(shape))
    """

    LATENCY = 1 + RegisterSlice.LATENCY
    # `room` is known a cycle late, and an element's place is free a cycle after it left.
    MARGIN = 3

    def __init__(self, shape, latency: int):
        self.depth = 1 << (latency + self.MARGIN - 1).bit_length()
        super().__init__({"room": Out(1), "enters": In(1), "arrives": In(1), "element": In(shape),
                          "output": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.waiting = waiting = SyncFIFO(
            width=len(Value.cast(self.element)), depth=self.depth)
        m.submodules.leaving = leaving = RegisterSlice(self.output.payload.shape())
        wiring.connect(m, leaving.output, wiring.flipped(self.output))
        leaves = leaving.input.valid & leaving.input.ready
        inside = Signal(range(self.depth + 1))  # elements in the pipeline and waiting
        m.d.comb += [
            waiting.w_data.eq(self.element), waiting.w_en.eq(self.arrives),
            leaving.input.valid.eq(waiting.r_rdy), waiting.r_en.eq(leaving.input.ready),
            leaving.input.payload.eq(waiting.r_data),
        ]
        m.d.sync += [inside.eq(inside + self.enters - leaves), self.room.eq(inside < self.depth - 1)]
        return m
