"""The two ports between the accelerator and its board: a burst memory port and a register port."""

from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Burst", "MemoryPort", "RegisterAccess", "RegisterPort"]


class Burst(data.Struct):
    """A run of consecutive bus words.

    Rules for whoever sends one: `address` is a multiple of the bus width in bytes, `beats` is at
    least 1, and the run does not cross a 4,096-byte boundary.
    """

    address: 32  # bytes
    beats: 13  # bus words


class MemoryPort(wiring.Signature):
    """Burst access to DRAM, seen from the side that asks; reads and writes proceed independently.

    Each direction completes its bursts in the order of its commands. A read returns exactly
    `beats` words; a write takes exactly `beats` words, and `written` pulses for one cycle once the
    burst can be read back. Reads and writes in flight at the same time have no mutual order.

    Members
    -------
    read_command : Out(stream.Signature(Burst))
    read_data : In(stream.Signature(8 * bus_bytes))
    write_command : Out(stream.Signature(Burst))
    write_data : Out(stream.Signature(8 * bus_bytes))
    written : In(1)
    """

    def __init__(self, bus_bytes: int):
        self.bus_bytes = bus_bytes
        super().__init__({
            "read_command": Out(stream.Signature(Burst)),
            "read_data": In(stream.Signature(8 * bus_bytes)),
            "write_command": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(8 * bus_bytes)),
            "written": In(1),
        })


class RegisterAccess(data.Struct):
    """One access to a 32-bit register; `index` counts registers, not bytes."""

    write: 1
    index: 8
    data: 32


class RegisterPort(wiring.Signature):
    """Access to registers, seen from the host's side. Every access, also a write, has one response.

    Members
    -------
    request : Out(stream.Signature(RegisterAccess))
    response : In(stream.Signature(32))
    """

    def __init__(self):
        super().__init__({
            "request": Out(stream.Signature(RegisterAccess)),
            "response": In(stream.Signature(32)),
        })
