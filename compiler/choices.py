"""Inputs that are one integer for a whole run, such as the task of a multi-task model.

For each value that such an input may have, the model is loaded with the input replaced by it, so
that what it selects (a gate of several) folds to a constant. The variants go through the stages
beside one another; only constants may tell them apart.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from moeware.compiler.errors import CompileError

__all__ = ["Choices", "check_choices", "combinations", "describe", "require_alike", "substitute"]

Choices = Mapping[str, Sequence[int]]


def check_choices(choices: Choices) -> dict[str, list[int]]:
    """The choices with Python integers; raises `CompileError` for no, equal or other values."""
    checked = {}
    for name, values in choices.items():
        try:
            checked[name] = [operator.index(value) for value in values]
        except TypeError:
            checked[name] = []
        if not checked[name] or len(set(checked[name])) < len(checked[name]):
            raise CompileError(f"Choices of {name!r} must be one or more different integers, not "
                               f"{values!r}")
    return checked


def combinations(choices: Choices) -> list[dict[str, int]]:
    """Every choice of one value for each input, the first input's slowest; without choices one."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def describe(choice: Mapping[str, int]) -> str:
    """A choice in the words of an error."""
    return ", ".join(f"{name} = {value}" for name, value in choice.items())


def substitute(proto: onnx.ModelProto, choice: Mapping[str, int]) -> None:
    """Replace inputs of `proto` by constants.

    Raises
    ------
    CompileError
        There is no such input, or it is not one integer, or not one that holds the value.
    """
    inputs = {value.name: value for value in proto.graph.input}
    for name, value in choice.items():
        if name not in inputs:
            raise CompileError(f"Choice must be one of the model's inputs {list(inputs)}, not "
                               f"{name!r}")
        tensor = inputs[name].type.tensor_type
        dims = [dim.dim_value for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind not in "iu" or not tensor.HasField("shape") or dims not in ([], [1]):
            raise CompileError(
                f"Input {name!r} must be one integer, of shape [] or [1], to be a choice, not "
                f"{dtype} {dims}; export the model with torch.tensor(0) as its example")
        if not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            raise CompileError(f"Choices of {name!r} must be {dtype}, not {value}")
        proto.graph.input.remove(inputs[name])
        for default in [each for each in proto.graph.initializer if each.name == name]:
            proto.graph.initializer.remove(default)
        constant = np.full(dims, value, dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constant, name))


def require_alike(models: Sequence[ir.Model], choices: Sequence[Mapping[str, int]]) -> None:
    """That canonical graphs are the same up to constants.

    Raises
    ------
    CompileError
        They are not; says what differs.
    """
    first = list(models[0].graph)
    for model, choice in zip(models[1:], choices[1:]):
        def require(here: object, there: object, what: str) -> None:
            if here != there:
                raise CompileError(
                    f"{what} must be the same for all choices, not {there} for "
                    f"{describe(choices[0])} and {here} for {describe(choice)}; let the choice "
                    "select constants of one shape (gates[task])")
        nodes = list(model.graph)
        for node, other in zip(nodes, first):
            there = _form(other)
            for what, here in _form(node).items():
                require(here, there[what], f"{what} {other.name!r}")
        require(len(nodes), len(first), "Number of nodes")
        require([value.name for value in model.graph.outputs],
                [value.name for value in models[0].graph.outputs], "Outputs")


def _form(node: ir.Node) -> dict[str, object]:
    """What a node is, without its constants, in the words of an error."""
    inputs = [value if value is None
              else f"constant {value.shape}" if value.const_value is not None
              else value.name for value in node.inputs]
    return {"Operator of node": node.op_type, "Domain of node": node.domain, "Name of node": node.name,
            "Attributes of node": sorted((name, str(attribute.value))
                                         for name, attribute in node.attributes.items()),
            "Inputs of node": inputs,
            "Outputs of node": [f"{value.name} {value.shape}" for value in node.outputs]}
