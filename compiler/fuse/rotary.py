"""Rotary embedding (Su et al. 2021, RoFormer, section 3.4.2): pairs of channels of queries and
keys turned by an angle of their position, in whatever order of channels it was exported."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.heads import Heads, gather_rows, join_rows, scatter_rows
from moeware.compiler.fuse.rebuild import Builder
from moeware.compiler.fuse.region import run
from moeware.compiler.fuse.terms import Terms, expand, is_rotary, joined_shape, rotary_heads
from moeware.compiler.fuse.trace import is_op, static_shape


@dataclass(frozen=True)
class _Turn:
    """``inputs``: columns [heads, dim] of the roots, side by side, that meet as canonical channels;
    ``outputs`` [dim]: where these are in a head of the result; cos and sin [tokens, dim / 2]."""

    inputs: np.ndarray
    outputs: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    axis: int


def fuse_rotary(model: ir.Model) -> None:
    """Replace each proven rotation of pairs of channels by ``Rotary``.

    Rows of the weights before it are permuted so that pairs are channels c and c + dim/2; channels
    that pass are turned by an angle of zero. The order of the result is restored behind it.

    Forms
    -----
    Rotary
        - ``RotaryEmbedding`` of the standard (opset 23 on) or of ONNX Runtime, with constant positions
        - products with constant cosines and sines, and sums, of halves (rotate_half), of neighbours,
          of complex pairs written out; of a part of each head; in any layout of heads
        - of heads that are put together of two Linears, as the keys of latent attention are
    Join
        - heads of channels of two Linears, of which at least one is turned; each may be in several
          heads
    """
    done: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        if node in done or not (is_op(node, "Add", "Sub", "Concat") or is_rotary(node)):
            continue
        most = 2 if is_op(node, "Concat") else 1
        for y in _reshapes(node.outputs[0]):
            expanded = expand(y, most)
            if expanded is None:
                break
            roots, terms, nodes = expanded
            turn = _match(_split(terms, rotary_heads(node)), joined_shape(roots))
            if turn is not None and _replace(model, roots, y, turn, nodes):
                done.update(nodes)
                break


def _reshapes(value: ir.Value) -> Iterator[ir.Value]:
    """``value`` and what reshaping alone makes of it."""
    yield value
    while len(value.uses()) == 1 and not value.is_graph_output():
        (user,) = value.consumers()
        if not is_op(user, "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast"):
            return
        value = user.outputs[0]
        yield value


def _split(terms: Terms, heads: int) -> Terms:
    """Rows of ``heads`` (where any are given) with an axis for the heads."""
    if not heads or len(terms.shape) != 3 or terms.shape[-1] % heads:
        return terms
    shape = (2, *terms.shape[:-1], heads, -1)
    return Terms(terms.places.reshape(shape), terms.factors.reshape(shape))


def _match(terms: Terms, rows: tuple[int, ...] | None) -> _Turn | None:
    if rows is None or len(rows) != 3 or rows[0] != 1 or len(terms.shape) < 2:
        return None
    _, tokens, features = rows
    axis = _token_axis(terms, tokens, features)
    if axis is None:
        return None
    arrays = [np.moveaxis(each, axis + 1, 1) for each in (terms.places, terms.factors)]
    places, factors = (each.reshape(2, tokens, -1, terms.shape[-1]) for each in arrays)
    offsets = np.arange(tokens)[None, :, None, None] * features
    columns, factors = _alike(np.where(places < 0, -1, places - offsets), factors)
    if factors is None or columns.max() >= features or places.shape[-1] % 2:
        return None
    heads = [_pairs(columns[:, head], factors[:, :, head]) for head in range(places.shape[2])]
    first = heads[0]
    if first is None or any(head is None for head in heads):
        return None
    for _, *others in heads:  # type: ignore[misc]
        if any(not np.array_equal(a, b) for a, b in zip(others, first[1:])):
            return None
    before = terms.shape[:axis]
    return _Turn(np.stack([head[0] for head in heads]), *first[1:],  # type: ignore[index]
                 axis=-3 if all(length == 1 for length in before) else -2)


def _token_axis(terms: Terms, tokens: int, features: int) -> int | None:
    """The axis of the terms along which the rows of the root follow each other."""
    number = terms.places[0] // features
    for axis in range(len(terms.shape) - 1):
        shape = [1] * len(terms.shape)
        shape[axis] = tokens
        outside = terms.shape[axis] != tokens or any(
            length > 1 for length in terms.shape[axis + 1 : -1]) and any(
            length > 1 for length in terms.shape[:axis])
        if not outside and (number == np.arange(tokens).reshape(shape)).all():
            return axis
    return None


def _alike(columns: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Columns [2, ...] that serve all tokens, and the factors that each token has for them; None where
    tokens read different columns. Tokens that pass (class tokens, registers) may lack a term.

    columns, factors : [2, tokens, ...]
    """
    token = (columns[1] >= 0).argmax(0)[None, None]
    common = np.take_along_axis(columns, token, 1)
    found = np.stack([np.where(columns == each, factors, 0).sum(0) for each in common])
    known = (columns < 0) | (columns == common[0]) | (columns == common[1])
    return common[:, 0], found if known.all() else None


def _pairs(
    columns: np.ndarray, factors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """inputs [dim], outputs [dim], cos and sin [tokens, dim/2] of one head.

    columns : [2, dim] of the terms of each channel; factors : [2, tokens, dim].
    """
    meet: dict[tuple[int, ...], list[int]] = {}
    for channel, key in enumerate(np.sort(columns, axis=0).T.tolist()):
        meet.setdefault(tuple(key), []).append(channel)

    def factor(channel: int, column: int) -> np.ndarray:
        return factors[list(columns[:, channel]).index(column), :, channel]

    found, passing = [], []
    for (low, high), channels in meet.items():
        if low < 0 and len(channels) == 1:
            passing.append((high, channels[0]))
            continue
        if low < 0 or len(channels) != 2:
            return None
        p, q = channels
        for i, j in ((low, high), (high, low)):
            cos, sin = factor(p, i), factor(q, i)
            if np.array_equal(factor(q, j), cos) and np.array_equal(factor(p, j), -sin):
                found.append((p, q, i, j, cos, sin))
                break
        else:
            return None
    half = len(passing) // 2
    for (i, p), (j, q) in zip(passing[:half], passing[half:]):
        if not np.array_equal(factor(p, i), factor(q, j)):
            return None
        found.append((p, q, i, j, factor(p, i), np.zeros(len(factors[0]))))
    if not found or len(found) == half or len(passing) % 2:
        return None
    p, q, i, j, cos, sin = zip(*found)
    inputs, outputs = np.array(i + j), np.array(p + q)
    if len(set(inputs.tolist())) != len(inputs):
        return None
    return inputs, outputs, np.stack(cos, -1), np.stack(sin, -1)


def _replace(
    model: ir.Model, roots: tuple[ir.Value, ...], y: ir.Value, turn: _Turn, nodes: list[ir.Node]
) -> bool:
    at, shape, rows = y.producer(), static_shape(y), static_shape(roots[0])
    assert at is not None and shape is not None and rows is not None
    if not _proven(model, roots, y, turn):
        return False
    heads, dim = turn.inputs.shape
    part = Heads(roots[0], roots[0], turn.inputs, rows[1], 1.0, tuple(nodes), turn.axis)
    x = join_rows(model, at, roots, part) if len(roots) > 1 else gather_rows(model, at, part)
    if x is None:
        return False
    length = np.hypot(turn.cos, turn.sin)
    # Longer or shorter pairs everywhere (attention scaling): a factor that attention takes up.
    scale = float(length.mean()) if np.ptp(length) < 1e-5 * length.mean() else 1.0
    scale = scale if abs(scale - 1) > 1e-5 else 1.0
    build = Builder(model, at, nodes)
    inputs = [x, build.weight(turn.cos / scale, "cos"), build.weight(turn.sin / scale, "sin")]
    (result,) = build.node("Rotary", inputs, [(1, rows[1], heads * dim)], {"heads": heads})
    order = np.argsort(turn.outputs)
    if (order != np.arange(dim)).any():
        columns = np.arange(heads)[:, None] * dim + order
        result = build.take(result, columns.reshape(-1))
    if scale != 1.0:
        result = build.scale(result, scale)
    build.replace(y, scatter_rows(build, result, part, shape))
    return True


def _proven(model: ir.Model, roots: tuple[ir.Value, ...], y: ir.Value, turn: _Turn) -> bool:
    """Whether the region computes the turn of random rows."""
    random = np.random.default_rng(5)
    samples = {root: random.normal(size=static_shape(root)).astype(np.float32) for root in roots}
    results = run(model, samples, [y])
    if results is None:
        return False
    sample = np.concatenate(list(samples.values()), -1)
    first, second = np.split(sample[0][:, turn.inputs], 2, axis=-1)
    cos, sin = turn.cos[:, None], turn.sin[:, None]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    expected = turned[..., np.argsort(turn.outputs)]  # [tokens, heads, dim]
    if turn.axis == -2:
        expected = expected.swapaxes(0, 1)
    error = np.abs(results[0].reshape(expected.shape) - expected).max()
    return bool(error <= 1e-5 * np.abs(expected).max())
