"""What the parts of the linear unit are told of an instruction."""

from amaranth import Module, Mux
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Opcode
from ..interfaces import fields_layout

__all__ = ["IN_FLIGHT", "JobQueue", "job_layout", "per_group"]

IN_FLIGHT = 8  # instructions in the unit at most


def job_layout(config: Config, *names: str) -> data.StructLayout:
    """Some fields of LINEAR. `rows` is the number of rows, whatever it comes from; `narrow` and
    `product` are left out where the configuration has no gateware for them."""
    fields = fields_layout(Opcode.LINEAR)
    options = {"narrow": config.narrow, "product": config.products}
    return data.StructLayout({name: fields[name].shape for name in names if options.get(name, 1)})


def per_group(config: Config, job, number: int):
    """A number of an output group with weights of 8 bits: twice as many if the job is narrow."""
    return Mux(job.narrow, 2 * number, number) if config.narrow else number


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
