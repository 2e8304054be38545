"""What the kinds of damage share: their register, and ways into a model."""

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Damage = Callable[[onnx.ModelProto, random.Random], "bytes | None"]

EXTREMES = (-(2**63), -(2**31) - 1, -7, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
HUGE = (2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1)
KINDS: dict[str, Damage] = {}


class Unfit(Exception):
    """The model has nothing that this kind of damage breaks."""


def damage(function: Damage) -> Damage:
    """Register a kind under its name."""
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def pick(draw: random.Random, items):
    items = list(items)
    if not items:
        raise Unfit
    return draw.choice(items)


def attributes(model, *types):
    found = [entry for node in model.graph.node for entry in node.attribute]
    return [entry for entry in found if entry.type in types or not types]


def edges(model):
    """(node, index) of every operand that is computed or a graph input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    return [(node, index) for node in model.graph.node for index, name in enumerate(node.input)
            if name and name not in constants]


def integers(model):
    """int64 constants, as initializers and as Constant nodes."""
    tensors = [*model.graph.initializer, *(entry.t for entry in attributes(model)
                                           if entry.type == onnx.AttributeProto.TENSOR)]
    return [tensor for tensor in tensors if tensor.data_type == TensorProto.INT64]


def weights(model):
    return [tensor for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims)]


def assign(tensor, array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def constant(model, values, dtype=np.int64) -> str:
    name = f"extra_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
    return name


def prepend(model, draw, nodes, result: str) -> None:
    """Put ``nodes`` before all others and add ``result`` to an operand of one of them."""
    node, index = pick(draw, edges(model))
    place = list(model.graph.node).index(node)
    after = [onnx.NodeProto.FromString(each.SerializeToString()) for each in model.graph.node]
    after.insert(place, helper.make_node("Add", [node.input[index], result], ["extra_sum"]))
    after[place + 1].input[index] = "extra_sum"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *after])


def reduced(model, name: str) -> list[onnx.NodeProto]:
    """Nodes that make one number ``extra_one`` of ``name``."""
    axes = constant(model, [-1])
    return [helper.make_node("Reshape", [name, axes], ["extra_flat"]),
            helper.make_node("Gather", ["extra_flat", constant(model, 0)], ["extra_one"])]
