"""Nodes and initializers of a lowered graph in the making."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

__all__ = ["Emitter", "array", "names"]


class Emitter:
    """Collects the nodes and initializers of the lowered graph, beside values named ``taken``."""

    def __init__(self, opset: int, taken: set[str]):
        self.opset, self.nodes = opset, []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._taken, self._numbers = taken, itertools.count(1)

    def name(self, wanted: str) -> str:
        """``wanted``, or a name like it where a value has that name."""
        name = wanted
        while name in self._taken:
            name = f"{wanted}/{next(self._numbers)}"
        self._taken.add(name)
        return name

    def share(self, value: ir.Value) -> None:
        """Carry an initializer over under its name."""
        if value.name not in self._tensors:
            assert value.const_value is not None and value.name is not None
            array = np.asarray(value.const_value.numpy())
            self._tensors[value.name] = numpy_helper.from_array(array, value.name)

    def constant(self, array: np.ndarray) -> str:
        """Name of a new initializer that holds ``array``."""
        name = self.name("constant")
        self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, *numbers: int) -> str:
        """Name of a new int64 vector."""
        return self.constant(np.array(numbers, np.int64))

    def tensors(self) -> list[onnx.TensorProto]:
        """All initializers."""
        return list(self._tensors.values())

    def drop_unused(self) -> None:
        """Forget weights that a lowering replaced by a rearranged copy."""
        used = {name for node in self.nodes for name in _names_read(node)}
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}

    def emit(self, operator: str, inputs: Sequence[str], output: str | None = None, **attrs) -> str:
        """Add a standard node and return the name of its output."""
        if output is None:
            output = self.name("lowered")
        self.nodes.append(helper.make_node(operator, inputs, [output], **attrs))
        return output


def names(node: ir.Node) -> list[str]:
    """Names of what ``node`` reads."""
    return [str(value.name) for value in node.inputs if value is not None]


def array(value: ir.Value | None) -> np.ndarray:
    """The constant that ``value`` is."""
    assert value is not None and value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _names_read(node: onnx.NodeProto) -> list[str]:
    inner = [
        name
        for attribute in node.attribute
        if attribute.HasField("g")
        for child in attribute.g.node
        for name in _names_read(child)
    ]
    return [*node.input, *inner]
