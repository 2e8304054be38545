"""The register map: 32-bit registers, numbered from 0."""

import enum

from .isa import Engine

__all__ = ["ENGINE_COUNTERS", "MAGIC", "Control", "Register", "Status", "counter"]

MAGIC = 0x4D4F4557  # "WEOM": an accelerator answers here


class Register(enum.IntEnum):
    """Registers of the accelerator. Those of a run hold still from its end to the next start."""

    MAGIC = 0  # read: `MAGIC`
    DIGEST = 1  # read: `Config.digest`
    CONTROL = 2  # write: bits of `Control`
    STATUS = 3  # read: bits of `Status`
    PROGRAM = 4  # read, write: byte address of the first instruction, a multiple of `layout.ALIGNMENT`
    CYCLES = 5  # read: cycles from start to done
    INSTRUCTIONS = 6  # read: instructions dispatched
    READ_BEATS = 7  # read: bus words read
    WRITE_BEATS = 8  # read: bus words written
    COUNTERS = 16  # read: `ENGINE_COUNTERS` registers for each engine, see `counter`


class Control(enum.IntFlag):
    START = 1


class Status(enum.IntFlag):
    BUSY = 1
    DONE = 2  # set at the end of a run, cleared by START
    ERROR = 4  # illegal opcode, tokens that cannot come, misaligned PROGRAM; cleared by START


ENGINE_COUNTERS = ("busy", "waiting", "stalled")  # executing; held by a token; executing, no progress


def counter(engine: Engine, name: str) -> int:
    """Number of the register that counts the cycles `engine` spent in state `name`."""
    return Register.COUNTERS + len(ENGINE_COUNTERS) * engine + ENGINE_COUNTERS.index(name)
