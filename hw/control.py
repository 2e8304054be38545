"""The host's side: registers, start and end of a run, counters."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .arch.config import Config
from .arch.isa import Engine
from .arch.layout import ALIGNMENT
from .arch.registers import ENGINE_COUNTERS, MAGIC, Control, Register, Status, counter
from .ports import RegisterPort

__all__ = ["ControlUnit"]


class ControlUnit(wiring.Component):
    """Serves the registers of `arch.registers` and counts what happens during a run.

    One access every three cycles; its response comes two cycles after it and waits as long as the
    host lets it. Registers that do not exist, and writes to those that cannot be written, read as
    0 and do nothing. START during a run does nothing; START with a `PROGRAM` that is not a multiple
    of `ALIGNMENT` is refused: it ends at once, with DONE and ERROR. Counters start at 0 with each
    START, hold still from the cycle after the end on and wrap at 32 bits. The states of an engine
    that are counted exclude each other but for "stalled", which is part of "busy".

    Members
    -------
    registers : In(RegisterPort())
    start : Out(1)
        Pulses before the first cycle of a run.
    program : Out(32)
        Byte address of the first instruction.
    finished : In(1)
        Ends the run; looked at from the cycle after `start`.
    error : In(1)
        Any cycle of a run with this set makes it end with ERROR.
    dispatched : In(1)
    read_beat : In(1)
    write_beat : In(1)
        What INSTRUCTIONS, READ_BEATS and WRITE_BEATS count.
    busy : In(5)
    waiting : In(5)
    stalled : In(5)
        What the counters of each engine count.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__({
            "registers": In(RegisterPort()),
            "start": Out(1), "program": Out(32), "finished": In(1), "error": In(1),
            "dispatched": In(1), "read_beat": In(1), "write_beat": In(1),
            **{name: In(len(Engine)) for name in ENGINE_COUNTERS},
        })

    def elaborate(self, platform):
        m = Module()
        request, response = self.registers.request, self.registers.response
        running, done, failed = Signal(), Signal(), Signal()
        # START clears much, far away: it takes effect from registers, before the next access.
        asked, begin, aligned = Signal(), Signal(), Signal(init=1)
        m.d.sync += [begin.eq(asked), aligned.eq(self.program % ALIGNMENT == 0),
                     self.start.eq(asked & aligned)]

        # Which register was asked for is known in one cycle, and looked up in the next.
        looks, index = Signal(), Signal.like(request.p.index)
        m.d.comb += request.ready.eq(~response.valid & ~looks)
        accessed = request.valid & request.ready
        m.d.sync += [looks.eq(accessed), index.eq(request.p.index)]
        with m.If(looks):
            m.d.sync += response.valid.eq(1)
        with m.Elif(response.ready):
            m.d.sync += response.valid.eq(0)
        with m.If(accessed & request.p.write):
            with m.Switch(request.p.index):
                with m.Case(Register.CONTROL):
                    m.d.comb += asked.eq((request.p.data & Control.START).any() & ~running)
                with m.Case(Register.PROGRAM):
                    m.d.sync += self.program.eq(request.p.data)

        with m.If(begin):
            m.d.sync += [running.eq(self.start), done.eq(~self.start), failed.eq(~self.start)]
        with m.Elif(running):
            m.d.sync += [done.eq(self.finished), running.eq(~self.finished),
                         failed.eq(failed | self.error)]

        status = Mux(running, Status.BUSY, 0) | Mux(done, Status.DONE, 0) | Mux(
            failed, Status.ERROR, 0)
        values = {Register.MAGIC: MAGIC, Register.DIGEST: self.config.digest,
                  Register.STATUS: status, Register.PROGRAM: self.program}
        values |= self._counters(m, begin, running)
        with m.If(looks):
            m.d.sync += response.payload.eq(0)
            with m.Switch(index):
                for register, value in values.items():
                    with m.Case(register):
                        m.d.sync += response.payload.eq(value)
        return m

    def _counters(self, m, begin, running):
        """Counters by register number."""
        events = {Register.CYCLES: 1, Register.INSTRUCTIONS: self.dispatched,
                  Register.READ_BEATS: self.read_beat, Register.WRITE_BEATS: self.write_beat}
        events |= {counter(engine, name): getattr(self, name)[engine]
                   for engine in Engine for name in ENGINE_COUNTERS}
        counts = {}
        for index, event in events.items():
            counts[index] = count = Signal(32, name=f"count_{index}")
            # Events are known late in their cycle, and counters are wide.
            counted = Signal(name=f"counted_{index}")
            m.d.sync += counted.eq(running & event)
            with m.If(begin):
                m.d.sync += count.eq(0)
            with m.Elif(counted):
                m.d.sync += count.eq(count + 1)
        return counts
