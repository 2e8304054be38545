"""What the stages after quantisation work on: instructions over buffers that get addresses later."""

from dataclasses import dataclass, field

import numpy as np

from moeware.hw.arch.isa import Engine, Memory, Opcode
from moeware.hw.arch.program import Port, Probe
from moeware.hw.arch.quantised import Operation

__all__ = ["Block", "Buffer", "Instr", "Lowered", "Part", "Span"]


@dataclass(eq=False)
class Buffer:
    """Words of an on-chip memory. bank : the activation bank it should lie in, if there is room; what
    is not in bank 0 should lie where words have rested, in the residual memory, too."""

    name: str
    memory: Memory
    words: int
    bank: int = 0
    address: int | None = None

    def __getitem__(self, offset: int) -> "Span":
        """The span from a word to the end."""
        return Span(self, offset, self.words - offset)


@dataclass(frozen=True, eq=False)
class Span:
    """`rows` runs of `words` words of a buffer, `stride` words apart; stands for the address of its
    first word in an instruction's fields."""

    buffer: Buffer
    start: int
    words: int
    rows: int = 1
    stride: int = 0

    @property
    def address(self) -> int:
        if self.buffer.address is None:
            raise AssertionError(f"buffer {self.buffer.name} has no address yet")
        return self.buffer.address + self.start

    @property
    def end(self) -> int:
        """Word of the buffer after the last one."""
        return self.start + (self.rows - 1) * self.stride + self.words

    def part(self, first: int, last: int) -> "Span":
        """Runs [first, last)."""
        return Span(self.buffer, self.start + first * self.stride, self.words, last - first,
                    self.stride)

    def columns(self, first: int, words: int) -> "Span":
        """Words [first, first + words) of every run."""
        return Span(self.buffer, self.start + first, words, self.rows, self.stride)

    def places(self, origin: int = 0) -> slice | np.ndarray:
        """Index of its words, counted from `origin` words before the buffer."""
        start = origin + self.start
        if self.rows == 1 or self.words == self.stride:
            return slice(start, origin + self.end)
        return (start + np.arange(self.rows)[:, None] * self.stride + np.arange(self.words)).ravel()


@dataclass(eq=False)
class Block:
    """Bytes in DRAM: a constant (`data`), or room that a run fills."""

    name: str
    bytes: int
    data: bytes | None = None
    address: int | None = None

    def __getitem__(self, offset: int) -> "Part":
        return Part(self, offset)


@dataclass(frozen=True, eq=False)
class Part:
    """A block from byte `offset` on; stands for its address in an instruction's fields."""

    block: Block
    offset: int

    @property
    def address(self) -> int:
        if self.block.address is None:
            raise AssertionError(f"block {self.block.name} has no address yet")
        return self.block.address + self.offset


@dataclass(eq=False)
class Instr:
    """An instruction before encoding. fields : integers, or a Span or Part for an address.

    reads, writes : what it touches on chip; queue_read, queue_write : the same for the router's
    queues. layer : for reports.
    """

    opcode: Opcode
    fields: dict
    layer: str
    reads: list[Span] = field(default_factory=list)
    writes: list[Span] = field(default_factory=list)
    queue_read: bool = False
    queue_write: bool = False

    @property
    def engine(self) -> Engine:
        return Engine(self.opcode)


@dataclass
class Lowered:
    """One device step as instructions.

    ports, probes : with the block that holds each, in place of an address. frames : that a run
    works on; macs : of one.
    """

    instructions: list[Instr]
    inputs: list[tuple[Port, Block]]
    outputs: list[tuple[Port, Block]]
    probes: list[tuple[Probe, Block]]
    operations: list[Operation]
    macs: int
    frames: int = 1

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer once, in the order of first use."""
        seen = {}
        for instr in self.instructions:
            for span in instr.writes + instr.reads:
                seen.setdefault(id(span.buffer), span.buffer)
        return list(seen.values())

    @property
    def blocks(self) -> list[Block]:
        """Every block once, in the order of first use."""
        seen = {}
        for instr in self.instructions:
            part = instr.fields.get("address")
            if isinstance(part, Part):
                seen.setdefault(id(part.block), part.block)
        return list(seen.values())
