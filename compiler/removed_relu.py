"""Put back the ReLUs that a quantiser took out, as integers whose least one stands for 0 saturate there.

onnxruntime's does so wherever activations have a zero point.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from moeware.compiler.fuse.trace import operand

__all__ = ["restore_relus"]

# The least number that operators give; what is in no list is taken to give none below 0.
_LEAST = {"Erf": -1.0, "Tanh": -1.0, "Sin": -1.0, "Cos": -1.0, "Gelu": -0.2} | dict.fromkeys(
    ("Neg", "Sub", "Log", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
     "SkipLayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    -np.inf)  # fmt: skip
_SUMS = ("Add", "Sum")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum", "Mul", "Div")
_ONE_OF = ("Concat", "Where", "Max", "Mean")
# Their results are among the numbers that they read first, or between those; rounding is left out.
_AMONG_FIRST = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Gather", "GatherND",
    "GatherElements", "Slice", "Split", "Expand", "ReduceMean", "ReduceMax", "MaxPool",
    "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
_SIGN_OF_FIRST = (
    "Cast", "ReduceSum", "AveragePool", "GlobalAveragePool", "Dropout", "Pad", "LeakyRelu", "PRelu",
    "Elu", "Min", "Pow",
)  # fmt: skip


def restore_relus(model: ir.Model, cut: Collection[ir.Node]) -> None:
    """Insert a Relu before each QuantizeLinear in ``cut``, whose least integer stands for 0, if numbers
    below 0 may come to it from another node."""
    least: dict[ir.Value, float] = dict.fromkeys(model.graph.inputs, -np.inf)
    for node in list(model.graph):
        first = operand(node, 0)
        if node not in cut:
            least |= dict.fromkeys(node.outputs, _least(node, least))
        elif least.get(first, 0.0) < 0 and not (first.is_graph_input() or first.is_graph_output()):
            _insert(model, node, first)


def _least(node: ir.Node, least: dict[ir.Value, float]) -> float:
    """The least number that a node may give, -inf for any below 0 where it is not told."""
    first, second = operand(node, 0), operand(node, 1)
    reads = [_bound(value, least) for value in node.inputs if value is not None]
    if node.op_type in _SUMS:
        return sum(reads)
    even = node.op_type == "Pow" and _bound(second, least) % 2 != 1
    if even or node.op_type == "Mul" and _plain(first) is _plain(second):
        return 0.0
    if node.op_type in _AMONG_FIRST:
        return reads[0]
    if node.op_type in _SIGN_OF_FIRST:
        reads = reads[:1]
    elif node.op_type not in (*_PRODUCTS, *_ONE_OF):
        return _LEAST.get(node.op_type, 0.0)
    return -np.inf if min(reads, default=0.0) < 0 else 0.0


def _bound(value: ir.Value, least: dict[ir.Value, float]) -> float:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype is ir.DataType.STRING or not tensor.size:
        return least.get(value, 0.0)
    return float(tensor.numpy().min())


def _plain(value: ir.Value | None) -> ir.Value | None:
    """What a pair of quantisation was made of."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def _insert(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    relu = ir.node("Relu", [value], name=f"{node.name}_relu")
    result, name = relu.outputs[0], value.name
    result.name, value.name = name, f"{name}_signed"  # the file calls the result so
    result.dtype, result.shape = value.dtype, value.shape
    model.graph.insert_before(node, relu)
    node.replace_input_with(0, result)
