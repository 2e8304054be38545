"""Linear, AddLinear and Constant: what works row by row; and heads of what attention reads."""

import dataclasses

import numpy as np

from moeware.compiler.lowered import Block
from moeware.compiler.tile.assembly import Run
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.norm import head_of, norm_head
from moeware.compiler.tile.products import activation_layers, filled, spread
from moeware.compiler.tile.tensors import Tensor
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import Memory, Target

__all__ = ["add_rows", "linear_rows", "lower_add_linear", "lower_constant", "lower_head",
           "lower_linear"]


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
    target = lowering.tensor(op.output, Memory.ACTIVATION, source.rows, len(op.weight),
                             lowering.attended.get(op.output, 1))
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
    op, products = lowering.deferred[name], lowering.deferred_products(name)
    whole = lowering.tensors[products[0].source].rows
    block, direct = rows or (0, whole), products[0] is op
    for product in products:
        _product_head(lowering, product, frame, group, block, bank, first=first,
                      last=last if direct else True)
        if lowering.trace and product is not products[-1]:  # the next one adds to it
            lowering.probe(product, frame, group)
    if not direct:
        norm_head(lowering, op, frame, group, block, bank)
    if lowering.trace and block[1] == whole:
        for each in dict.fromkeys((products[-1].output, op.output)):
            lowering.probe(lowering.deferred[each], frame, group)


def _product_head(lowering: Lowering, op: q.Linear | q.AddLinear, frame: int, group: int,
                  rows: tuple[int, int], bank: int, *, first: bool, last: bool) -> None:
    """The product alone, to the activation memory or, for what is to be normalised or turned, to the
    residual memory."""
    source, (start, stop) = lowering.tensors[op.source], rows
    plain = isinstance(op, q.Linear)
    adds = not plain and op.residual is not None
    if adds:
        lowering.inherit(op.output, op.residual)
    elif op.output not in lowering.tensors:
        lowering.tensor(op.output, Memory.ACTIVATION if plain else Memory.RESIDUAL, source.rows,
                        len(op.weight), bank)
    target = lowering.tensors[op.output]
    part = head_of(op, group, target.groups)
    at, columns = frame * source.rows, np.arange(len(part.weight))
    run = Run(source.span(at + start, at + stop), target.head(frame, group, start, stop))
    if plain:
        _activate(lowering, op, part, source, run, columns, target.width, first=first, last=last)
    else:
        weight, affine = filled(spread(part.weight, source), part.affine, columns,
                                target.width * target.per_word)
        if adds:
            weight, affine, run = _changed(weight, affine, run, target.per_word)
        lowering.assembly.product(op.name, weight, affine, [run], name=part.name, first=first,
                                  last=last, bits=op.bits, target=Target.RESIDUAL,
                                  accumulate=int(adds))
    if frame == 0:
        lowering.macs += (stop - start) * part.row_macs


def _changed(weight: np.ndarray, affine: q.Affine, run: Run,
             per_word: int) -> tuple[np.ndarray, q.Affine, Run]:
    """The words that adding the product changes, from the first to the last."""
    used = np.flatnonzero(weight.any(1) | (affine.bias != 0)) // per_word
    first, last = (used[0], used[-1] + 1) if len(used) else (0, 1)
    part = slice(first * per_word, last * per_word)
    target = run.target.columns(int(first), int(last - first))
    return weight[part], affine.part(part), dataclasses.replace(run, target=target)


def lower_add_linear(lowering: Lowering, op: q.AddLinear) -> None:
    if op.output in lowering.split:
        lowering.deferred[op.output] = op
        return
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
        add_rows(lowering, op, source, target, part)
    lowering.macs += source.rows * op.row_macs


def add_rows(lowering: Lowering, op: q.AddLinear, source: Tensor, target: Tensor,
             runs: list[Run]) -> None:
    """Some rows of `source`, or of what lies like it, to some of `target`."""
    weight, affine = spread(op.weight, source), op.affine
    if target.groups > 1 or target.room:
        weight, affine = filled(weight, affine, target.columns(), target.stride * target.per_word)
    lowering.assembly.product(op.name, weight, affine, runs, bits=op.bits, target=Target.RESIDUAL,
                              accumulate=int(op.residual is not None))
