"""Order: weights and parameters load as early as there is room, so that products never wait for
DRAM while they could not."""

from moeware.compiler.allocate import rings
from moeware.compiler.lowered import Instr, Lowered
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, Opcode

__all__ = ["STREAMED", "schedule"]

STREAMED = (Memory.WEIGHT, Memory.PARAM, Memory.TABLE)


def schedule(lowered: Lowered, config: Config) -> Lowered:
    """The same instructions with streamed loads moved forward.

    A load moves before everything but the last user of the words it overwrites (the memories are
    rings, see `allocate.rings`) and earlier loads; and it runs ahead by no more loads than the
    engine's queue holds, as a full queue holds up dispatch. What so comes before the router has decided
    loads whether or not its expert has tokens: the bus would idle else. Results do not depend on it.
    """
    rings(lowered, config)
    loads: list[tuple[Instr, int]] = []  # with the number of other instructions that come before
    others: list[Instr] = []
    # id of a streamed buffer -> places of its first and last user among the others
    needed: dict[int, int] = {}
    users: dict[int, int] = {}
    homes: list[int] = []
    decided: list[int] = []  # the number of others up to the router's decision that a load depends on
    router = 0
    for instr in lowered.instructions:
        if instr.opcode is Opcode.LOAD:
            streamed = instr.writes[0].buffer.memory in STREAMED
            loads.append((instr, 0 if streamed else len(others)))
            decided.append(router if instr.queue_read else 0)
            homes.append(len(others))
            continue
        others.append(instr)
        for span in instr.reads:
            if span.buffer.memory in STREAMED:
                needed.setdefault(id(span.buffer), len(others) - 1)
                users[id(span.buffer)] = len(others)
        if instr.queue_write:
            router = len(others)
    earliest: list[int] = []
    for number, (instr, floor) in enumerate(loads):
        target = instr.writes[0].buffer
        if target.memory not in STREAMED:
            earliest.append(max(floor, earliest[-1] if earliest else 0))
            continue
        for earlier, _ in reversed(loads[:number]):
            buffer = earlier.writes[0].buffer
            if (buffer.memory is target.memory and buffer.address < target.address + target.words
                    and target.address < buffer.address + buffer.words):
                floor = max(floor, users[id(buffer)])
                break  # earlier loads have earlier users
        if number >= config.queue:
            ahead = loads[number - config.queue][0].writes[0].buffer
            floor = max(floor, needed.get(id(ahead), 0))
        floor = max(floor, earliest[-1] if earliest else 0)
        if floor < decided[number]:
            _always(instr)
        earliest.append(floor)
    ordered: list[Instr] = []
    pending = list(zip(loads, earliest, homes))
    for place in range(len(others) + 1):
        while pending and min(pending[0][1], pending[0][2]) <= place:
            ordered.append(pending.pop(0)[0][0])
        if place < len(others):
            ordered.append(others[place])
    lowered.instructions = ordered
    return lowered


def _always(instr: Instr) -> None:
    """A load whether or not its expert has tokens."""
    del instr.fields["conditional"], instr.fields["expert"]
    instr.queue_read = False
