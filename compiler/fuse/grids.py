"""Grids of a quantised model's activations, handed on from the values of the file to canonical ones."""

import dataclasses

import onnx_ir as ir

from moeware.compiler.canonical import sources
from moeware.compiler.fuse.trace import traces
from moeware.compiler.kept import Grid, Kept

__all__ = ["attach_grids", "collect_grids", "inherit", "inherit_traced"]

_GRID = "grid"


def attach_grids(model: ir.Model) -> None:
    """Give each value the grid that the model's metadata has for its name."""
    grids = Kept.of(model).grids
    for value in _values(model):
        if value.name in grids:
            value.meta[_GRID] = grids[str(value.name)]


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def inherit(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place of `old`."""
    if _GRID in old.meta:
        new.meta[_GRID] = old.meta[_GRID]


def inherit_traced(value: ir.Value, new: ir.Value, factor: float) -> None:
    """`new`, of which layout operators and a scaling make `value`, takes the grid of the value nearest
    to it; ``value = factor * new``."""
    found: Grid | None = None
    for trace in traces(value, scaled=True):
        grid = trace.root.meta.get(_GRID)
        unit = trace.scale / factor
        if grid is None or unit <= 0:
            continue
        grid = dataclasses.replace(grid, step=grid.step * unit)
        if found is None:
            found = grid
        elif dataclasses.replace(grid, names=found.names) == found:
            found = found.joined(grid)
    if found is not None:
        new.meta[_GRID] = found


def collect_grids(model: ir.Model) -> None:
    """Write the grids of the values that are left into the metadata, by their names, and why the others
    are lost."""
    kept = Kept.of(model)
    named = {name for grid in kept.grids.values() for name in grid.names}
    kept.grids = {str(value.name): value.meta[_GRID] for value in _values(model)
                  if _GRID in value.meta}
    named -= {name for grid in kept.grids.values() for name in grid.names}
    owner = {source: node for node in model.graph for source in sources(node)}
    for name in sorted(named):
        node = owner.get(kept.places.get(name, ""))
        kept.lost.setdefault(name, "inside of " + (node.op_type if node else "an operator")
                             + ", which rounds at other places")
    kept.write(model)
