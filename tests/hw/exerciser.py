"""A stand-in for the accelerator that moves memory: to test what is around one."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeware.hw.arch.registers import Register, Status
from moeware.hw.ports import MemoryPort, RegisterPort

PAGE = 4096
SOURCE, TARGET, PAGES, SUM = 8, 9, 10, 11  # registers, besides those of `Register`
COPY, READ = 1, 2  # values to write to Register.CONTROL


class Exerciser(wiring.Component):
    """Copies `PAGES` pages from SOURCE to TARGET, or only reads them; SUM is the sum of the low 32
    bits of all words read, CYCLES the cycles it took."""

    def __init__(self, bus_bytes):
        self.bus_bytes = bus_bytes
        super().__init__({"memory": Out(MemoryPort(bus_bytes)), "registers": In(RegisterPort())})

    def elaborate(self, platform):
        m = Module()
        memory, registers, beats = self.memory, self.registers, PAGE // self.bus_bytes

        source, target, count, total, cycles = (
            Signal(32, name=n) for n in ("source", "target", "count", "total", "cycles"))
        settable = {SOURCE: source, TARGET: target, PAGES: count}
        busy, copying, done = Signal(), Signal(), Signal()
        to_read, to_write, to_finish = Signal(16), Signal(16), Signal(32)
        read_page, write_page = Signal(20), Signal(20)

        request, response = registers.request, registers.response
        m.d.comb += request.ready.eq(~response.valid | response.ready)
        with m.If(request.ready):
            m.d.sync += response.valid.eq(request.valid)
            values = {**settable, SUM: total, Register.CYCLES: cycles,
                      Register.STATUS: Mux(busy, Status.BUSY, 0) | Mux(done, Status.DONE, 0)}
            with m.Switch(request.p.index):
                for index, value in values.items():
                    with m.Case(index):
                        m.d.sync += response.payload.eq(value)
            with m.If(request.valid & request.p.write):
                for index, value in settable.items():
                    with m.If(request.p.index == index):
                        m.d.sync += value.eq(request.p.data)
                with m.If(request.p.index == Register.CONTROL):
                    m.d.sync += [
                        busy.eq(1), done.eq(0), total.eq(0), cycles.eq(0),
                        copying.eq(request.p.data == COPY), to_read.eq(count),
                        to_write.eq((request.p.data == COPY).replicate(16) & count),
                        to_finish.eq((request.p.data == COPY).replicate(32) & count
                                     | (request.p.data == READ).replicate(32) & count * beats),
                        read_page.eq(source >> 12), write_page.eq(target >> 12),
                    ]

        m.d.comb += [
            memory.read_command.valid.eq(to_read != 0),
            memory.read_command.p.address.eq(read_page << 12),
            memory.read_command.p.beats.eq(beats),
            memory.write_command.valid.eq(to_write != 0),
            memory.write_command.p.address.eq(write_page << 12),
            memory.write_command.p.beats.eq(beats),
            memory.write_data.payload.eq(memory.read_data.payload),
            memory.write_data.valid.eq(memory.read_data.valid & copying),
            memory.read_data.ready.eq(memory.write_data.ready | ~copying),
        ]
        with m.If(memory.read_command.valid & memory.read_command.ready):
            m.d.sync += [to_read.eq(to_read - 1), read_page.eq(read_page + 1)]
        with m.If(memory.write_command.valid & memory.write_command.ready):
            m.d.sync += [to_write.eq(to_write - 1), write_page.eq(write_page + 1)]
        read = memory.read_data.valid & memory.read_data.ready
        with m.If(read):
            m.d.sync += total.eq(total + memory.read_data.payload[:32])
        with m.If(busy):
            m.d.sync += [cycles.eq(cycles + 1), to_finish.eq(
                to_finish - (memory.written & copying) - (read & ~copying))]
            with m.If(to_finish == 0):
                m.d.sync += [busy.eq(0), done.eq(1)]
        return m
