"""Addresses: buffers in the on-chip memories, blocks in DRAM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Buffer, Lowered
from moeware.compiler.pace import least_times
from moeware.hw.arch import isa, layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory

__all__ = ["allocate", "place_blocks", "rings"]

# Where a buffer may go, in the order of preference: cycles that its words have rested since the other
# engines are done with them, as far as can be told without the bus (None: no matter), and whether they
# must lie in its bank.
ROOMS = ((8192, True), (2048, True), (0, True), (8192, False), (0, False), (-2048, True),
         (-8192, False), (-32768, False), (None, True), (None, False))


def rings(lowered: Lowered, config: Config) -> None:
    """Place weights and parameters one after another around their memories, in the order of use."""
    sizes = {Memory.WEIGHT: config.weight_words, Memory.PARAM: config.param_words}
    place = dict.fromkeys(sizes, 0)
    for buffer in lowered.buffers:
        if buffer.memory in sizes:
            if place[buffer.memory] + buffer.words > sizes[buffer.memory]:
                place[buffer.memory] = 0
            buffer.address = place[buffer.memory]
            place[buffer.memory] += buffer.words


def allocate(lowered: Lowered, config: Config) -> Lowered:
    """Place activation and residual buffers, each over its lifetime, at the lowest free address.

    An activation buffer lies in its bank where there is room, so that engines do not meet there; where
    banks leave gaps that are too small, all are placed without regard to them. Words that another
    engine still reads when their next owner could begin are given away last, as that one would wait.

    Raises
    ------
    CompileError
        A buffer does not fit: which, and by how much.
    """
    uses = _uses(lowered, config)
    for memory, words in ((Memory.ACTIVATION, config.activation_banks * config.activation_words),
                          (Memory.RESIDUAL, config.residual_words)):
        buffers = [buffer for buffer in lowered.buffers if buffer.memory is memory]
        banks = (config.activation_words, 0) if memory is Memory.ACTIVATION else (0,)
        if not any(_place(buffers, uses, words, bank, rooms)
                   for bank in banks for rooms in (ROOMS, ROOMS[-2:])):
            _refuse(buffers, uses, words)
    return lowered


@dataclass
class _Use:
    """First and last instruction that touches a buffer; the engine of the first, and the cycle in
    which that could begin; the cycle in which each engine that reads is done."""

    first: int
    last: int
    writer: Engine
    start: int
    read: dict[Engine, int] = field(default_factory=dict)


def _uses(lowered: Lowered, config: Config) -> dict[int, _Use]:
    uses: dict[int, _Use] = {}
    for number, (instr, (start, done)) in enumerate(zip(lowered.instructions,
                                                        least_times(lowered, config))):
        for span in instr.reads + instr.writes:
            use = uses.setdefault(id(span.buffer), _Use(number, number, instr.engine, start))
            use.last = number
        for span in instr.reads:
            uses[id(span.buffer)].read[instr.engine] = done
    return uses


def _place(buffers: list[Buffer], uses: dict[int, _Use], words: int, bank: int, rooms) -> bool:
    """Each buffer in the first of `rooms` that has a place; whether all have one. What lives in bank 0
    does not look for words that have rested, so that the memory is not cut into pieces."""
    placed: list[Buffer] = []
    for buffer in buffers:
        buffer.address = None
        start = buffer.bank * bank
        if buffer.words > bank:  # the bank does not matter; below all others, or above
            start = words - buffer.words if bank and start + bank == words else 0
        for rest, own in rooms if buffer.bank else ROOMS[-2:]:
            live = _beside(buffer, placed, uses, rest)
            end = start + bank if own and buffer.words <= bank else words
            buffer.address = _lowest(buffer.words, live, start, end)
            if buffer.address is None and not own:
                buffer.address = _lowest(buffer.words, live, 0, words)
            if buffer.address is not None:
                break
        else:
            return False
        placed.append(buffer)
    return True


def _beside(buffer: Buffer, placed: list[Buffer], uses: dict[int, _Use],
            rest: int | None = None) -> list[Buffer]:
    """Buffers that are in use while this one is, or whose words have not rested: since another engine
    than the one that will write here, which need not wait for itself, is done."""
    mine, live = uses[id(buffer)], []
    for other in placed:
        use = uses[id(other)]
        tired = rest is not None and any(done + rest > mine.start for engine, done in use.read.items()
                                         if engine is not mine.writer)
        if use.first <= mine.last and (mine.first <= use.last or tired):
            live.append(other)
    return live


def _lowest(words: int, live: list[Buffer], start: int, end: int) -> int | None:
    address = start
    for other in sorted(live, key=lambda buffer: buffer.address):
        if other.address + other.words <= address:
            continue
        if other.address >= address + words:
            break
        address = other.address + other.words
    return address if address + words <= end else None


def _refuse(buffers: list[Buffer], uses: dict[int, _Use], words: int) -> None:
    """Name the buffer that `_place` found no room for."""
    number, buffer = next((n, b) for n, b in enumerate(buffers) if b.address is None)
    live = _beside(buffer, buffers[:number], uses)
    name = buffer.memory.name.lower()
    short = buffer.words + sum(other.words for other in live) - words
    others = ", ".join(f"{other.name} ({other.words})" for other in live) or "nothing"
    how = f"{short} words too many" if short > 0 else "too fragmented"
    raise CompileError(
        f"Buffer {buffer.name!r} of {buffer.words} words must fit in the {name} memory of {words} "
        f"words beside {others}: {how}; use a configuration with more {name} words")


def place_blocks(steps: list[Lowered], choices: Sequence[Mapping[str, int]]
                 ) -> tuple[list[int], int, int]:
    """Addresses in DRAM for the steps of one program: instructions, then constants, equal ones once,
    then the rest, where steps of different `choices` use the same room.

    Returns the steps' entry addresses, the bytes up to the end of the constants, and all bytes.
    """
    address, entries = 0, []
    for step in steps:
        entries.append(address)
        address += layout.aligned((len(step.instructions) + 1) * isa.BYTES)
    placed: dict[bytes, int] = {}
    for block in [b for step in steps for b in step.blocks if b.data is not None]:
        block.address = placed.setdefault(block.data, address)
        if block.address == address:
            address += layout.aligned(block.bytes)
    constants = address
    ends: dict[tuple, int] = {}
    for step, choice in zip(steps, choices, strict=True):
        key = tuple(choice.items())
        for block in [b for b in step.blocks if b.data is None]:
            block.address = ends.setdefault(key, constants)
            ends[key] += layout.aligned(block.bytes)
    return entries, constants, max(ends.values(), default=constants)
