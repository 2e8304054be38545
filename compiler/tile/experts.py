"""Routing and experts."""

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np

from moeware.compiler.tile.assembly import Run
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.products import activation_layers, require, spread
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import Memory, Target

__all__ = ["lower_experts", "lower_route"]


def lower_route(lowering: Lowering, op: q.Route) -> None:
    c, source = lowering.config, lowering.tensors[op.source]
    experts, rows = len(op.weight), lowering.frames * source.rows
    require(experts, c.max_experts, f"The experts of {op.name}", "max_experts")
    require(op.chosen, c.max_chosen, f"The chosen experts of {op.name}", "max_chosen")
    require(rows, c.max_rows, f"The tokens of {op.name}, of all frames in flight,", "max_rows")
    require(op.chosen_groups, c.max_chosen, f"The chosen groups of {op.name}", "max_chosen")
    require(int(op.sigmoid or op.group > 0 or op.sparse), c.router_forms,
            f"The router {op.name}, with sigmoid scores, groups or a sparse mixer,", "router_forms")
    multiplier, shift = np.zeros(experts, np.uint16), np.ones(experts, np.uint8)
    if op.correction is not None:
        multiplier, shift = layout.as_scale(op.correction)
    affine = q.Affine(bias=op.bias, multiplier=multiplier, shift=shift)
    lowering.assembly.product(op.name, spread(op.weight, source), affine,
                              [Run(source.span(a, b), None, {"destination": a, "append": int(a > 0)})
                               for a, b in chunks(c, 0, rows)],
                              unit=experts, first=False, last=False, target=Target.ROUTER,
                              queue_write=True, **op.form)
    lowering.macs += source.rows * op.weight.size


def lower_experts(lowering: Lowering, op: q.Experts) -> None:
    """Experts group by group, each expert only if it has tokens. Those of a group take turns, tile by
    tile: while the products of one with many tokens last, weights of one with few come in."""
    config, source, size = lowering.config, lowering.tensors[op.source], lowering.plan.experts
    experts, hidden, _ = op.up.shape
    stream = lowering.inherit(op.output, op.residual)
    table, table_span = lowering.assembly.table(op.table, op.name)
    rows = lowering.frames * source.rows

    def first(e: int, middle: Tensor) -> Iterator[None]:
        """Hidden values of the expert's tokens."""
        gate = None if op.gate is None else (op.gate[e], op.gate_affine.part(e))
        weight, affine, product = activation_layers((op.up[e], op.up_affine.part(e)), gate, source,
                                                    middle.columns(), middle.stride)
        return _expert_product(lowering, op, e, "up", weight, affine,
                               Run(source.span(), middle.span()), reads=table_span, gather=1,
                               target=Target.ACTIVATION, **product, **table)

    def second(e: int, middle: Tensor) -> Iterator[None]:
        return _expert_product(lowering, op, e, "down", spread(op.down[e], middle),
                               op.down_affine.part(e), Run(middle.span(), stream.span()), scatter=1,
                               gated=1, accumulate=1, target=Target.RESIDUAL)

    for start in range(0, experts, size):
        group = {e: Tensor(config, f"{op.output}/hidden{e}", Memory.ACTIVATION, 1, rows, hidden,
                           bank=1 + e) for e in range(start, min(start + size, experts))}
        for product in (first, second):
            for _ in zip_longest(*[product(e, middle) for e, middle in group.items()]):
                pass
    chosen = next(o.chosen for o in lowering.step.operations if o.output == op.route)
    lowering.macs += source.rows * chosen * op.row_macs


def _expert_product(lowering: Lowering, op: q.Experts, expert: int, which: str, weight: np.ndarray,
                    affine: q.Affine, run: Run, **fields) -> Iterator[None]:
    layer, bits = f"{op.name}/expert{expert}", 8 if op.bits is None else int(op.bits[expert])
    return lowering.assembly.product_tiles(
        layer, weight, affine, [run], bits=bits, name=f"{layer}/{which}", first=False, last=False,
        queued=1, expert=expert, queue_read=True, conditional=1, **fields)
