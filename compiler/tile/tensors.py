"""Where the tensors of a device step lie on chip."""

import math
from collections.abc import Iterable

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Buffer, Span
from moeware.hw.arch import layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import ROW_STRIDE, Memory
from moeware.hw.arch.program import Region

__all__ = ["CHUNK_ROWS", "Tensor", "chunks"]

# Rows that one instruction hands on to the next: short enough that an engine soon has something to
# do, long enough that starting an instruction costs little beside its work.
CHUNK_ROWS = 32


def chunks(config: Config, first: int, last: int) -> list[tuple[int, int]]:
    """Rows [first, last) in pieces that fill token groups and groups of queries."""
    step = math.lcm(config.tokens, config.queries)
    if step > 2 * CHUNK_ROWS:
        step = max(config.tokens, config.queries)
    size = step * max(1, round(CHUNK_ROWS / step))
    starts = list(range(first, last, size)) or [first]
    if len(starts) > 1 and last - starts[-1] <= size // 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], last]))


class Tensor:
    """An activation or residual tensor, of all `frames` that a run works on.

    Each of its `rows` has `channels` values in `groups` (the heads of attention, else 1) that lie as
    `Region` says, with `room`. Either all rows of all frames lie one after another, or, where it is `split`, each
    group of each frame has a buffer to itself, which lives only as long as its head is at work.
    Rows of a tensor that is not split are counted through all frames. lead : rows of its buffer
    before the first one.
    """

    def __init__(self, config: Config, name: str, memory: Memory, frames: int, rows: int,
                 channels: int, *, groups: int = 1, split: bool = False, room: int = 0,
                 bank: int = 0, lead: int = 0):
        self.config, self.name, self.memory = config, name, memory
        self.frames, self.rows, self.channels = frames, rows, channels
        self.groups, self.split, self.room, self.lead = groups, split, room, lead
        self.per_word = per_word = config.depth if memory is Memory.ACTIVATION else config.lanes
        filled = per_word if groups == 1 or split else config.depth
        group = max(channels // groups, room)
        self.width = -(-group // filled) * filled // per_word  # words of a group
        self.stride = self.width if split else groups * self.width
        if self.stride > ROW_STRIDE:
            field = "depth" if memory is Memory.ACTIVATION else "lanes"
            raise CompileError(f"A row of {name} takes {self.stride} words, more than the {ROW_STRIDE} "
                               f"that an instruction steps over; use a configuration with more "
                               f"Config.{field} than {per_word}")
        if memory is Memory.ACTIVATION:
            bank %= config.activation_banks
        if split:
            self.buffers = [Buffer(f"{name}/{frame}/{group}", memory, rows * self.width, bank)
                            for frame in range(frames) for group in range(groups)]
        else:
            words = (lead + frames * rows) * self.stride
            self.buffers = [Buffer(name, memory, words, bank)]

    def span(self, first: int = 0, last: int | None = None) -> Span:
        """Rows [first, last) of a tensor that is not split."""
        last = self.frames * self.rows if last is None else last
        return Span(self.buffers[0], (self.lead + first) * self.stride, self.stride, last - first,
                    self.stride)

    def head(self, frame: int, group: int, first: int = 0, last: int | None = None) -> Span:
        """Rows [first, last) of one group of one frame."""
        last = self.rows if last is None else last
        if self.split:
            buffer = self.buffers[frame * self.groups + group]
            return Span(buffer, first * self.width, self.width, last - first, self.stride)
        return self.span(frame * self.rows + first, frame * self.rows + last).columns(
            group * self.width, self.width)

    def columns(self) -> np.ndarray:
        """Place of each channel in a row, in channels of groups filled up to whole words."""
        size = self.channels // self.groups
        padded = self.width * self.per_word
        return (np.arange(self.groups)[:, None] * padded + np.arange(size)).ravel()

    def region(self) -> Region:
        """Of one frame in DRAM, at address 0."""
        return Region(memory=self.memory, rows=self.rows, channels=self.channels, address=0,
                      groups=self.groups, split=self.split, room=self.room)

    def pieces(self, frame: int, *, cut: bool = True) -> Iterable[tuple[Span, int]]:
        """A frame's words in the order of its region, with their bytes from the region's start.

        cut : in chunks of rows, where these start at whole bus words.
        """
        region, config = self.region(), self.config
        if self.split:
            yield from ((self.head(frame, group), group * region.part_bytes(config))
                        for group in range(self.groups))
            return
        base = frame * self.rows
        rows = chunks(config, 0, self.rows)
        whole_words = max(1, config.bus_bytes // layout.word_bytes(config, self.memory))
        if not cut or any(first * self.stride % whole_words for first, _ in rows):
            rows = [(0, self.rows)]
        for first, last in rows:
            beats = layout.beats(config, self.memory, first * self.stride)
            yield self.span(base + first, base + last), beats * config.bus_bytes
