"""Pointwise functions: recognised by their values on a grid, whatever operators compute them."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN
from moeware.compiler.fuse.rebuild import Builder, flat_root, token_shape
from moeware.compiler.fuse.region import region, runner
from moeware.compiler.fuse.trace import is_op, scalar, size, static_shape
from moeware.compiler.scales import FUNCTION

# Every known function contains exactly one of these.
_CORES = ("Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Swish", "Exp", "HardSwish", "HardSigmoid", "Max",
          "Clip")
_LEVELS = 8  # of operators before a core: the tanh form of GELU has five
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal", "Cast", *_CORES)


def fuse_pointwise(model: ir.Model) -> None:
    """Replace each elementwise region that computes a known function by ``Pointwise``.

    Forms
    -----
    Pointwise
        - ``Gelu``, ``Relu``, ``Sigmoid``, ``Tanh``, ``Swish``, ``HardSwish``
        - elementwise operators around ``Erf``, ``Tanh``, ``Sigmoid``, ``HardSigmoid``, ``Relu``,
          ``Exp``, ``Max`` or ``Clip`` with the values of a known function
    """
    for node in list(model.graph):
        if node.graph is None or not _is_core(node):
            continue
        for x in _arguments(node):
            found = _match(model, node, x)
            if found is not None:
                _replace(model, x, *found)
                break


def _is_core(node: ir.Node) -> bool:
    """Whether ``node`` may be the core of a function; no bound but 0 is (a divisor has others)."""
    bounded = is_op(node, "Max", "Clip")
    return is_op(node, *_CORES) and (not bounded or any(scalar(each) == 0 for each in node.inputs))


def _elementwise(node: ir.Node | None) -> bool:
    return is_op(node, *_ELEMENTWISE)


def _arguments(core: ir.Node) -> list[ir.Value]:
    """What the function may take: the core's argument, or what this is computed from alone, farthest
    first."""
    argument = core.inputs[0]
    assert argument is not None
    reached, level = {argument: None}, [argument]
    for _ in range(_LEVELS):
        level = [before for value in level for before in _operands(value) if before not in reached]
        reached.update(dict.fromkeys(level))
    return [value for value in reached if _closes(argument, value)][::-1]


def _operands(value: ir.Value) -> list[ir.Value]:
    """What an elementwise operator that is no core makes ``value`` of, but for constants."""
    node = value.producer()
    if node is None or not _elementwise(node) or is_op(node, *_CORES):
        return []
    return [each for each in node.inputs if each is not None and each.const_value is None]


def _closes(argument: ir.Value, x: ir.Value) -> bool:
    """Whether ``argument`` is computed of ``x`` alone, within `_LEVELS`."""
    level = {argument} - {x}
    for _ in range(_LEVELS):
        operands = [_operands(value) for value in level]
        if not all(operands):
            return False
        level = {before for each in operands for before in each} - {x}
    return not level


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
    if not results:
        return None
    frames = -(-_GRID.size // max(size(x), 1))  # small values take the grid in parts
    grid = np.resize(_GRID, (frames, *shape))
    call = runner(model, {x: grid[0]}, results)
    values = [call({x: frame}) for frame in grid] if call else [None]
    if None in values:
        return None
    argument = grid.reshape(-1)[: _GRID.size].astype(np.float64)
    for y, *parts in zip(reversed(results), *map(reversed, values)):
        found = np.concatenate([part.reshape(-1) for part in parts])
        for name, function in FUNCTION.items() if found.dtype == np.float32 else ():
            if np.abs(found[: _GRID.size] - function(argument)).max() < 1e-5:
                return y, name
    return None


# Arguments on which functions are told apart: near, and beyond the limits of those that have some. Float32
# holds squares of the latter exactly.
_FAR = np.array([-100, -20, -12, 12, 20, 100], np.float32)
_GRID = np.concatenate([_FAR, np.linspace(-6, 6, 997, dtype=np.float32)])


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
