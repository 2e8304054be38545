"""Read an ONNX file into a checked, folded graph of one frame (batch 1, every shape static).

The batch axis of a model is the frame axis: every later stage sees one frame, and running
several frames repeats the graph. So the first axis of each graph input is fixed to 1 here.
"""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer

from moeware.compiler.bounds import check_sizes, is_foldable, weight_elements
from moeware.compiler.choices import describe, substitute
from moeware.compiler.errors import CompileError
from moeware.compiler.functions import inline_functions
from moeware.compiler.fuse.contrib_moe import infer_contrib_shapes
from moeware.compiler.fuse.moe import refuse_baked_counts
from moeware.compiler.fuse.region import inputs_of, run
from moeware.compiler.read import check_model, one_line, read_model

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")

_NODE_OF_FOLDING = re.compile(r"for node '(.*?)' \(.*::(.*)\)")
# What folding could not compute is left in the graph, or refused with the name of the node.
for package in ("onnx_ir", "onnxscript"):
    logging.getLogger(package).setLevel(logging.ERROR)

_CONTROL = ("If", "Loop", "Scan")
_FOLDING_ROUNDS = 8
_LARGE_CONSTANT = 100  # elements; shape inference reads the values of smaller ones

# The reason ends where that of a node that reads its result begins.
_NODE_OF_INFERENCE = re.compile(
    r"\(op_type:(.*?), node name: (.*?)\): (?:\[\w+\] )*(.*?)(?:\s*\(op_type:|$)", re.DOTALL
)


def load(path: str | Path, choice: Mapping[str, int] | None = None) -> ir.Model:
    """Read, check and simplify the model at ``path`` (``.onnx`` or ONNX text ``.onnxtxt``).

    ``choice``: inputs that are replaced by a constant. Returns a graph with batch 1, unique names,
    local functions inlined, constants folded into initializers and common subexpressions merged.
    Raises ``CompileError`` for anything that cannot be compiled.
    """
    path = Path(path)
    try:
        proto = inline_functions(read_model(path))
        substitute(proto, choice or {})
        _fix_batch(proto)
        check_model(proto, path)
        _forget_shapes(proto)
        model = _simplify(proto)
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


def _fix_batch(proto: onnx.ModelProto) -> None:
    initializers = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in initializers:
            continue
        if not value.type.tensor_type.HasField("shape") or not value.type.tensor_type.shape.dim:
            raise CompileError(
                f"Graph input {value.name!r} must have a shape whose first axis is the batch; "
                f"export with example inputs of fixed size, or name the values of an integer that "
                f"is chosen per run (--choices {value.name}=0,1)"
            )
        batch, *rest = value.type.tensor_type.shape.dim
        if batch.HasField("dim_value") and batch.dim_value != 1:
            raise CompileError(
                f"Batch axis of graph input {value.name!r} must be dynamic or 1, not "
                f"{batch.dim_value}; export with a batch of one frame"
            )
        batch.Clear()
        batch.dim_value = 1
        for axis, dimension in enumerate(rest, start=1):
            if not dimension.HasField("dim_value"):
                raise CompileError(
                    f"Axis {axis} of graph input {value.name!r} must be fixed, not dynamic "
                    f"({dimension.dim_param or 'unnamed'}); only the batch axis may be dynamic: "
                    f"export without dynamic_axes for it"
                )
            if dimension.dim_value <= 0:
                raise CompileError(
                    f"Axis {axis} of graph input {value.name!r} must be positive, not "
                    f"{dimension.dim_value}; export with a non-empty example input"
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


def _is_random(node: ir.Node) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


def _check_dependence(model: ir.Model) -> None:
    """Refuse nodes whose results are no function of the inputs."""
    variable = set(model.graph.inputs)
    for node in model.graph:
        if _is_random(node):
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must give the same for the same inputs, not "
                f"random numbers; export the model in evaluation mode (in PyTorch: model.eval())"
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


def _simplify(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    passes.NameFixPass()(model)
    weights = weight_elements(model)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    check_sizes(model, weights)

    def is_small(node: ir.Node) -> bool | None:
        return None if is_foldable(node, weights) else False

    # Each round may fix a shape that lets the next one fold the nodes that read it.
    for _ in range(_FOLDING_ROUNDS):
        infer_contrib_shapes(model)
        try:
            onnxscript.optimizer.optimize_ir(
                model,
                input_size_limit=sys.maxsize,
                output_size_limit=sys.maxsize,
                should_fold=is_small,
            )
        except ir.passes.PassError as error:
            raise _not_folded(error) from error
        _register_constants(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.NameFixPass()(model)
        if not _fold_constants(model, weights):
            break
    passes.IdentityEliminationPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
    refuse_baked_counts(model)
    _infer_shapes(model)
    check_sizes(model, weights)
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
    return model


def _not_folded(error: Exception) -> Exception:
    """An error of the optimizer: the reason is at the end of its chain, the node in the middle."""
    node = None
    while error.__cause__:
        error = error.__cause__
        node = node or _NODE_OF_FOLDING.search(str(error))
    if node is None:
        return error
    return CompileError(
        f"Node {node[1]!r} ({node[2]}) must have operands and attributes that fit together, not fail "
        f"folding with {one_line(str(error))}; repair the node or export the model again"
    )


def _infer_shapes(model: ir.Model) -> None:
    """Give every value its shape; refuse a node whose operands and attributes contradict.

    The pass swallows the reason why inference fails, so the graph is looked at before, without the
    weights, which do not matter to it. No propagation of data: folding has done that, and it
    takes memory for each element of a vector.
    """
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is None or value.const_value.size > _LARGE_CONSTANT:
            del light.graph.initializers[name]
            light.graph.inputs.append(value)
    try:
        onnx.shape_inference.infer_shapes(
            ir.to_proto(light), check_type=True, strict_mode=True
        )
    except onnx.shape_inference.InferenceError as error:
        operator, name, reason = _NODE_OF_INFERENCE.search(str(error)).groups()
        raise CompileError(
            f"Node {name!r} ({operator}) must have operands and attributes that fit together, not "
            f"fail shape inference with: {one_line(reason)}; repair the node or export the model "
            f"again"
        ) from error
    passes.ShapeInferencePass(data_prop=False)(model)


def _register_constants(model: ir.Model) -> None:
    """Register constants that the optimizer's rewrites made under names already in use."""
    known = set(model.graph.initializers.values())
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.const_value is None or value in known:
                continue
            if value.producer() is not None or value.is_graph_input():
                continue
            number = len(model.graph.initializers)
            while f"constant_{number}" in model.graph.initializers:
                number += 1
            value.name = f"constant_{number}"
            model.graph.register_initializer(value)
            known.add(value)


def _fold_constants(model: ir.Model, weights: int) -> bool:
    """Compute what depends on no graph input and is not folded yet; whether there was any.

    The optimizer leaves operators such as ConstantOfShape and Range.
    """
    variable: set[ir.Value] = set(model.graph.inputs)
    ready: list[ir.Value] = []
    for node in model.graph:
        stays = node.op_type in _CONTROL or _is_random(node) or not is_foldable(node, weights)
        if stays or any(value in variable for value in inputs_of(node)):
            variable.update(node.outputs)
    for node in model.graph:
        for value in node.outputs:
            readers = value.consumers()
            read = any(set(reader.outputs) & variable for reader in readers)
            if value not in variable and (read or value.is_graph_output()):
                ready.append(value)
    arrays = run(model, {}, ready) if ready else None
    if arrays is None:
        return False
    for value, array in zip(ready, arrays):
        folded = ir.val(f"{value.name}_folded", const_value=ir.tensor(array))
        folded.dtype, folded.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(folded)
        value.replace_all_uses_with(folded)
    passes.RemoveUnusedNodesPass()(model)
    return True
