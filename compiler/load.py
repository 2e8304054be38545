"""Read an ONNX file into a checked, folded graph of one frame (batch 1, every shape static)."""

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from moeware.compiler.bounds import is_random
from moeware.compiler.choices import describe, substitute
from moeware.compiler.contrib import expand_operators
from moeware.compiler.errors import CompileError
from moeware.compiler.functions import inline_functions
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.interface import Interface
from moeware.compiler.read import check_model, one_line, read_model
from moeware.compiler.simplify import simplify
from moeware.compiler.widen import widen

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")
_LAYOUTS = ("com.microsoft.nchwc", "com.ms.internal.nhwc")  # of ONNX Runtime's optimiser


def load(
    path: str | Path, choice: Mapping[str, int] | None = None, interface: Interface | None = None
) -> ir.Model:
    """Read, check and simplify the model at ``path`` (``.onnx`` or ONNX text ``.onnxtxt``).

    ``choice``: inputs that are replaced by a constant; ``interface``: what the file leaves open. Returns
    a graph with batch 1, unique names, local functions inlined, half precision widened, constants folded
    into initializers and common subexpressions merged.
    Raises ``CompileError`` for anything that cannot be compiled.
    """
    path = Path(path)
    try:
        proto = inline_functions(read_model(path))
        substitute(proto, choice or {})
        constants = (interface or Interface()).apply(proto)
        _check_layout(proto)
        expand_operators(proto)
        check_model(proto, path, constants)
        _forget_shapes(proto)
        model = ir.from_proto(proto)
        widen(model)
        simplify(model)
        _check_shapes(model)
        _check_types(model)
        _check_choice(model, choice or {})
        _check_dependence(model)
        return model
    except CompileError:
        raise
    except UnicodeDecodeError as error:
        raise CompileError(
            f"Model {path.name} must hold text in UTF-8, not {error.object[:40]!r}; copy or export "
            f"it again"
        ) from error
    except Exception as error:
        raise CompileError(
            f"Model {path.name} must be a valid ONNX graph, not one that fails with "
            f"{type(error).__name__}: {one_line(str(error))}; check it with onnx.checker and "
            f"export it again"
        ) from error


def _check_layout(proto: onnx.ModelProto) -> None:
    """Refuse tensors in the order that suits the vectors of one processor, which the file does not
    name."""
    for node in proto.graph.node:
        if node.domain in _LAYOUTS:
            raise CompileError(
                f"Node {node.name!r} ({node.domain}.{node.op_type}) must be portable, not laid out for "
                f"the processor that the file was optimised on; save it with "
                f"graph_optimization_level = ORT_ENABLE_EXTENDED, or give the file before that"
            )


def _check_types(model: ir.Model) -> None:
    """Refuse products in another precision than float32, as calibration and the host work in it,
    and values that are no tensors of numbers that NumPy and PyTorch have."""
    for node in model.graph:
        kind = node.inputs[0].dtype if node.op_type in _PRODUCTS and node.inputs[0] else None
        if kind not in (None, ir.DataType.FLOAT):
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must compute in FLOAT, not {kind.name}; export "
                f"the model in float32 (in PyTorch: model.float())"
            )
        for value in node.outputs:
            is_tensor = isinstance(value.type, ir.TensorType)
            if value.type is None or is_tensor and value.dtype.numpy().kind in "fiub":
                continue
            raise CompileError(
                f"Value {value.name!r} of node {node.name!r} ({node.op_type}) must be a tensor of "
                f"numbers, not {value.type}; leave the node out of the model"
            )


def _check_dependence(model: ir.Model) -> None:
    """Refuse nodes whose results are no function of the inputs."""
    variable = set(model.graph.inputs)
    for node in model.graph:
        if is_random(node):
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must give the same for the same inputs, not "
                f"random numbers; export the model in evaluation mode (in PyTorch: model.eval()), and "
                f"without what is random there, too, such as a mask"
            )
        if not variable.intersection(inputs_of(node)):
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must read an input of the model or be a "
                f"constant that can be computed, not fail to be one; repair its operands"
            )
        variable.update(node.outputs)


def _check_choice(model: ir.Model, choice: Mapping[str, int]) -> None:
    """Refuse a choice that selects nothing: what it selects has folded to a constant."""
    for node in model.graph:
        constant = all(value is None or value.const_value is not None for value in node.inputs)
        if choice and node.op_type.startswith("Gather") and constant:
            raise CompileError(
                f"Choice {describe(choice)} must be an index into the constant of shape "
                f"{node.inputs[0].shape} that node {node.name!r} ({node.op_type}) selects from, not "
                f"one beyond it; leave it out"
            )


def _forget_shapes(proto: onnx.ModelProto) -> None:
    """Shapes recorded for the exported batch are stale; inference writes them anew."""
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")


def _check_shapes(model: ir.Model) -> None:
    """Refuse values without elements, and outputs that nothing computes."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and any(
                isinstance(size, int) and size <= 0 for size in value.shape
            ):
                raise CompileError(
                    f"Value {value.name!r} of node {node.name!r} must have elements, not shape "
                    f"{list(value.shape)}; remove the empty slice and export again"
                )
    for value in model.graph.outputs:
        if value.is_graph_input() or value.is_initializer():
            raise CompileError(
                f"Graph output {value.name!r} must be computed, not be an input or a constant; "
                f"remove it from the model"
            )
