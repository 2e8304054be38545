"""LayerNorm and RMSNorm, over rows and per head."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.heads import Heads, gather_rows, scatter_rows, select_rows
from moeware.compiler.fuse.norm_match import Norm, match_norm
from moeware.compiler.fuse.rebuild import Builder, token_shape
from moeware.compiler.fuse.trace import static_shape


def fuse_norm(model: ir.Model) -> None:
    """Replace norms over rows, fused or written out, by ``LayerNorm`` and ``RMSNorm``.

    Forms
    -----
    LayerNorm
        - ``LayerNormalization`` over the last axis
        - mean, variance, ``Sqrt`` of variance + epsilon, division, gamma and beta in primitive
          operators
    RMSNorm
        - ``RMSNormalization`` over the last axis, ``SimplifiedLayerNormalization``
        - mean square, ``Sqrt`` or ``Pow`` of it + epsilon, division or product, and gamma in
          primitive operators
        - division by the length of the row (``ReduceL2``, bounded from below or not), with factors
    """
    for node in list(model.graph):
        norm = match_norm(model, node) if node.graph is not None else None
        if norm is not None and (norm.beta is not None or not _has_heads(norm.x)):
            _replace_rows(model, norm)


def fuse_head_norm(model: ir.Model) -> None:
    """Replace root-mean-square norms of each head by ``RMSNorm`` of rows in groups.

    Forms
    -----
    RMSNorm
        - either form over the last axis of heads (query and key norms)
    """
    for node in list(model.graph):
        norm = match_norm(model, node) if node.graph is not None else None
        part = select_rows(norm.x) if norm is not None and norm.beta is None else None
        if norm is not None and part is not None:
            _replace_heads(model, norm, part)


def _replace_heads(model: ir.Model, norm: Norm, part: Heads) -> None:
    at, shape = norm.nodes[-1], static_shape(norm.y)
    heads, dim = part.columns.shape
    # A norm does not depend on the order of its channels (in which a rotation may have left them).
    order = np.argsort(part.columns[0])
    x = gather_rows(model, at, replace(part, columns=part.columns[:, order]))
    gamma = _of_heads(norm.gamma, part)
    if x is None or shape is None or gamma is None:
        return
    build = Builder(model, at, norm.nodes)
    inputs = [x, build.weight(gamma[:, order].reshape(-1), "gamma")]
    attributes = {"epsilon": float(norm.epsilon), "groups": heads}
    (rows,) = build.node("RMSNorm", inputs, [(1, part.tokens, heads * dim)], attributes)
    if (order != np.arange(dim)).any():
        columns = np.arange(heads)[:, None] * dim + np.argsort(order)
        rows = build.take(rows, columns.reshape(-1))
    build.replace(norm.y, scatter_rows(build, rows, part, shape))


def _of_heads(gamma: np.ndarray, part: Heads) -> np.ndarray | None:
    """``gamma`` as [heads, dim], whether it is one number, that of a head or those of all heads."""
    heads, dim = part.columns.shape
    if gamma.size in (1, dim):
        return np.broadcast_to(gamma.reshape(-1), (heads, dim))
    along = gamma.shape[-3:] if gamma.ndim > 2 else (1, *gamma.shape)
    wanted = (heads, 1, dim) if part.axis == -2 else (1, heads, dim)
    return gamma.reshape(heads, dim) if along == wanted and gamma.size == heads * dim else None


def _has_heads(x: ir.Value) -> bool:
    """Whether the rows of ``x`` are heads of tokens, as far as it can be told."""
    shape, part = static_shape(x), select_rows(x)
    return shape is not None and len(shape) > 3 or part is not None and len(part.columns) > 1


def _replace_rows(model: ir.Model, norm: Norm) -> None:
    shape = token_shape(norm.x)
    vectors = {"gamma": norm.gamma} if norm.beta is None else {"gamma": norm.gamma, "beta": norm.beta}
    if shape is None or any(vector.size != shape[-1] for vector in vectors.values()):
        return
    build = Builder(model, norm.nodes[-1], norm.nodes)
    inputs = [build.resolve(norm.x, shape)]
    inputs += [build.weight(vector.reshape(-1), name) for name, vector in vectors.items()]
    attributes: dict[str, int | float | str] = {"epsilon": float(norm.epsilon)}
    if norm.beta is None:
        attributes["groups"] = 1
    operator = "RMSNorm" if norm.beta is None else "LayerNorm"
    (result,) = build.node(operator, inputs, [shape], attributes)
    build.replace(norm.y, result)
