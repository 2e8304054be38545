"""LayerNorm: the fused operator and its primitive forms."""

import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.rebuild import Builder, token_shape
from moeware.compiler.fuse.region import region, run
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    is_op,
    operand,
    other_operand,
    scalar,
    static_shape,
)

# A region of this many nodes holds every primitive form that exporters write (about ten).
_LARGEST_REGION = 16


def fuse_norm(model: ir.Model) -> None:
    """Replace LayerNormalization and its primitive forms over the last axis by ``LayerNorm``.

    Forms
    -----
    LayerNorm
        - ``LayerNormalization`` over the last axis
        - mean, variance, ``Sqrt`` of variance + epsilon, division, gamma and beta in primitive
          operators
    """
    for node in list(model.graph):
        if node.graph is None:
            continue
        if is_op(node, "LayerNormalization"):
            _fuse_operator(model, node)
        elif is_op(node, "Sqrt"):
            _fuse_primitives(model, node)


def _fuse_operator(model: ir.Model, node: ir.Node) -> None:
    x = node.inputs[0]
    shape = static_shape(x)
    if x is None or shape is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        return
    gamma, beta = constant(operand(node, 1)), constant(operand(node, 2))
    if gamma is None or (beta is None and operand(node, 2) is not None):
        return
    features = shape[-1]
    beta = np.zeros(features) if beta is None else beta
    if not gamma.shape[-1:] == beta.shape[-1:] == (features,):
        return
    epsilon = attribute(node, "epsilon", 1e-5)
    _replace(model, [node], x, node.outputs[0], gamma, beta, epsilon)


def _fuse_primitives(model: ir.Model, root: ir.Node) -> None:
    """Find x behind the square root and the normalised value after it, and prove them by running.

    The region before the root holds the centred value ``x - mean(x)``; the region after it ends
    with gamma and beta where they exist.
    """
    epsilon = _epsilon(root)
    if epsilon is None:
        return
    for x in _inputs_of_variance(root):
        shape = static_shape(x)
        if shape is None or len(shape) < 2:
            continue
        for y in reversed(_affine_results(root, shape)):
            nodes, _ = region([y], [x])
            if root not in nodes or len(nodes) > _LARGEST_REGION:
                continue
            affine = _measure(model, x, y, shape, epsilon)
            if affine is not None:
                _replace(model, nodes, x, y, *affine, epsilon)
                return


def _epsilon(root: ir.Node) -> float | None:
    node = root.inputs[0].producer() if root.inputs[0] is not None else None
    pair = other_operand(node) if is_op(node, "Add") and node is not None else None
    return scalar(pair[1]) if pair else None


def _inputs_of_variance(root: ir.Node) -> list[ir.Value]:
    """Candidates for x: what a ReduceMean reads behind the root, farthest first."""
    assert root.inputs[0] is not None
    found: list[ir.Value] = []
    frontier = [root.inputs[0]]
    for _ in range(8):
        nodes = [value.producer() for value in frontier]
        frontier = []
        for node in nodes:
            if node is None:
                continue
            reads = [value for value in node.inputs if value is not None]
            frontier += [value for value in reads if value.const_value is None]
            if is_op(node, "ReduceMean"):
                found.insert(0, reads[0])
    return found


def _affine_results(root: ir.Node, shape: tuple[int, ...]) -> list[ir.Value]:
    """Values of x's shape that follow the root through Div, Mul, Add, Reciprocal, nearest first."""
    found, current = [], root.outputs[0]
    for _ in range(5):
        users = [node for node in current.consumers() if is_op(node, *_AFFINE)]
        if not users:
            break
        current = users[0].outputs[0]
        if static_shape(current) == shape:
            found.append(current)
        if len(current.uses()) > 1:
            break
    return found


_AFFINE = ("Div", "Mul", "Add", "Reciprocal", "Cast")


def _measure(
    model: ir.Model, x: ir.Value, y: ir.Value, shape: tuple[int, ...], epsilon: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """gamma and beta with ``y = layernorm(x) * gamma + beta``, read from the constants, or None."""
    nodes, _ = region([y], [x])
    vectors = [np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)]
    for node in nodes:
        pair = other_operand(node) if is_op(node, "Mul", "Add") else None
        array = constant(pair[1]) if pair else None
        if array is not None and array.size == shape[-1] > 1:
            vectors[node.op_type == "Add"] = array.reshape(-1)
    sample = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 2 + 1
    results = run(model, {x: sample}, [y])
    if results is None:
        return None
    centred = sample - sample.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    expected = normal * vectors[0] + vectors[1]
    close = np.allclose(results[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    return (vectors[0], vectors[1]) if close else None


def _replace(model, nodes, x, y, gamma, beta, epsilon) -> None:
    shape = token_shape(x)
    if shape is None or gamma.size != shape[-1] or beta.size != shape[-1]:
        return
    if not 0 < epsilon < math.inf:
        return
    build = Builder(model, nodes[-1], nodes)
    inputs = [build.resolve(x, shape), build.weight(gamma.reshape(-1), "gamma")]
    inputs.append(build.weight(beta.reshape(-1), "beta"))
    (result,) = build.node("LayerNorm", inputs, [shape], {"epsilon": float(epsilon)})
    build.replace(y, result)
