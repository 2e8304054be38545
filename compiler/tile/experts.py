"""Routing and experts."""

import numpy as np

from moeware.compiler.tile.assembly import Run
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.products import filled, require, spread
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import Memory, Target

__all__ = ["lower_experts", "lower_route"]


def lower_route(lowering: Lowering, op: q.Route) -> None:
    c, source = lowering.config, lowering.tensors[op.source]
    experts, rows = len(op.weight), lowering.frames * source.rows
    require(experts, c.max_experts, f"The experts of {op.name}", "max_experts")
    require(op.chosen, c.max_chosen, f"The chosen experts of {op.name}", "max_chosen")
    require(rows, c.max_rows, f"The tokens of {op.name}, of all frames in flight,", "max_rows")
    affine = q.Affine(bias=op.bias, multiplier=np.zeros(experts, np.uint16),
                      shift=np.ones(experts, np.uint8))
    lowering.assembly.product(op.name, spread(op.weight, source), affine,
                              [Run(source.span(a, b), None, {"destination": a, "append": int(a > 0)})
                               for a, b in chunks(c, 0, rows)],
                              unit=experts, first=False, last=False, target=Target.ROUTER,
                              chosen=op.chosen, over_chosen=int(op.over_chosen), multiplier=op.multiplier,
                              shift=op.shift, queue_write=True)
    lowering.macs += source.rows * op.weight.size


def lower_experts(lowering: Lowering, op: q.Experts) -> None:
    """Expert by expert, each only if it has tokens."""
    config, source, plan = lowering.config, lowering.tensors[op.source], lowering.plan
    experts, hidden, _ = op.up.shape
    stream = lowering.inherit(op.output, op.residual)
    table, table_span = lowering.assembly.table(op.table, op.name)
    rows = lowering.frames * source.rows

    def first(e: int) -> Tensor:
        """Hidden values of the expert's tokens."""
        middle = Tensor(config, f"{op.output}/hidden{e}", Memory.ACTIVATION, 1, rows, hidden,
                        bank=1 + e)
        weight, affine = filled(spread(op.up[e], source), _take(op.up_affine, e), middle.columns(),
                                middle.stride * config.depth)
        _expert_product(lowering, op, e, "up", weight, affine, Run(source.span(), middle.span()),
                        reads=table_span, gather=1, target=Target.ACTIVATION, **table)
        return middle

    def second(e: int, middle: Tensor) -> None:
        _expert_product(lowering, op, e, "down", spread(op.down[e], middle), _take(op.down_affine, e),
                        Run(middle.span(), stream.span()), scatter=1, gated=1, accumulate=1,
                        target=Target.RESIDUAL)

    waiting: list[tuple[int, Tensor]] = []
    for e in range(experts):
        waiting.append((e, first(e)))
        if len(waiting) > plan.ahead:
            second(*waiting.pop(0))
    for item in waiting:
        second(*item)
    chosen = next(o.chosen for o in lowering.step.operations if o.output == op.route)
    lowering.macs += source.rows * chosen * (op.up[0].size + op.down[0].size)


def _expert_product(lowering: Lowering, op: q.Experts, expert: int, which: str,
                    weight: np.ndarray, affine: q.Affine, run: Run, **fields) -> None:
    layer, bits = f"{op.name}/expert{expert}", 8 if op.bits is None else int(op.bits[expert])
    lowering.assembly.product(layer, weight, affine, [run], bits=bits, name=f"{layer}/{which}",
                              first=False, last=False, queued=1, expert=expert, queue_read=True,
                              conditional=1, **fields)


def _take(affine: q.Affine, expert: int) -> q.Affine:
    return q.Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                    shift=affine.shift[expert])
