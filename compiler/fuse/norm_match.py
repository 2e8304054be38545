"""Find LayerNorm and RMSNorm: the fused operators and their primitive forms, proved by running them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.region import region, runner
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    is_op,
    operand,
    other_operand,
    scalar,
    static_shape,
)

__all__ = ["Norm", "match_norm"]

# A region of this many nodes holds every primitive form that exporters write (about ten).
_LARGEST_REGION = 16


@dataclass(frozen=True)
class Norm:
    """``y`` is the normalised last axis of ``x``, times gamma, plus beta (None: root mean square)."""

    x: ir.Value
    y: ir.Value
    nodes: list[ir.Node]
    gamma: np.ndarray
    beta: np.ndarray | None
    epsilon: float


def match_norm(model: ir.Model, node: ir.Node) -> Norm | None:
    """The norm whose operator, root or length ``node`` is; None if it is of none."""
    norm = None
    if is_op(node, "LayerNormalization", "RMSNormalization"):
        norm = _match_operator(node)
        if norm is not None:
            norm = _with_affine(_centred(model, norm) or norm)
    elif is_op(node, "Sqrt") or is_op(node, "Pow") and scalar(operand(node, 1)) in (-0.5, 0.5):
        norm = _match_primitives(model, node)
    elif is_op(node, "ReduceL2"):
        norm = _match_length(model, node)
    return norm if norm is not None and 0 < norm.epsilon < math.inf else None


def _match_operator(node: ir.Node) -> Norm | None:
    x = node.inputs[0]
    shape = static_shape(x)
    if x is None or shape is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        return None
    gamma, beta = constant(operand(node, 1)), constant(operand(node, 2))
    if gamma is None or (beta is None and operand(node, 2) is not None):
        return None
    if is_op(node, "LayerNormalization") and beta is None:
        beta = np.zeros(shape[-1])
    vectors = [gamma] if beta is None else [gamma, beta]
    if any(vector.shape[-1:] != shape[-1:] for vector in vectors):
        return None
    return Norm(x, node.outputs[0], [node], gamma, beta, attribute(node, "epsilon", 1e-5))


def _centred(model: ir.Model, norm: Norm) -> Norm | None:
    """A root mean square ``norm`` of a value less its mean (of a LayerNorm written out, what the
    exporter fused) as the LayerNorm that it is."""
    node = norm.x.producer() if norm.beta is None else None
    mean = node.inputs[1].producer() if is_op(node, "Sub") and node.inputs[1] else None  # type: ignore
    if not is_op(mean, "ReduceMean"):
        return None
    found = replace(norm, x=node.inputs[0], beta=np.zeros_like(norm.gamma),  # type: ignore
                    nodes=[mean, node, *norm.nodes])
    return found if _proven(model, found) else None


def _with_affine(norm: Norm) -> Norm:
    """``norm`` with the factors and terms of features that follow it as gamma and beta."""
    shape = static_shape(norm.y)
    while shape and len(norm.y.uses()) == 1 and not norm.y.is_graph_output():
        (user,) = norm.y.consumers()
        pair = other_operand(user) if is_op(user, "Mul", "Add") else None
        array = constant(pair[1]) if pair else None
        if array is None or not array.shape[-1:] == (array.size,) == shape[-1:]:
            break
        vector = array.reshape(-1)
        if is_op(user, "Mul"):
            beta = norm.beta if norm.beta is None else norm.beta * vector
            norm = replace(norm, gamma=norm.gamma * vector, beta=beta)
        elif norm.beta is not None:
            norm = replace(norm, beta=norm.beta + vector)
        else:
            break
        norm = replace(norm, y=user.outputs[0], nodes=[*norm.nodes, user])
    return norm


def _match_primitives(model: ir.Model, root: ir.Node) -> Norm | None:
    """Find x behind the square root and the normalised value after it, and prove them by running.

    Of a LayerNorm the region before the root holds the centred value ``x - mean(x)``; the region
    after the root ends with gamma and beta where they exist.
    """
    epsilon = _epsilon(root)
    if epsilon is None:
        return None
    candidates = [(x, True) for x in _inputs_of_variance(root)]
    candidates += [(x, False) for x in _inputs_of_square(root)]
    for x, centred in candidates:
        shape = static_shape(x)
        if shape is None or len(shape) < 2:
            continue
        for y in reversed(_affine_results(root, shape)):
            nodes, leaves = region([y], [x])
            if leaves or root not in nodes or len(nodes) > _LARGEST_REGION:
                continue
            gamma, beta = _affine(nodes, shape[-1])
            norm = Norm(x, y, nodes, gamma, beta if centred else None, epsilon)
            # RMSNorm has no beta: the value before it is the norm.
            if (centred or not beta.any()) and _proven(model, norm):
                return norm
    return None


def _match_length(model: ir.Model, root: ir.Node) -> Norm | None:
    """The division of ``x`` by its length, the root of the sum of its squares, as the root mean square
    norm that it is but for a factor."""
    x, shape = root.inputs[0], static_shape(root.inputs[0])
    if x is None or shape is None:
        return None
    for y in reversed(_affine_results(root, shape)):
        nodes, leaves = region([y], [x])
        if leaves or root not in nodes or len(nodes) > _LARGEST_REGION:
            continue
        bounds = [scalar(operand(node, 1)) for node in nodes if is_op(node, "Clip", "Max")]
        above = any(is_op(node, "Clip") and operand(node, 2) is not None for node in nodes)
        if above or any(bound is None or bound > _SHORTEST for bound in bounds):
            continue
        gamma = np.full(1, shape[-1] ** -0.5, np.float32)
        for node in nodes:
            pair = other_operand(node) if is_op(node, "Mul") else None
            gamma = gamma if pair is None else gamma * constant(pair[1])  # type: ignore[operator]
        if gamma.size == 1:
            gamma = np.broadcast_to(gamma.reshape(-1), shape[-1:])
        # A row shorter than the bound of PyTorch's normalize is as good as zero.
        norm = Norm(x, y, nodes, gamma, None, _BOUND**2 / shape[-1])
        if _proven(model, norm):
            return norm
    return None


# Lengths of rows: that of torch.nn.functional.normalize, and the longest that does no more than it.
_BOUND, _SHORTEST = 1e-12, 1e-6


def _epsilon(root: ir.Node) -> float | None:
    node = root.inputs[0].producer() if root.inputs[0] is not None else None
    if is_op(node, "ReduceMean"):
        return _NO_EPSILON
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


def _inputs_of_square(root: ir.Node) -> list[ir.Value]:
    """What the root's mean is a mean of squares of."""
    value = root.inputs[0]
    for _ in range(5):
        node = value.producer() if value is not None else None
        if node is None:
            break
        reads = {read for read in node.inputs if read is not None and read.const_value is None}
        if len(reads) != 1:
            break
        (value,) = reads
        squares = is_op(node, "Mul") and node.inputs[0] is node.inputs[1]
        squares = squares or is_op(node, "Pow") and scalar(operand(node, 1)) == 2
        if squares or is_op(node, "ReduceSumSquare"):
            return [_before_casts(value)]
        if not is_op(node, "Add", "Mul", "Div", "ReduceMean", "ReduceSum", "Cast"):
            break
    return []


def _before_casts(value: ir.Value) -> ir.Value:
    node = value.producer()
    while is_op(node, "Cast") and node is not None and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _affine_results(root: ir.Node, shape: tuple[int, ...]) -> list[ir.Value]:
    """Values of x's shape that follow the root through Div, Mul, Add, Reciprocal, nearest first."""
    found, frontier = [], [root.outputs[0]]
    for _ in range(5):
        frontier = [
            user.outputs[0]
            for value in frontier
            if value is root.outputs[0] or len(value.uses()) == 1
            for user in value.consumers()
            if is_op(user, *_AFFINE)
        ]
        found += [value for value in frontier if static_shape(value) == shape]
    return found


_AFFINE = ("Div", "Mul", "Add", "Reciprocal", "Cast", "Expand", "Clip", "Max")
# Where a graph adds none, or one that the exporter took for 0 (up to 1e-8): less than any row has.
_NO_EPSILON = 1e-20


def _affine(nodes: list[ir.Node], features: int) -> tuple[np.ndarray, np.ndarray]:
    """gamma and beta, read from the constants."""
    gamma, beta = np.ones(features, np.float32), np.zeros(features, np.float32)
    for node in nodes:
        pair = other_operand(node) if is_op(node, "Mul", "Add") else None
        array = constant(pair[1]) if pair else None
        if array is None or not array.size == features > 1:
            continue
        if node.op_type == "Mul":
            gamma = gamma * array.reshape(-1)
        else:
            beta = array.reshape(-1)
    return gamma, beta


def _proven(model: ir.Model, norm: Norm) -> bool:
    """Whether the region computes the norm of random rows: usual ones, small ones, and such as give the
    largest results that there are, which a bound would reach."""
    shape = static_shape(norm.x)
    call = runner(model, {norm.x: np.zeros(shape, np.float32)}, [norm.y]) if shape is not None else None
    if shape is None or call is None:
        return False
    for rows in _samples(shape, norm.gamma):
        results = call({norm.x: rows})
        if results is None or results[0].shape != shape:
            return False
        centred = rows - rows.mean(-1, keepdims=True) if norm.beta is not None else rows
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
        expected = normal * norm.gamma + (0 if norm.beta is None else norm.beta)
        if not np.allclose(results[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()):
            return False
    return True


def _samples(shape: tuple[int, ...], gamma: np.ndarray) -> Iterator[np.ndarray]:
    drawn = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 2 + 1
    yield drawn
    yield drawn * np.float32(1e-3)
    loudest = np.broadcast_to(np.abs(gamma), shape).argmax(-1)[..., None]
    for peak in (1e4, -1e4):
        rows = drawn.copy()
        np.put_along_axis(rows, loudest, np.float32(peak), -1)
        yield rows
