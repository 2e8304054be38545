"""Pointwise functions: recognised by their values on a grid, whatever operators compute them."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN
from moeware.compiler.fuse.rebuild import Builder, flat_root, token_shape
from moeware.compiler.fuse.region import region, run
from moeware.compiler.fuse.trace import is_op, scalar, static_shape
from moeware.compiler.scales import FUNCTION

# Every known function contains exactly one of these.
_CORES = ("Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Swish", "Exp", "HardSwish", "HardSigmoid")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal", "Cast", *_CORES)


def fuse_pointwise(model: ir.Model) -> None:
    """Replace each elementwise region that computes a known function by ``Pointwise``.

    Forms
    -----
    Pointwise
        - ``Gelu``, ``Relu``, ``Sigmoid``, ``Tanh``, ``Swish``, ``HardSwish``
        - elementwise operators around ``Erf``, ``Tanh``, ``Sigmoid``, ``HardSigmoid``, ``Relu`` or
          ``Exp`` with the values of a known function
    """
    for node in list(model.graph):
        if node.graph is None or not is_op(node, *_CORES):
            continue
        for x in _arguments(node):
            found = _match(model, node, x)
            if found is not None:
                _replace(model, x, *found)
                break


def _elementwise(node: ir.Node | None) -> bool:
    return is_op(node, *_ELEMENTWISE)


def _arguments(core: ir.Node) -> list[ir.Value]:
    """What the function may take: the core's argument or an ancestor, farthest first."""
    assert core.inputs[0] is not None
    found = [core.inputs[0]]
    for _ in range(8):
        node = found[-1].producer()
        if node is None or not _elementwise(node) or is_op(node, *_CORES):
            break
        variable = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(set(variable)) == 1:
            found.append(variable[0])
        else:
            # x + 0.044715 x^3: go on with the operand that the others are computed from
            older = [v for v in variable if not _elementwise(v.producer()) or _is_shared(v)]
            if not older:
                break
            found.append(older[0])
    return found[::-1]


def _is_shared(value: ir.Value) -> bool:
    return len(value.uses()) > 1


def _match(model: ir.Model, core: ir.Node, x: ir.Value) -> tuple[ir.Value, str] | None:
    """The last value that is a known function of ``x`` through ``core``, and the function."""
    shape = static_shape(x)
    if shape is None:
        return None
    reached, results = {x}, []
    after_core: set[ir.Value] = set()
    frontier = [x]
    while frontier:
        value = frontier.pop(0)
        for node in value.consumers():
            if not _elementwise(node) or node.outputs[0] in reached:
                continue
            if node is not core and is_op(node, *_CORES):
                continue
            variable = [v for v in node.inputs if v is not None and v.const_value is None]
            fixed = [v for v in node.inputs if v is not None and v.const_value is not None]
            if not set(variable) <= reached or any(scalar(v) is None for v in fixed):
                continue
            output = node.outputs[0]
            reached.add(output)
            frontier.append(output)
            if node is core or after_core & set(variable):
                after_core.add(output)
                if static_shape(output) == shape:
                    results.append(output)
    grid = np.zeros(shape, np.float32).reshape(-1)
    grid[:] = np.resize(np.linspace(-6, 6, 997, dtype=np.float32), grid.size)
    if grid.size < 997:
        grid = np.random.default_rng(0).uniform(-6, 6, grid.size).astype(np.float32)
    values = run(model, {x: grid.reshape(shape)}, results) if results else None
    argument = grid.reshape(-1)[:997].astype(np.float64)
    for y, found in zip(reversed(results), reversed(values or [])):
        for name, function in FUNCTION.items() if found.dtype == np.float32 else ():
            if np.abs(found.reshape(-1)[:997] - function(argument)).max() < 1e-5:
                return y, name
    return None


def _replace(model: ir.Model, x: ir.Value, y: ir.Value, name: str) -> None:
    nodes, _ = region([y], [x])
    last = y.producer()
    assert last is not None
    build = Builder(model, last, nodes)
    root = flat_root(x)
    root_shape = static_shape(root)
    # A function does not care for the shape: keep the one that the argument is made in.
    (result,) = build.node("Pointwise", [root], [root_shape], {"function": name})  # type: ignore
    build.replace(y, result)


def lift_pointwise(model: ir.Model) -> None:
    """Give functions of flattened rows the shape ``[1, N, D]`` that the Linear before them has."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "Pointwise":
            continue
        x = node.inputs[0]
        shape = token_shape(x) if x is not None else None
        if x is None or shape is None or shape == static_shape(x):
            continue
        build = Builder(model, node, [node])
        attributes = {"function": node.attributes["function"].value}
        (result,) = build.node("Pointwise", [build.resolve(x, shape)], [shape], attributes)
        build.replace(node.outputs[0], result)
