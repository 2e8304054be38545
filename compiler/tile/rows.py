"""Linear, AddLinear, Constant and Norm: what works row by row."""

import dataclasses

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Block
from moeware.compiler.tile.assembly import Run
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.products import activation_layers, require, spread
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NORM_CHANNELS, Memory, Opcode, Target

__all__ = ["add_rows", "head_rows", "linear_rows", "lower_add_linear", "lower_constant", "lower_head",
           "lower_linear", "lower_norm", "norm_rows"]


def lower_constant(lowering: Lowering, op: q.Constant) -> None:
    tensor = lowering.tensor(op.output, Memory.RESIDUAL, *op.value.shape)
    image = tensor.region().pack(lowering.config, op.value)
    block = Block(op.output, len(image), image)
    for frame in range(lowering.frames):
        for span, offset in tensor.pieces(frame):
            lowering.assembly.load_later(span, block, op.name, offset=offset)


def lower_linear(lowering: Lowering, op: q.Linear) -> None:
    if op.output in lowering.split:
        lowering.deferred[op.output] = op
        return
    source = lowering.tensors[op.source]
    roles = {tensor: bank for o in lowering.step.operations if isinstance(o, q.Attention)
             for bank, tensor in ((2, o.query), (1, o.key), (2, o.value))}
    target = lowering.tensor(op.output, Memory.ACTIVATION, source.rows, len(op.weight),
                             roles.get(op.output, 1))
    linear_rows(lowering, op, source, target, Run(source.span(), target.span()))
    lowering.macs += source.rows * op.row_macs


def linear_rows(lowering: Lowering, op: q.Linear, source: Tensor, target: Tensor, run: Run) -> None:
    """Some rows of `source` to some of `target`."""
    _activate(lowering, op, op, source, run, target.columns(), target.stride)


def _activate(lowering: Lowering, op: q.Linear, part: q.Linear, source: Tensor, run: Run,
              columns: np.ndarray, words: int, **options) -> None:
    """A part of an operation's channels, to `columns` of rows of so many words; options : of
    `Assembly.product`."""
    gate = None if part.gate is None else (part.gate, part.gate_affine)
    weight, affine, product = activation_layers((part.weight, part.affine), gate, source, columns,
                                                words)
    table, span = lowering.assembly.table(op.table, op.name)
    lowering.assembly.product(op.name, weight, affine, [run], name=part.name, reads=span,
                              bits=op.bits, target=Target.ACTIVATION, **product, **table, **options)


def lower_head(lowering: Lowering, name: str, frame: int, group: int, bank: int, *,
               rows: tuple[int, int] | None = None, first: bool = False, last: bool = False) -> None:
    """One head of queries, keys or values of one frame, or rows [first, last) of it; first, last : as
    `Assembly.product` takes them.

    Other frames load its weights again: their heads would take more room than that is worth.
    """
    op = lowering.deferred[name]
    source = lowering.tensors[op.source]
    if name not in lowering.tensors:
        lowering.tensor(name, Memory.ACTIVATION, source.rows, len(op.weight), bank)
    target, (start, stop) = lowering.tensors[name], rows or (0, source.rows)
    part = head_rows(op, group, target.groups)
    at = frame * source.rows
    run = Run(source.span(at + start, at + stop), target.head(frame, group, start, stop))
    _activate(lowering, op, part, source, run, np.arange(len(part.weight)), target.width, first=first,
              last=last)
    if frame == 0:
        lowering.macs += (stop - start) * part.row_macs
    if lowering.trace and stop == source.rows:
        lowering.probe(op, frame, group)


def head_rows(op: q.Linear, head: int, heads: int) -> q.Linear:
    """The product that makes one of `heads` heads of an operation's output."""
    size = len(op.weight) // heads
    rows = slice(head * size, (head + 1) * size)
    gate = {} if op.gate is None else {"gate": op.gate[rows], "gate_affine": op.gate_affine.part(rows)}
    return dataclasses.replace(op, name=f"{op.name}/head{head}", weight=op.weight[rows],
                               affine=op.affine.part(rows), **gate)


def lower_add_linear(lowering: Lowering, op: q.AddLinear) -> None:
    source = lowering.tensors[op.source]
    if op.residual is None:
        target = lowering.tensor(op.output, Memory.RESIDUAL, source.rows, len(op.weight))
    else:
        target = lowering.inherit(op.output, op.residual)
    if source.rows == target.rows and op.source not in lowering.apart:
        runs = [Run(source.span(), target.span())]
    else:
        runs = []
        for frame in range(lowering.frames):
            rows = source.span(frame * source.rows, (frame + 1) * source.rows)
            if op.source in lowering.apart:
                rows = lowering.apart[op.source][frame].span()
            at = frame * target.rows + op.first_row
            runs.append(Run(rows, target.span(at, at + source.rows)))
    for part in [[run] for run in runs] if op.source in lowering.apart else [runs]:
        add_rows(lowering, op, source, part)
    lowering.macs += source.rows * op.row_macs


def add_rows(lowering: Lowering, op: q.AddLinear, source: Tensor, runs: list[Run]) -> None:
    """Some rows of `source`, or of what lies like it, to some of the stream."""
    lowering.assembly.product(op.name, spread(op.weight, source), op.affine, runs, bits=op.bits,
                              target=Target.RESIDUAL, accumulate=int(op.residual is not None))


def lower_norm(lowering: Lowering, op: q.Norm) -> None:
    c, source = lowering.config, lowering.tensors[op.source]
    target = lowering.tensor(op.output, Memory.ACTIVATION, op.rows, source.channels)
    if op.rows == source.rows:
        pieces = [(a, b, a) for a, b in chunks(c, 0, lowering.frames * op.rows)]
    else:
        pieces = [(a, b, frame * source.rows + op.first_row + a - frame * op.rows)
                  for frame in range(lowering.frames)
                  for a, b in chunks(c, frame * op.rows, (frame + 1) * op.rows)]
    norm_rows(lowering, op, source, target, pieces)


def norm_rows(lowering: Lowering, op: q.Norm, source: Tensor, target: Tensor,
              pieces: list[tuple[int, int, int]]) -> None:
    """Rows [first, last) of `target` from those of `source` that begin at `row`, for each piece
    (first, last, row)."""
    c, channels = lowering.config, source.channels
    require(-(-channels // c.depth), c.row_words, f"A row of {op.name}", "row_words")
    if channels > NORM_CHANNELS:
        raise CompileError(f"A row of {op.name} must have at most {NORM_CHANNELS} channels, not "
                           f"{channels}")
    words = layout.pack_params(c, op.affine.bias, op.affine.multiplier, op.affine.shift)
    require(len(words), c.param_words, f"The parameters of {op.name}, in words,", "param_words")
    params = lowering.assembly.constant(f"{op.name}/param", Memory.PARAM, words, op.name)
    for first, last, row in pieces:
        read, write = source.span(row, row + last - first), target.span(first, last)
        lowering.assembly.emit(Opcode.NORM, op.name, [read, params], [write], rows=last - first,
                               mode=op.mode, channels=channels, source=read, source_stride=source.stride,
                               destination=write, destination_stride=target.stride, param=params,
                               epsilon=op.epsilon)
