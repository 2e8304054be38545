"""Addresses: buffers in the on-chip memories, blocks in DRAM."""

from collections.abc import Mapping, Sequence

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Buffer, Lowered
from moeware.hw.arch import isa, layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory

__all__ = ["allocate", "place_blocks", "rings"]

RESTS = (96, 48, 24, 12, 0)  # instructions between two owners of a word


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
    """Place activation and residual buffers: lowest free address over the buffer's lifetime, an
    activation buffer in its bank where there is room. Where banks leave gaps that are too small,
    all are placed without regard to them. Words are given away the later after their last use the
    more room there is, as the next owner waits for that use.

    Raises
    ------
    CompileError
        A buffer does not fit: which, and by how much.
    """
    lifetimes = _lifetimes(lowered)
    for memory, words in ((Memory.ACTIVATION, config.activation_banks * config.activation_words),
                          (Memory.RESIDUAL, config.residual_words)):
        buffers = [buffer for buffer in lowered.buffers if buffer.memory is memory]
        banks = (config.activation_words, 0) if memory is Memory.ACTIVATION else (0,)
        if not any(_place(buffers, lifetimes, words, bank, rests)
                   for bank in banks for rests in (RESTS, RESTS[-1:])):
            _refuse(buffers, lifetimes, words)
    return lowered


def _place(buffers: list[Buffer], lifetimes, words: int, bank: int, rests) -> bool:
    """First fit, from the start of each buffer's bank, among words that have rested; whether all have
    an address. What lives in bank 0 stays there, so that the rest is not cut into pieces."""
    placed: list[Buffer] = []
    for buffer in buffers:
        buffer.address = None
        for rest in rests if buffer.bank else rests[-1:]:
            live = _beside(buffer, placed, lifetimes, rest)
            address = _lowest(buffer.words, live, buffer.bank * bank, words)
            buffer.address = _lowest(buffer.words, live, 0, words) if address is None else address
            if buffer.address is not None:
                break
        else:
            return False
        placed.append(buffer)
    return True


def _beside(buffer: Buffer, placed: list[Buffer], lifetimes, rest: int = 0) -> list[Buffer]:
    """Buffers that are in use while this one is, or were within `rest` instructions before."""
    first, last = lifetimes[id(buffer)]
    return [other for other in placed
            if lifetimes[id(other)][0] <= last and first <= lifetimes[id(other)][1] + rest]


def _lifetimes(lowered: Lowered) -> dict[int, tuple[int, int]]:
    """First and last instruction that touches each buffer."""
    lifetimes: dict[int, tuple[int, int]] = {}
    for number, instr in enumerate(lowered.instructions):
        for span in instr.reads + instr.writes:
            first, _ = lifetimes.get(id(span.buffer), (number, number))
            lifetimes[id(span.buffer)] = first, number
    return lifetimes


def _lowest(words: int, live: list[Buffer], start: int, end: int) -> int | None:
    address = start
    for other in sorted(live, key=lambda buffer: buffer.address):
        if other.address + other.words <= address:
            continue
        if other.address >= address + words:
            break
        address = other.address + other.words
    return address if address + words <= end else None


def _refuse(buffers: list[Buffer], lifetimes, words: int) -> None:
    """Name the buffer that `_place` found no room for."""
    number, buffer = next((n, b) for n, b in enumerate(buffers) if b.address is None)
    live = _beside(buffer, buffers[:number], lifetimes)
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
