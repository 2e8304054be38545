"""Take QuantizeLinear and DequantizeLinear out of a model, so that the rules of `fuse` see the float
model that was quantised; what they say is kept (`kept`).

A dequantised constant becomes a float initializer, scale * (integer - zero point) as ONNX Runtime
computes it. A pair around an activation goes, and leaves its grid with the value. Layout operators
may stand between its two halves, as they do where integers flow from operator to operator. What is
no pair of known scales (dynamic quantisation, integer products) stays, and runs on the host.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.region import inputs_of, run
from moeware.compiler.fuse.trace import attribute, operand
from moeware.compiler.kept import Grid, Kept
from moeware.compiler.nbits import expand_nbits
from moeware.compiler.qoperator import expand_qoperators
from moeware.compiler.removed_relu import restore_relus

__all__ = ["take_out"]

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_SAME = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_LAYOUT = (*_SAME, "Gather", "GatherND", "Slice", "Split", "Expand", "Clip")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")
_BLOCKED = "blocks of weights have scales of their own, a channel of the accelerator has one"
_WIDE = "a constant of the residual stream, of a norm or of a bias, which has 16 bits or more"
_AXIS = "a scale for each channel of an activation, which has one"
_SECOND = "its tensor is on another grid of the file already"
_TYPE = "numbers of {}, where the accelerator has int8"


def take_out(model: ir.Model) -> None:
    """Take all pairs of known scales out of the main graph; see above.

    Their scales are in the metadata of the model, for `Kept.of`.
    """
    expand_qoperators(model)
    kept = Kept(lost=dict.fromkeys(expand_nbits(model), _BLOCKED))
    kept.write(model)
    if not any(_is(node, "QuantizeLinear", "DequantizeLinear") for node in model.graph):
        return
    grids: dict[ir.Value, Grid] = {}
    for node in list(model.graph):
        if _is(node, "DequantizeLinear"):
            _move_up(model, node)
    variable = _variable(model)
    for node in list(model.graph):
        if _is(node, "DequantizeLinear") and node.inputs[0] not in variable:
            _constant(model, node, kept)
    restore_relus(model, {node for node in model.graph if _starts_at_zero(model, node)})
    variable = _variable(model)
    for node in list(model.graph):
        if _is(node, "QuantizeLinear") and node.inputs[0] in variable:
            _pair(model, node, grids, kept)
    passes.RemoveUnusedNodesPass()(model)
    for value in list(grids):
        _move_back(value, grids, kept)
    kept.grids = {str(value.name): grid for value, grid in grids.items()}
    kept.write(model)


def _is(node: ir.Node | None, *operators: str) -> bool:
    return node is not None and node.domain in _DOMAINS and node.op_type in operators


def _variable(model: ir.Model) -> set[ir.Value]:
    """Values that depend on a graph input."""
    found: set[ir.Value] = set(model.graph.inputs)
    for node in model.graph:
        if any(value in found for value in inputs_of(node)):
            found.update(node.outputs)
    return found


def _move_up(model: ir.Model, node: ir.Node) -> None:
    """Dequantise a stored tensor before parts of it are chosen, not after that."""
    integers, chain = node.inputs[0], []
    while _is(integers.producer(), *_SAME, "Gather", "GatherND", "Slice", "Expand"):
        if len(integers.uses()) != 1 or integers.is_graph_output():
            return
        chain.append(integers.producer())
        integers = chain[-1].inputs[0]
    scale = _array(model, node.inputs[1])
    fixed = integers.const_value is not None and not integers.is_graph_input()
    if not chain or not fixed or scale is None or scale.size != 1 or node.outputs[0].is_graph_output():
        return
    whole = ir.node("DequantizeLinear", [integers, *node.inputs[1:]], domain=node.domain,
                    name=f"{node.name}_whole")
    whole.outputs[0].name = f"{node.outputs[0].name}_whole"
    whole.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.insert_before(chain[-1], whole)
    chain[-1].replace_input_with(0, whole.outputs[0])
    for each in chain:
        each.outputs[0].dtype = ir.DataType.FLOAT
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def _constant(model: ir.Model, node: ir.Node, kept: Kept) -> None:
    """A dequantised constant: a float initializer in its place."""
    output, name = node.outputs[0], _stored_name(node.inputs[0])
    arrays = run(model, {}, [output])
    scales = _array(model, node.inputs[1])
    if arrays is None or scales is None or arrays[0].dtype != np.float32:
        return
    _check(node, scales)
    if _integers(node) is ir.DataType.INT32:
        pass  # a bias has the scale of its product
    elif attribute(node, "block_size", 0):
        kept.lost[name] = _BLOCKED
    elif any(_is(reader, *_PRODUCTS) for reader in _readers(output)):
        kept.weights[name] = sorted({*kept.weights.get(name, []), *scales.ravel().tolist()})
    else:
        kept.lost[name] = _WIDE
    number = len(model.graph.initializers)
    while f"dequantised_{number}" in model.graph.initializers:
        number += 1
    tensor = ir.tensor(np.ascontiguousarray(arrays[0]), name=f"dequantised_{number}")
    value = ir.val(tensor.name, const_value=tensor, dtype=ir.DataType.FLOAT, shape=tensor.shape)
    model.graph.register_initializer(value)
    output.replace_all_uses_with(value)


def _check(node: ir.Node, scales: np.ndarray) -> None:
    # Where blocks have scales, quantisers let the sign say which end of the integers is the larger one.
    signed = attribute(node, "block_size", 0) > 0
    if not (np.isfinite(scales) & (signed | (scales > 0))).all():
        raise CompileError(
            f"Scale of node {node.name!r} ({node.op_type}) must be {'' if signed else 'positive and '}"
            f"finite, not {scales.min()}; quantise the model again, without what holds a mask of infinities"
        )


def _stored_name(value: ir.Value) -> str:
    """The tensor of the file that a constant is made of."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    return str(value.name)


def _array(model: ir.Model, value: ir.Value | None) -> np.ndarray | None:
    """A value that no input changes."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    arrays = run(model, {}, [value])
    return None if arrays is None else arrays[0]


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a value or what layout operators make of it."""
    for node in value.consumers():
        if _is(node, *_LAYOUT) and node.inputs[0] is value:
            for output in node.outputs:
                yield from _readers(output)
        else:
            yield node


def _integers(node: ir.Node) -> ir.DataType | None:
    """Type of the integers that a node quantises to or dequantises."""
    if node.op_type == "DequantizeLinear" and node.inputs[0].dtype is not None:
        return node.inputs[0].dtype
    zero = operand(node, 2)
    if zero is not None:
        kind = zero.dtype or (zero.const_value and zero.const_value.dtype)
        producer = zero.producer()
        return kind or (producer and _made_type(producer))
    kind = attribute(node, "output_dtype", 0)
    return ir.DataType(kind) if kind else ir.DataType.UINT8


def _made_type(node: ir.Node) -> ir.DataType | None:
    """Type that a Cast or a Constant makes."""
    if node.op_type == "Cast":
        return ir.DataType(attribute(node, "to", 0))
    tensor = attribute(node, "value", None)
    return None if tensor is None else tensor.dtype


def _pair(model: ir.Model, node: ir.Node, grids: dict[ir.Value, Grid], kept: Kept) -> None:
    """A QuantizeLinear and each DequantizeLinear that reads its integers."""
    source, integers = node.inputs[0], node.outputs[0]
    ends: list[ir.Node] = []
    between: list[ir.Node] = []
    scale, zero = _array(model, node.inputs[1]), _zero(model, node)
    if scale is None or zero is None or not _find_ends(integers, ends, between):
        return
    for end in ends:
        other = _array(model, end.inputs[1]), _zero(model, end)
        if not (np.array_equal(scale, other[0]) and np.array_equal(zero, other[1])):
            return
    outputs = [end for end in ends if end.outputs[0].is_graph_output()]
    if len(outputs) > 1 or outputs and (source.is_graph_input() or source.is_graph_output()):
        return
    limits = [[_array(model, operand(clip, place)) for place in (1, 2)]
              for clip in between if clip.op_type == "Clip"]
    if any(limit is None for pair in limits for limit in pair):
        return
    _check(node, scale)
    name = str(source.name)
    for each in between:
        if each.op_type == "Clip":
            each.outputs[0].replace_all_uses_with(each.inputs[0])
        for value in each.outputs:
            value.dtype, value.shape = ir.DataType.FLOAT, None
    integers.replace_all_uses_with(source)
    for end in ends:
        old, new = end.outputs[0], end.inputs[0]
        given = old.name if end in outputs else new.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if end in outputs:  # the model's output keeps its name
            old.name, new.name = new.name, given
    _keep(node, name, scale, zero, limits, grids, kept)


def _find_ends(integers: ir.Value, ends: list[ir.Node], between: list[ir.Node]) -> bool:
    """Collect the nodes that dequantise a value, and the layout operators in between; whether
    nothing else reads it."""
    if integers.is_graph_output():
        return False
    for node in integers.consumers():
        if _is(node, "DequantizeLinear") and node.inputs[0] is integers:
            ends.append(node)
        elif _is(node, *_LAYOUT) and node.inputs[0] is integers:
            between.append(node)
            if not all(_find_ends(output, ends, between) for output in node.outputs):
                return False
        else:
            return False
    return True


def _zero(model: ir.Model, node: ir.Node) -> np.ndarray | None:
    zero = operand(node, 2)
    return np.zeros((), np.uint8) if zero is None else _array(model, zero)


def _starts_at_zero(model: ir.Model, node: ir.Node) -> bool:
    """Whether a node quantises to integers of which the least stands for 0. Where all samples were 0,
    onnxruntime's quantiser writes the scale 1 and zero point 0, which says nothing."""
    if not _is(node, "QuantizeLinear"):
        return False
    scale, zero, kind = _array(model, node.inputs[1]), _zero(model, node), _integers(node)
    if scale is None or zero is None or kind not in _RANGES or (scale == 1).all():
        return False
    return bool((zero == _RANGES[kind][0]).all())


def _keep(node, name, scale, zero, limits, grids: dict[ir.Value, Grid], kept: Kept) -> None:
    """Note the grid of what `node` quantises, which the file calls `name`."""
    source, kind = node.inputs[0], _integers(node)
    if source.producer() is not None:
        kept.places[name] = str(source.producer().name)
    if scale.size != 1:
        kept.lost[name] = _AXIS
    elif kind not in _RANGES:
        kept.lost[name] = _TYPE.format(kind.name if kind else "an unknown type")
    else:
        low, high = _RANGES[kind]
        for least, most in limits:
            low, high = max(low, int(least)), min(high, int(most))
        zero = int(zero.reshape(()))
        grid = Grid((name,), float(scale.reshape(())), low - zero, high - zero)
        if not _join(source, grid, grids):
            kept.lost[name] = _SECOND


_RANGES = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255), ir.DataType.INT4: (-8, 7),
           ir.DataType.UINT4: (0, 15)}


def _join(value: ir.Value, grid: Grid, grids: dict[ir.Value, Grid]) -> bool:
    """Give a value a grid, unless it has another one; whether it has this one then."""
    before = grids.get(value, grid)
    if dataclasses.replace(before, names=grid.names) != grid:
        return False
    grids[value] = before.joined(grid)
    return True


def _move_back(value: ir.Value, grids: dict[ir.Value, Grid], kept: Kept) -> None:
    """A grid holds for the values, too, that layout operators have made this one of."""
    grid, node, chain = grids[value], value.producer(), [value]
    while _is(node, *_SAME) and node.inputs[0] is not None:
        chain.append(node.inputs[0])
        if not _join(chain[-1], grid, grids):
            kept.lost |= dict.fromkeys(grid.names, _SECOND)
            break
        grid, node = grids[chain[-1]], chain[-1].producer()
        grids |= dict.fromkeys(chain, grid)
