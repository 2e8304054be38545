"""Read half precision as float32, in which calibration and the host compute.

Each number of float16 and bfloat16 is one of float32, so weights keep their values; what the file
would round on the way is not rounded. PyTorch and NumPy want float32 at the inputs, too.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from moeware.compiler.simplify import refuse_contradictions, without_weights

__all__ = ["widen"]

_FLOAT, _HALF, _BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
# Attributes that name the type of a result or of what happens inside of a node.
_TYPES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")


def widen(model: ir.Model) -> None:
    """Make every float16 and bfloat16 of ``model`` a float32, in place.

    Raises ``CompileError`` for a node whose operands are of types that do not go together, which would
    no longer be seen.
    """
    if not any(_places(model, (_HALF, _BFLOAT))):
        return
    # bfloat16 as float16, as exporters write it for operators, too, that are defined without it.
    light = without_weights(model)
    _retype(light, (_BFLOAT,), _HALF)
    refuse_contradictions(light, strict=False)
    _retype(model, (_HALF, _BFLOAT), _FLOAT)


def _retype(model: ir.Model, old: Collection[ir.DataType], new: ir.DataType) -> None:
    values, attributes = _places(model, old)
    for value in values:
        value.dtype = new
        if value.const_value is not None:
            value.const_value = _converted(value.const_value, new)
    for node, attribute in attributes:
        name = attribute.name
        node.attributes[name] = (
            ir.AttrInt64(name, new)
            if attribute.type == ir.AttributeType.INT
            else ir.AttrTensor(name, _converted(attribute.value, new))
        )


def _places(
    model: ir.Model, types: Collection[ir.DataType]
) -> tuple[list[ir.Value], list[tuple[ir.Node, ir.Attr]]]:
    """Values of these types, constants, inputs and results, and attributes with one of them."""
    nodes = list(model.graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    for graph in (model.graph, *model.graph.subgraphs()):
        values += [*graph.inputs, *graph.initializers.values()]

    def has(attribute: ir.Attr) -> bool:
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.value.dtype in types
        return attribute.name in _TYPES and attribute.value in types

    attributes = [(node, each) for node in nodes for each in node.attributes.values() if has(each)]
    return [value for value in values if value.dtype in types], attributes


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    with np.errstate(over="ignore"):  # bfloat16 as float16, where only the type is looked at
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=tensor.name)
