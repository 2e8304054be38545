"""Parts that are written into room for them, as the concatenation that they are."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.trace import attribute, constant, is_op, size, static_shape


def rewrite_scatter(model: ir.Model) -> None:
    """Replace parts that ScatterND writes one by one over all of a constant by ``Concat``: what
    ``x[..., :n].copy_(a)`` and ``x[..., n:].copy_(b)`` become."""
    for node in list(model.graph):
        chain = _chain(node)
        found = _parts(chain) if chain else None
        if found is None:
            continue
        axis, parts = found
        build = Builder(model, node, chain)
        # On the last axis, as channels of heads are: parts are often written in another order of axes.
        axes = range(len(parts[0][1]))
        last = (*(each for each in axes if each != axis), axis)
        values = [build.transpose(build.reshape(value, shape), last) for value, shape in parts]
        joined = build.transpose(build.concat(values, -1), tuple(np.argsort(last).tolist()))
        build.replace(node.outputs[0], joined)


def _chain(node: ir.Node) -> list[ir.Node]:
    """The nodes that write over a constant, one after the other, the last of which is ``node``."""
    found: list[ir.Node] = []
    while is_op(node, "ScatterND") and attribute(node, "reduction", "none") == "none":
        found.insert(0, node)
        data = node.inputs[0]
        if data is None or data.const_value is not None:
            return found
        node = data.producer()  # type: ignore[assignment]
    return []


def _parts(chain: list[ir.Node]) -> tuple[int, list[tuple[ir.Value, tuple[int, ...]]]] | None:
    """The axis on which what is written follows each other, in order and with the shape that each has
    there; None where something of the constant is left, or where the parts lie otherwise."""
    shape = static_shape(chain[-1].outputs[0])
    if shape is None:
        return None
    owner, place = np.full(shape, -1), np.zeros(shape, np.int64)
    for number, node in enumerate(chain):
        indices, update = constant(node.inputs[1]), static_shape(node.inputs[2])
        if indices is None or update is None or indices.ndim == 0:
            return None
        at = tuple(np.moveaxis(indices, -1, 0))
        try:
            owner[at], place[at] = number, np.arange(size(node.inputs[2])).reshape(update)
        except (IndexError, ValueError):
            return None
    for axis, length in enumerate(shape):
        lines = np.moveaxis(owner, axis, 0).reshape(length, -1)
        if lines.size == 0 or (lines != lines[:, :1]).any():
            continue
        edges = np.flatnonzero(np.diff(lines[:, 0])) + 1
        numbers = [int(part[0]) for part in np.split(lines[:, 0], edges)]
        blocks = np.split(place, edges, axis)
        values = [chain[number].inputs[2] for number in numbers]
        if -1 not in numbers and all(
            value is not None and np.array_equal(block.reshape(-1), np.arange(size(value)))
            for value, block in zip(values, blocks)
        ):
            return axis, [(value, block.shape) for value, block in zip(values, blocks)]  # type: ignore
    return None
