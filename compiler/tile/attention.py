"""Attention, head by head."""

from collections.abc import Iterator

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Span
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.products import require
from moeware.compiler.tile.rows import lower_head
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import HEAD_WORDS, Memory, Opcode

__all__ = ["attend", "attend_blocks", "lower_attention"]


def lower_attention(lowering: Lowering, op: q.Attention) -> None:
    if op.query is None:
        _mean(lowering, op)
        return
    rows = lowering.rows[op.output]
    blocks = [(frame * rows, (frame + 1) * rows) for frame in range(lowering.frames)]
    for _ in attend_blocks(lowering, op, blocks, 1):
        pass


def attend_blocks(lowering: Lowering, op: q.Attention, blocks: list[tuple[int, int]],
                  together: int) -> Iterator[None]:
    """Heads are made one by one and attended one by one, the last `together` of a frame block of rows
    after block of rows, so that their last queries are made beside attention on the first; goes on
    behind each block that has passed all heads.

    blocks : rows [first, last) of all frames in their order, each of one frame.
    """
    rows = lowering.rows[op.output]
    for frame in range(lowering.frames):
        own = [(a - frame * rows, b - frame * rows) for a, b in blocks if a // rows == frame]
        made: set[tuple[str, int]] = set()
        late = range(max(0, op.heads - together), op.heads)
        rest = [(own[0][1], rows)] if len(own) > 1 else []
        for head in range(op.heads):
            _make_head(lowering, op, frame, head, made)
            for part in own[:1] if head in late else [own[0], *rest]:
                _make_queries(lowering, op, frame, head, part)
                _attend_rows(lowering, op, frame, head, part)
        for part in rest:
            for head in late:  # beside attention on the first block
                _make_queries(lowering, op, frame, head, part)
        yield
        for block in own[1:]:
            for head in late:
                _attend_rows(lowering, op, frame, head, block)
            yield
    query, key, out = (lowering.tensors[name] for name in (op.query, op.key, op.output))
    lowering.macs += rows * key.rows * (query.channels + out.channels)


def _make_head(lowering: Lowering, op: q.Attention, frame: int, head: int,
               made: set[tuple[str, int]]) -> None:
    """Keys and values of a head that were not `made`, where they are made head by head."""
    at = head * op.key_heads // op.heads
    for name, bank in ((op.key, 1), (op.value, 2)):
        if name in lowering.split and (name, at) not in made:
            made.add((name, at))
            lower_head(lowering, name, frame, at, bank, first=head == 0)


def _make_queries(lowering: Lowering, op: q.Attention, frame: int, head: int,
                  block: tuple[int, int]) -> None:
    """The same for queries of some rows."""
    if op.query in lowering.split:
        lower_head(lowering, op.query, frame, head, 1, rows=block, first=head == 0,
                   last=head == op.heads - 1)


def _attend_rows(lowering: Lowering, op: q.Attention, frame: int, head: int,
                 block: tuple[int, int]) -> None:
    """Rows [first, last) of a frame; of its last head in chunks, which the projection follows."""
    at = head * op.key_heads // op.heads
    query, key, value = (lowering.tensors[name] for name in (op.query, op.key, op.value))
    if op.output not in lowering.tensors:
        _check(lowering, op, query, key)
        lowering.tensor(op.output, Memory.ACTIVATION, query.rows, lowering.channels[op.output], 3)
    out = lowering.tensors[op.output]
    for a, b in chunks(lowering.config, *block) if head == op.heads - 1 else [block]:
        # The last row of a causal chunk sees all keys that its chunk needs.
        keys = key.rows - (query.rows - b if op.causal else 0)
        attend(lowering, op, query.head(frame, head, a, b), key.head(frame, at),
               value.head(frame, at), out.head(frame, head, a, b), keys)


def _check(lowering: Lowering, op: q.Attention, query: Tensor, key: Tensor) -> None:
    require(key.rows, lowering.config.max_rows, f"The keys of {op.name}", "max_rows")
    if query.width > HEAD_WORDS or query.width != key.width or not (
        query.stride == key.stride == lowering.tensors[op.value].stride):
        raise CompileError(f"A head of {op.name} must be at most {HEAD_WORDS} words of "
                           f"{lowering.config.depth} channels, and queries, keys and values must lie "
                           f"alike, not {query.width} words; use a configuration with a larger "
                           "Config.depth, and as many heads of keys as of queries")


def _mean(lowering: Lowering, op: q.Attention) -> None:
    """The mean of the value rows: one query of zeros sees all keys alike."""
    key, value = lowering.tensors[op.key], lowering.tensors[op.value]
    require(key.rows, lowering.config.max_rows, f"The keys of {op.name}", "max_rows")
    out = lowering.tensor(op.output, Memory.ACTIVATION, 1, value.channels, 3)
    zeros = np.zeros((value.stride, lowering.config.depth), np.uint8)
    query = lowering.assembly.constant(f"{op.output}/zeros", Memory.ACTIVATION, zeros, op.name)
    for frame in range(lowering.frames):
        for at in range(0, value.stride, HEAD_WORDS):
            words = min(HEAD_WORDS, value.stride - at)
            rows = slice(frame * key.rows, (frame + 1) * key.rows)
            attend(lowering, op, query.columns(at, words),
                    key.span(rows.start, rows.stop).columns(at, words),
                    value.span(rows.start, rows.stop).columns(at, words),
                    out.span(frame, frame + 1).columns(at, words), key.rows)
    lowering.macs += 2 * key.rows * value.channels


def attend(lowering: Lowering, op: q.Attention, query: Span, key: Span, value: Span, out: Span,
           keys: int) -> None:
    """One head of some query rows, which see the first `keys` keys or, causal, up to that many."""
    lowering.assembly.emit(Opcode.ATTENTION, op.name, [query, key, value], [out], rows=query.rows,
                           keys=keys, causal=int(op.causal), words=key.words, query=query, key=key,
                           value=value, destination=out, stride=key.stride, destination_stride=out.stride,
                           multiplier=op.multiplier, shift=op.shift, out_multiplier=op.out_multiplier,
                           out_shift=op.out_shift)
