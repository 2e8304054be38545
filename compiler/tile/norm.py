"""Norm: rows of the residual memory to activations, whole or head by head."""

import dataclasses
import hashlib

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Span
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.products import filled_affine, require
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NORM_CHANNELS, Memory, NormMode, Opcode

__all__ = ["head_of", "load_rotation", "lower_norm", "norm_head", "norm_rows"]

Pieces = list[tuple[int, int, int]]


def lower_norm(lowering: Lowering, op: q.Norm) -> None:
    if op.output in lowering.split:
        lowering.deferred[op.output] = op
        return
    c, source = lowering.config, lowering.tensors[op.source]
    target = lowering.tensor(op.output, Memory.ACTIVATION, op.rows, source.channels,
                             lowering.attended.get(op.output, 0))
    if op.rows == source.rows and op.rotation is None:
        pieces = [(a, b, a) for a, b in chunks(c, 0, lowering.frames * op.rows)]
    else:
        pieces = [(a, b, frame * source.rows + op.first_row + a - frame * op.rows)
                  for frame in range(lowering.frames)
                  for a, b in chunks(c, frame * op.rows, (frame + 1) * op.rows)]
    norm_rows(lowering, op, source, target, pieces)


def norm_rows(lowering: Lowering, op: q.Norm, source: Tensor, target: Tensor, pieces: Pieces) -> None:
    """Rows [first, last) of `target` from those of `source` that begin at `row`, for each piece
    (first, last, row), which is of one frame where pairs are turned."""
    groups = op.groups if op.mode is not NormMode.SCALE else 1
    if groups not in (1, source.groups) or (target.groups, target.width * target.per_word) != (
            source.groups, -(-source.width * source.per_word // target.per_word) * target.per_word):
        raise CompileError(f"{op.name} must normalise all channels or each head of attention, and lie "
                           f"like what it normalises, not have {groups} groups of {source.groups} "
                           f"heads before and {target.groups} behind it")
    for group in range(groups):
        part = op if groups == 1 else head_of(op, group, groups)
        spans = []
        for first, last, row in pieces:
            read, write = source.span(row, row + last - first), target.span(first, last)
            if groups > 1:
                read, write = (span.columns(group * tensor.width, tensor.width)
                               for span, tensor in ((read, source), (write, target)))
            spans.append((read, write, first % op.rows))
        if groups > 1 or source.groups == 1:
            _normalise_head(lowering, op.name, part, source, spans)
        else:
            _normalise(lowering, op.name, part, source, spans, source.columns(),
                       source.stride * source.per_word)


def norm_head(lowering: Lowering, op: q.Norm, frame: int, group: int, rows: tuple[int, int],
              bank: int) -> None:
    """Rows [first, last) of one head of one frame."""
    source = lowering.tensors[op.source]
    if op.output not in lowering.tensors:
        lowering.tensor(op.output, Memory.ACTIVATION, source.rows, source.channels, bank)
    target = lowering.tensors[op.output]
    spans = [(source.head(frame, group, a, b), target.head(frame, group, a, b), a)
             for a, b in chunks(lowering.config, *rows)]
    _normalise_head(lowering, op.name, head_of(op, group, source.groups), source, spans)


def head_of(op, head: int, heads: int):
    """The part of a Linear, AddLinear or Norm that makes one of `heads` heads of its output."""
    affine = q.Affine(**{field.name: np.split(getattr(op.affine, field.name), heads)[head]
                         for field in dataclasses.fields(q.Affine)})
    changes = {"groups": 1} if isinstance(op, q.Norm) else {"weight": np.split(op.weight, heads)[head]}
    return dataclasses.replace(op, name=f"{op.name}/head{head}", affine=affine, **changes)


def _normalise_head(lowering: Lowering, layer: str, op: q.Norm, source: Tensor,
                    spans: list[tuple[Span, Span, int]]) -> None:
    """Rows of one group, whose channels lie one after another."""
    width = source.width * source.per_word if source.room else 0
    _normalise(lowering, layer, op, source, spans, np.arange(len(op.affine.bias)), width)


def _normalise(lowering: Lowering, layer: str, op: q.Norm, source: Tensor,
               spans: list[tuple[Span, Span, int]], columns: np.ndarray, width: int = 0) -> None:
    """Rows of one group: (read, write, row of its frame) of each chunk. Its channels lie at `columns` of
    `width`, between zeros, or one after another."""
    c, channels, width = lowering.config, len(columns), width or len(columns)
    if width > NORM_CHANNELS:
        raise CompileError(f"A row of {op.name} must have at most {NORM_CHANNELS} channels, not {width}; "
                           "make the model narrower")
    if op.mode is not NormMode.SCALE:
        require(-(-width // c.depth), c.row_words, f"A row of {op.name}", "row_words")
    counted = channels if width != channels and op.mode is not NormMode.SCALE else 0
    if not c.rotary and (counted or op.rotation is not None):
        what = "turns pairs" if op.rotation is not None else (
            f"normalises all heads of {channels} channels, which Config.depth = {c.depth} does not divide")
        raise CompileError(f"{op.name} {what}: it must have Config.rotary = 1, not 0; use a "
                           "configuration with it")
    affine = filled_affine(op.affine, columns, width)
    words = layout.pack_params(c, affine.bias, affine.multiplier, affine.shift)
    require(len(words), c.param_words, f"The parameters of {op.name}, in words,", "param_words")
    params = lowering.assembly.constant(f"{op.name}/param", Memory.PARAM, words, layer)
    factors = None if op.rotation is None else load_rotation(lowering, op, source)
    for read, write, row in spans:
        reads, turn = [read, params], {}
        if factors is not None:
            reads.append(factors.part(row, row + read.rows))
            turn = {"factors": reads[-1], "factor_stride": factors.stride,
                    "factor_words": factors.words}
        lowering.assembly.emit(Opcode.NORM, layer, reads, [write], rows=read.rows, mode=op.mode,
                               channels=width, counted=counted, source=read, source_stride=read.stride,
                               destination=write, destination_stride=write.stride, param=params,
                               epsilon=op.epsilon, **turn)


def load_rotation(lowering: Lowering, op: q.Norm, source: Tensor) -> Span:
    """Factors for a head of all rows of a frame, which stay on chip once they are there: layers share
    them. source : what is turned, or a tensor that lies like it."""
    rows, channels = op.rotation.shape
    if channels * source.groups != source.channels:
        raise CompileError(f"{op.name} must turn each of {source.groups} heads of attention, not "
                           f"{source.channels // channels}")
    words = np.zeros((rows, source.width * source.per_word), "<i2")
    words[:, :channels] = op.rotation
    key = words.tobytes()
    if key not in lowering.rotations:
        name = f"rotation/{hashlib.sha256(key).hexdigest()[:16]}"
        flat = lowering.assembly.constant(
            name, Memory.RESIDUAL, words.view(np.uint8).reshape(-1, 2 * source.per_word), op.name)
        lowering.rotations[key] = Span(flat.buffer, 0, source.width, rows, source.width)
    return lowering.rotations[key]
