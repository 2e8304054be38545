"""A cocotb bench of the accelerator: clock, reset, memory, host and a watchdog."""

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from moeware.hw.arch.registers import Control, Register, Status

from .ports import Memory, Registers
from .protocol import ProtocolError

__all__ = ["Bench"]


class Bench:
    """Everything around the accelerator `dut`.

    Time moves in `cycle` alone, in the test's own coroutine, so that what a checker raises ends the
    test.

    Parameters
    ----------
    contents : DRAM, read and written in place.
    stall : highest probability of a pause, for every channel of both ports.
    """

    def __init__(self, dut, bus_bytes: int, contents: bytearray, *, stall: float = 0.0,
                 seed: int = 0):
        self.dut = dut
        self.memory = Memory(dut, bus_bytes, contents, stall=stall, seed=seed)
        self.registers = Registers(dut, stall=stall, seed=seed)

    async def start(self) -> None:
        """Start the clock and hold reset for two cycles."""
        dut = self.dut
        for signal in (dut.rst, dut.memory__read_data__valid, dut.memory__written,
                       dut.registers__request__valid):
            signal.value = 0
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
        await FallingEdge(dut.clk)
        dut.rst.value = 1
        for _ in range(2):
            await FallingEdge(dut.clk)
        dut.rst.value = 0

    async def cycle(self) -> None:
        """One clock cycle."""
        await FallingEdge(self.dut.clk)
        self.memory.drive()
        self.registers.drive()
        await ReadOnly()
        self.memory.sample()
        self.registers.sample()

    async def access(self, index: int, value: int | None = None, *, deadline: int = 1000) -> int:
        """The response to a read of a register, or to a write of `value`."""
        self.registers.begin(index, value)
        for _ in range(deadline):
            await self.cycle()
            if self.registers.answer is not None:
                return self.registers.answer
        raise ProtocolError(f"Register {index} must answer within {deadline} cycles")

    async def run(self, entry: int, *, deadline: int = 100_000) -> Status:
        """Run the program at `entry`; the last STATUS. Checks that every burst is complete."""
        await self.access(Register.PROGRAM, entry)
        await self.access(Register.CONTROL, Control.START)
        for _ in range(deadline // 20):
            status = Status(await self.access(Register.STATUS))
            if not status & Status.BUSY:
                self.memory.finish()
                return status
            for _ in range(20):
                await self.cycle()
        raise AssertionError(f"The run must end within {deadline} cycles")
