"""A shared expert under a sigmoid gate of each token (Qwen1.5-MoE), as a mixture of experts.

``sigmoid(z) = softmax([z, 0])[0]``: so the gate is a Route with the logits z and 0 that chooses both
of two experts, of which the second is zero. That is exact, and costs the products of the zeros.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import PLAIN_ROUTE
from moeware.compiler.fuse.rebuild import Builder, flat_root, made_by
from moeware.compiler.fuse.trace import attribute, constant, is_op, static_shape


def fuse_shared_expert(model: ir.Model) -> None:
    """Replace a feed-forward network times a sigmoid of one Linear by ``Route`` and experts.

    Forms
    -----
    Route, Experts, GatedExperts
        - a feed-forward network that all tokens pass, times the ``Sigmoid`` of one Linear of the token
          (shared expert)
    """
    for node in list(model.graph):
        if not is_op(node, "Mul"):
            continue
        for gate, branch in (node.inputs, node.inputs[::-1]):
            route, network = _gate(gate), _network(branch)
            if route is None or network is None or branch is None:
                continue
            x, shape = flat_root(route.inputs[0]), static_shape(route.inputs[0])  # type: ignore
            firsts = [layer for layer in (network[0], network[2]) if layer is not None]
            if shape is None or any(flat_root(layer.inputs[0]) is not x for layer in firsts):  # type: ignore
                continue
            if len(shape) == 3 and static_shape(node.outputs[0]) == static_shape(branch):
                y = _mixture(model, node, route, network)
                Builder(model, node, []).replace(node.outputs[0], y)
                break


def _gate(value: ir.Value | None) -> ir.Node | None:
    """The Linear to one number of which ``value`` is the sigmoid."""
    sigmoid = made_by(value, "Pointwise")
    if sigmoid is None or attribute(sigmoid, "function", "") != "sigmoid":
        return None
    linear = made_by(sigmoid.inputs[0], "Linear")
    return linear if linear is not None and len(_arrays(linear)[1]) == 1 else None


# First layer, its function, the layer beside it or None, last layer, and all nodes.
_Network = tuple[ir.Node, str, ir.Node | None, ir.Node, list[ir.Node]]


def _network(value: ir.Value | None) -> _Network | None:
    """The feed-forward network that makes ``value``."""
    down = made_by(value, "Linear")
    if down is None:
        return None
    product = made_by(down.inputs[0], "Multiply")
    factors = product.inputs if product is not None else (down.inputs[0],)
    functions = [node for node in (made_by(each, "Pointwise") for each in factors) if node]
    others = [node for node in (made_by(each, "Linear") for each in factors) if node]
    if len(functions) != 1 or len(others) != len(factors) - 1:
        return None
    up, factor = made_by(functions[0].inputs[0], "Linear"), others[0] if others else None
    if up is None:
        return None
    nodes = [node for node in (up, *functions, factor, product, down) if node is not None]
    return up, attribute(functions[0], "function", ""), factor, down, nodes


def _arrays(linear: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = constant(linear.inputs[1]), constant(linear.inputs[2])
    assert weight is not None and bias is not None
    return weight, bias


def _mixture(model: ir.Model, at: ir.Node, gate: ir.Node, network: _Network) -> ir.Value:
    up, function, factor, down, nodes = network
    x, shape = gate.inputs[0], static_shape(gate.inputs[0])
    assert x is not None and shape is not None
    build = Builder(model, at, [gate])
    chosen = (*shape[:-1], 2)
    indices, weights = build.node(
        "Route",
        [x, *_beside_zeros(build, gate, np.concatenate),
         build.weight(np.zeros(2, np.float32), "correction")],
        [chosen, chosen],
        {"k": 2, "normalise": "all", **PLAIN_ROUTE},
        [ir.DataType.INT64, ir.DataType.FLOAT],
    )
    build = Builder(model, at, [*nodes, at])
    inputs = [x, indices, weights]
    for layer in (up, down) if factor is None else (up, down, factor):
        inputs += _beside_zeros(build, layer, np.stack)
    operator = "Experts" if factor is None else "GatedExperts"
    return build.node(operator, inputs, [shape], {"function": function})[0]


def _beside_zeros(
    build: Builder, linear: ir.Node, join: Callable[[list[np.ndarray]], np.ndarray]
) -> list[ir.Value]:
    """Weight and bias of ``linear``, joined with as many zeros."""
    return [build.weight(join([array, np.zeros_like(array)]), name)
            for array, name in zip(_arrays(linear), ("weight", "bias"))]
