"""A stand-in for the accelerator, with its two ports: copies one burst of memory at START."""

import enum

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeware.hw.arch.registers import MAGIC, Control, Register, Status
from moeware.hw.events import Events
from moeware.hw.ports import MemoryPort, RegisterPort

__all__ = ["FAULT", "LENGTH", "SOURCE", "TARGET", "Copier", "Fault"]

SOURCE, TARGET, LENGTH, FAULT = Register.PROGRAM, 48, 49, 50  # registers: bytes, bytes, bus words


class Fault(enum.IntEnum):
    """What the copier does against the rules of its ports."""

    NONE = 0
    CHANGE_COMMAND = 1  # the read command's address moves on while it waits
    CHANGE_DATA = 2  # so does the written word
    WITHDRAW = 3  # the write command is valid every other cycle
    HANG = 4  # is never done
    SILENT = 5  # does not answer the host
    SHORT = 6  # writes one word less than announced, and is done


class Copier(wiring.Component):
    """Copies `LENGTH` bus words from `SOURCE` to `TARGET`, as one burst each.

    Members
    -------
    memory : Out(MemoryPort(bus_bytes))
    registers : In(RegisterPort())
    events : Out(Events)
        Nothing: a copier has no engines.
    """

    def __init__(self, bus_bytes: int):
        super().__init__({"memory": Out(MemoryPort(bus_bytes)), "registers": In(RegisterPort()),
                          "events": Out(Events)})

    def elaborate(self, platform):
        m = Module()
        memory, request, response = self.memory, self.registers.request, self.registers.response
        source, target, length, fault = Signal(32), Signal(32), Signal(13), Signal(3)
        running, done, start, toggle = Signal(), Signal(), Signal(), Signal()

        m.d.sync += toggle.eq(~toggle)
        m.d.comb += request.ready.eq(~response.valid)
        with m.If(response.valid & response.ready):
            m.d.sync += response.valid.eq(0)
        with m.If(request.valid & request.ready):
            m.d.sync += [response.valid.eq(fault != Fault.SILENT), response.payload.eq(0)]
            with m.Switch(request.p.index):
                for index, value in ((Register.MAGIC, MAGIC), (SOURCE, source),
                                     (Register.STATUS, (running & ~done) * Status.BUSY
                                      | done * Status.DONE)):
                    with m.Case(index):
                        m.d.sync += response.payload.eq(value)
            with m.If(request.p.write), m.Switch(request.p.index):
                for index, signal in ((SOURCE, source), (TARGET, target), (LENGTH, length),
                                      (FAULT, fault)):
                    with m.Case(index):
                        m.d.sync += signal.eq(request.p.data)
                with m.Case(Register.CONTROL):
                    m.d.comb += start.eq(request.p.data == Control.START)

        asked, announced, left = Signal(), Signal(), Signal(13)
        moved = memory.write_data.valid & memory.write_data.ready
        m.d.comb += [
            memory.read_command.valid.eq(running & ~asked),
            memory.read_command.p.address.eq(source), memory.read_command.p.beats.eq(length),
            memory.write_command.valid.eq(running & ~announced
                                          & ~((fault == Fault.WITHDRAW) & toggle)),
            memory.write_command.p.address.eq(target), memory.write_command.p.beats.eq(length),
            memory.write_data.payload.eq(
                memory.read_data.payload ^ ((fault == Fault.CHANGE_DATA) & toggle)),
            memory.write_data.valid.eq(memory.read_data.valid & announced & (left != 0)),
            memory.read_data.ready.eq(memory.write_data.ready & announced),
        ]
        with m.If((fault == Fault.CHANGE_COMMAND) & memory.read_command.valid):
            m.d.sync += source.eq(source + 4096)
        with m.If(memory.read_command.valid & memory.read_command.ready):
            m.d.sync += asked.eq(1)
        with m.If(memory.write_command.valid & memory.write_command.ready):
            m.d.sync += announced.eq(1)
        with m.If(moved):
            m.d.sync += left.eq(left - 1)
        with m.If(memory.written & (fault != Fault.HANG)
                  | (fault == Fault.SHORT) & announced & (left == 0)):
            m.d.sync += [done.eq(1), running.eq(0)]
        with m.If(start):
            m.d.sync += [running.eq(1), done.eq(0), asked.eq(0), announced.eq(0),
                         left.eq(length - (fault == Fault.SHORT))]
        return m
