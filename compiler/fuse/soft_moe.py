"""SoftExperts: every slot a mixture of all tokens, every token a mixture of all slots (Soft MoE).

Seed: a value that is linear in x and that two Softmaxes read, one over tokens and one over slots.
The slots' vectors are read off by running that linear map on unit vectors, the experts' weights are
proposed as for routed experts (`moe_weights`), and running the whole region decides.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch

from moeware.compiler.canonical import REASON
from moeware.compiler.fuse.linear import match_product
from moeware.compiler.fuse.moe import cuts
from moeware.compiler.fuse.moe_proof import TOLERANCE
from moeware.compiler.fuse.moe_weights import ExpertWeights, propose_weights
from moeware.compiler.fuse.rebuild import Builder, flat_root, token_shape
from moeware.compiler.fuse.region import region, run
from moeware.compiler.fuse.trace import attribute, is_op, size, static_shape, traces
from moeware.compiler.operators import FUNCTIONS, OPERATORS

_FAR = 30.0  # in proportion to usual values and logits, which differ by about 1
_OTHER = (
    "what two Softmaxes, as of Soft MoE, read is not proven to fill and empty the slots of experts; let "
    "it be one linear map of the tokens, without bias, and the experts two layers with one known function"
)


def fuse_soft_moe(model: ir.Model) -> None:
    """Replace each proven Soft MoE by ``SoftExperts``.

    Forms
    -----
    SoftExperts
        - logits linear in x, their ``Softmax`` over tokens and over slots, and ``Einsum`` or
          ``MatMul`` with each; experts one by one or stacked
    """
    for logits in _twice_normalised(model):
        if not _fuse_slots(model, logits):
            for node in _softmaxes(model, logits):
                node.metadata_props[REASON] = _OTHER


def _fuse_slots(model: ir.Model, logits: ir.Value) -> bool:
    """Replace the Soft MoE that ``logits`` weigh; whether it was proven to be one."""
    x = _argument(logits)
    shape = token_shape(x) if x is not None else None
    if x is None or shape is None or len(shape) != 3:
        return False
    slots = _slots(model, x, logits, shape)
    return slots is not None and any(
        _fuse(model, x, logits, y, slots, shape) for y in cuts(model, x)
        if size(y) == size(x) and y not in (x, logits)
    )


def _twice_normalised(model: ir.Model) -> list[ir.Value]:
    """Values that two or more Softmaxes read, but for layout."""
    readers: dict[ir.Value, int] = {}
    for node in model.graph:
        if is_op(node, "Softmax") and node.inputs[0] is not None:
            for trace in traces(node.inputs[0]):
                readers[trace.root] = readers.get(trace.root, 0) + 1
    return [value for value, count in readers.items() if count > 1]


def _softmaxes(model: ir.Model, logits: ir.Value) -> list[ir.Node]:
    """Those of ``logits``, if one goes along another axis than the last."""
    nodes = [node for node in model.graph if is_op(node, "Softmax")
             and any(trace.root is logits for trace in traces(node.inputs[0]))]  # type: ignore
    last = [len(static_shape(node.inputs[0]) or ()) - 1 for node in nodes]
    across = any(attribute(node, "axis", -1) not in (-1, axis) for node, axis in zip(nodes, last))
    return nodes if across else []


def _argument(logits: ir.Value) -> ir.Value | None:
    """The variable operand of the product that makes the logits."""
    for trace in traces(logits, scaled=True):
        node = trace.root.producer()
        if is_op(node, "MatMul", "Gemm", "Einsum"):
            assert node is not None
            variable = [v for v in node.inputs if v is not None and v.const_value is None]
            if len(variable) == 1 or match_product(node) is not None:
                return flat_root(variable[0])
    return None


def _slots(
    model: ir.Model, x: ir.Value, logits: ir.Value, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The vector of each slot, ``[S, D]``: what the linear map makes of unit vectors."""
    _, tokens, features = shape
    given = static_shape(logits)
    axes = [size for size in given or () if size != 1]
    if region([logits], [x])[1] or size(logits) % tokens or (tokens > 1 and axes[0] != tokens):
        return None
    vectors = []
    for start in range(0, features, tokens):
        rows = np.eye(tokens, features, start, dtype=np.float32)
        results = run(model, {x: rows.reshape(static_shape(x))}, [logits])
        if results is None:
            return None
        vectors.append(results[0].reshape(tokens, -1))
    return np.concatenate(vectors)[:features].T


def _fuse(
    model: ir.Model,
    x: ir.Value,
    logits: ir.Value,
    y: ir.Value,
    slots: np.ndarray,
    shape: tuple[int, ...],
) -> bool:
    nodes, leaves = region([y], [x])
    if leaves or logits.producer() not in nodes:
        return False
    samples = _samples(slots, shape)
    results = [run(model, {x: sample.reshape(static_shape(x))}, [y]) for sample in samples]
    if None in results:
        return False
    expected = [found.reshape(shape) for (found,) in results]  # type: ignore[misc]
    # In the order of the graph, which is that of the experts.
    inner = set(nodes) - set(region([logits], [x])[0])
    inner = [node for node in model.graph if node in inner]
    for weights in _proposals(inner, x, len(slots), shape[2]):
        arrays = [slots, weights.w1, weights.b1, weights.w2, weights.b2]
        constants = [torch.from_numpy(np.array(array, np.float32)) for array in arrays]
        errors = {}
        for function in FUNCTIONS:
            made = [OPERATORS["SoftExperts"]([torch.from_numpy(sample), *constants],
                                             {"function": function}, "", _forget)[0].numpy()
                    for sample in samples]
            errors[function] = max(np.abs(found - wanted).max() / np.abs(wanted).max()
                                   for found, wanted in zip(made, expected))
        # The best of them, as some functions differ by little.
        function = min(errors, key=errors.__getitem__)
        if errors[function] < TOLERANCE:
            _replace(model, x, y, nodes, arrays, function, shape)
            return True
    return False


def _samples(slots: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Tokens as they are usual, and such that logits, and hidden values, are far beyond a bound."""
    sample = np.random.default_rng(11).normal(size=shape).astype(np.float32)
    spread = float(np.sqrt(np.square(slots).sum(-1).mean())) or 1.0
    far = [np.float32(scale) for scale in (1 / spread, _FAR, _FAR / spread)]
    return [sample, *(sample * scale for scale in far)]


def _forget(name: str, array: np.ndarray) -> None:
    """A record that keeps nothing."""


def _proposals(
    nodes: list[ir.Node], x: ir.Value, slots: int, features: int
) -> Iterator[ExpertWeights]:
    for experts in range(1, slots + 1):
        if slots % experts == 0:
            proposals = propose_weights(nodes, x, experts, features)
            yield from (weights for weights in proposals if weights.w3 is None)


def _replace(model, x, y, nodes, arrays, function, shape) -> None:
    last = y.producer()
    assert last is not None
    build = Builder(model, last, nodes)
    names = ("slots", "w1", "b1", "w2", "b2")
    inputs = [build.resolve(x, shape), *(build.weight(a, n) for a, n in zip(arrays, names))]
    (result,) = build.node("SoftExperts", inputs, [shape], {"function": function})
    build.replace(y, result)
