"""What happens in an accelerator, cycle by cycle, for those who watch a simulation."""

from amaranth.lib import data

from .arch.isa import Engine

__all__ = ["EngineEvents", "Events"]


class EngineEvents(data.Struct):
    """One engine in one cycle.

    started and skipped come in the order of the engine's instructions, one pulse for each: the
    first if the engine takes it, the second if it is passed over, as its expert has no token. done
    comes in the order of those that started. busy, stalled and waiting are what the counters count;
    lacking has a bit for each engine whose token the next instruction lacks, be the engine busy or
    not.
    """

    started: 1
    skipped: 1
    done: 1
    busy: 1
    stalled: 1
    waiting: 1
    lacking: len(Engine)


class Events(data.Struct):
    """One cycle of an accelerator: 59 bits.

    start : the last cycle before a run; read, write : a bus word moves; blocked : a full queue
    holds up dispatch.
    """

    start: 1
    read: 1
    write: 1
    blocked: 1
    engines: data.ArrayLayout(EngineEvents, len(Engine))
