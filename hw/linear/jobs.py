"""What the parts of the linear unit are told of an instruction."""

from amaranth import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..arch.isa import Opcode
from ..interfaces import fields_layout

__all__ = ["IN_FLIGHT", "JobQueue", "job_layout"]

IN_FLIGHT = 8  # instructions in the unit at most


def job_layout(*names: str) -> data.StructLayout:
    """Some fields of LINEAR. `rows` is the number of rows, whatever it comes from."""
    fields = fields_layout(Opcode.LINEAR)
    return data.StructLayout({name: fields[name].shape for name in names})


class JobQueue(wiring.Component):
    """The jobs of one part: it takes the next when it is through with one, so that each part can
    be at another instruction.

    A job can be taken in the cycle after it came. There is room for `IN_FLIGHT`.

    Members
    -------
    put : In(stream.Signature(job, always_ready=True))
    take : Out(stream.Signature(job))
    """

    def __init__(self, job: data.StructLayout):
        self.job = job
        super().__init__({
            "put": In(stream.Signature(job, always_ready=True)),
            "take": Out(stream.Signature(job)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFO(width=self.job.size, depth=IN_FLIGHT)
        m.d.comb += [
            fifo.w_data.eq(self.put.payload), fifo.w_en.eq(self.put.valid),
            self.take.payload.eq(fifo.r_data), self.take.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.take.ready),
        ]
        return m
