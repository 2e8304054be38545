"""Values as sums of a few scaled elements of others, found by running operators on the terms.

`trace` follows elements through layout operators; this follows them through negations, constant
factors, sums and concatenations, too: all that rotates pairs of channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.region import region
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    is_op,
    move,
    operand,
    other_operand,
    static_shape,
)

# More nodes are no rotation: it takes a dozen.
_LARGEST_REGION = 48


@dataclass(frozen=True)
class Terms:
    """Element ``e`` is the sum over slots ``s`` of ``factors[s, e] *`` element ``places[s, e]`` of a
    flattened root, or of several side by side (on the last axis); a place of -1 holds no term. A term of factor 0 counts: it shows the structure.
    """

    places: np.ndarray  # int64 [2, *shape]
    factors: np.ndarray  # float64 [2, *shape]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape[1:]

    def __getitem__(self, index) -> "Terms":
        return Terms(self.places[:, *index], self.factors[:, *index])

    def moved(self, node: ir.Node, output: ir.Value) -> "Terms | None":
        """What layout operator ``node`` makes of the terms."""
        arrays = [move(node, array) for array in (*self.places, *self.factors)]
        if any(moved is None for moved in arrays):
            return None
        parts = [moved[output.index()] for moved in arrays]  # type: ignore[index]
        return Terms(np.stack(parts[:2]), np.stack(parts[2:]))

    def scaled(self, factor: np.ndarray) -> "Terms":
        """The terms times ``factor``, which may broadcast them."""
        spread = self.spread(np.broadcast_shapes(self.shape, factor.shape))
        return Terms(spread.places, spread.factors * factor)

    def spread(self, shape: tuple[int, ...]) -> "Terms":
        """The terms broadcast to ``shape``, which may have more axes."""
        ones = (1,) * (len(shape) - len(self.shape))
        parts = (part.reshape(2, *ones, *self.shape) for part in (self.places, self.factors))
        return Terms(*(np.broadcast_to(part, (2, *shape)) for part in parts))

    def plus(self, other: "Terms") -> "Terms | None":
        """The sum of both; None where an element would have more than two terms."""
        shape = np.broadcast_shapes(self.shape, other.shape)
        parts = (self.spread(shape), other.spread(shape))
        places = np.concatenate([part.places for part in parts])
        factors = np.concatenate([part.factors for part in parts])
        for first in range(2):
            for second in range(2, 4):
                same = (places[first] == places[second]) & (places[first] >= 0)
                factors[first] += np.where(same, factors[second], 0)
                places[second] = np.where(same, -1, places[second])
        order = np.argsort(places < 0, axis=0, kind="stable")
        places, factors = (np.take_along_axis(each, order, 0) for each in (places, factors))
        return Terms(places[:2], factors[:2]) if (places[2:] < 0).all() else None


def joined(parts: list[Terms], axis: int) -> Terms:
    """Concatenation; ``axis`` is counted without the slots."""
    axis = axis if axis < 0 else axis + 1
    return Terms(
        np.concatenate([part.places for part in parts], axis),
        np.concatenate([part.factors for part in parts], axis),
    )


def expand(
    value: ir.Value, most: int = 1
) -> tuple[tuple[ir.Value, ...], Terms, list[ir.Node]] | None:
    """``value`` in terms of the values, ``most`` of them, that it is computed from by linear
    operators, and the nodes between; None where there are more, or more than two terms."""
    nodes: dict[ir.Node, None] = {}
    roots: dict[ir.Value, None] = {}
    stack = [value]
    while stack:
        current = stack.pop()
        reads = _variables(current.producer())
        if reads is None:
            roots[current] = None
        elif current.producer() not in nodes:
            nodes[current.producer()] = None  # type: ignore[index]
            stack += reads
        if len(roots) > most or len(nodes) > _LARGEST_REGION:
            return None
    shape = joined_shape(tuple(roots))
    if not shape:
        return None
    places = np.stack([np.arange(math.prod(shape)).reshape(shape), np.full(shape, -1)])
    together = Terms(places, np.stack([np.ones(shape), np.zeros(shape)]))
    edges = np.cumsum([0, *(static_shape(root)[-1] for root in roots)])  # type: ignore[index]
    found = {
        root: together[..., first:last] for root, first, last in zip(roots, edges, edges[1:])
    }
    ordered = region([value], roots)[0]
    for node in ordered:
        for output in node.outputs:
            terms = _apply(node, output, found)
            if terms is not None:
                found[output] = terms
    return (tuple(roots), found[value], ordered) if value in found else None


def joined_shape(roots: tuple[ir.Value, ...]) -> tuple[int, ...] | None:
    """The shape of values side by side; None where they have none, or differ in other axes."""
    shapes = [static_shape(root) for root in roots]
    first, *others = shapes
    if first is None or not others:
        return first
    if any(shape is None or not shape or shape[:-1] != first[:-1] for shape in shapes):
        return None
    return (*first[:-1], sum(shape[-1] for shape in shapes))  # type: ignore[index]


def _variables(node: ir.Node | None) -> list[ir.Value] | None:
    """What a linear operator reads beside constants; None for another operator."""
    if node is None:
        return None
    reads = [read for read in node.inputs if read is not None and read.const_value is None]
    if is_op(node, "Add", "Sub", "Concat"):
        return reads if len(reads) == len(node.inputs) else None
    if is_op(node, "Mul"):
        return reads if len(reads) == 1 else None
    if tuple(reads) != tuple(node.inputs[:1]):
        return None
    shape = static_shape(reads[0])
    moves = shape is not None and move(node, np.zeros(shape)) is not None
    return reads if moves or is_op(node, "Neg", "Div") or is_rotary(node) else None


def _apply(node: ir.Node, output: ir.Value, found: dict[ir.Value, Terms]) -> Terms | None:
    reads = [found.get(value) for value in node.inputs if value is not None]
    if is_op(node, "Add", "Sub", "Concat"):
        known = [terms for terms in reads if terms is not None]
        if len(known) < len(reads):
            return None
        if is_op(node, "Concat"):
            return joined(known, attribute(node, "axis", 0))
        return known[0].plus(known[1].scaled(np.array(-1.0 if is_op(node, "Sub") else 1.0)))
    terms = next((terms for terms in reads if terms is not None), None)
    if terms is None:
        return None
    if is_op(node, "Neg"):
        return terms.scaled(np.array(-1.0))
    if is_op(node, "Mul", "Div"):
        factor = constant(other_operand(node)[1])  # type: ignore[index]
        assert factor is not None
        factor = factor.astype(np.float64)
        return terms.scaled(factor if is_op(node, "Mul") else 1 / factor)
    return _rotated(node, terms) if is_rotary(node) else terms.moved(node, output)


def is_rotary(node: ir.Node | None) -> bool:
    """Whether ``node`` is RotaryEmbedding, of ai.onnx (opset 23) or of ONNX Runtime's domain."""
    domains = ("", "ai.onnx", "com.microsoft")
    return node is not None and node.op_type == "RotaryEmbedding" and node.domain in domains


def rotary_heads(node: ir.Node) -> int:
    """Heads in the rows that RotaryEmbedding ``node`` turns; 0 where it reads heads."""
    shape, cos = static_shape(node.inputs[0]), constant(_caches(node)[0])
    if not is_rotary(node) or shape is None or len(shape) != 3:
        return 0
    heads = attribute(node, "num_heads", 0)
    return heads or (shape[-1] // (2 * cos.shape[-1]) if cos is not None else 0)


def _caches(node: ir.Node) -> list[ir.Value | None]:
    """cos, sin and positions that RotaryEmbedding ``node`` reads."""
    places = (2, 3, 1) if node.domain == "com.microsoft" else (1, 2, 3)
    return [operand(node, place) for place in places]


def _rotated(node: ir.Node, terms: Terms) -> Terms | None:
    """RotaryEmbedding of the terms."""
    cos, sin, positions = (constant(value) for value in _caches(node))
    shape, heads = terms.shape, rotary_heads(node)
    if cos is None or sin is None or positions is None and _caches(node)[2] is not None:
        return None
    if positions is not None and positions.size == 1:  # of the first token
        positions = positions.reshape(1, 1) + np.arange(shape[-2])
    if positions is not None:
        if positions.min(initial=0) < 0 or positions.max(initial=0) >= min(len(cos), len(sin)):
            return None  # what ONNX Runtime refuses
        cos, sin = cos[positions], sin[positions]
    tokens = shape[1 if heads else 2] if len(shape) > 2 else 0
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[:2] not in ((1, tokens), (shape[0], tokens)):
        return None
    if heads:
        x = Terms(*(each.reshape(2, *shape[:2], heads, -1) for each in (terms.places, terms.factors)))
        cos, sin = cos[:, :, None], sin[:, :, None]
    else:
        x, cos, sin = terms, cos[:, None], sin[:, None]
    length = attribute(node, "rotary_embedding_dim", 0) or x.shape[-1]
    if length != 2 * cos.shape[-1] or length > x.shape[-1]:
        return None
    if attribute(node, "interleaved", 0):
        first, second = (x[..., start:length:2] for start in (0, 1))
    else:
        first, second = x[..., : length // 2], x[..., length // 2 : length]
    turned = (
        first.scaled(cos).plus(second.scaled(-sin)),
        second.scaled(cos).plus(first.scaled(sin)),
    )
    if None in turned:
        return None
    result = joined([*turned, x[..., length:]], -1)  # type: ignore[list-item]
    if attribute(node, "interleaved", 0):
        order = np.arange(length).reshape(2, -1).T.reshape(-1)
        result = result[..., np.concatenate([order, np.arange(length, x.shape[-1])])]
    return Terms(result.places.reshape(2, *shape), result.factors.reshape(2, *shape))
