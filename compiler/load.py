"""Read an ONNX file into a checked, folded graph of one frame (batch 1, every shape static).

The batch axis of a model is the frame axis: every later stage sees one frame, and running
several frames repeats the graph. So the first axis of each graph input is fixed to 1 here.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
from google.protobuf.message import DecodeError

from moeware.compiler.choices import describe, substitute
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.moe import refuse_baked_counts
from moeware.compiler.fuse.region import inputs_of, run
from moeware.compiler.qdq import take_out

OPSETS = range(17, 25)

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")

# Folding limits: large enough for every weight that a transformer folds (transposes, casts).
_FOLD_ELEMENTS = 1 << 28


def load(path: str | Path, choice: Mapping[str, int] | None = None) -> ir.Model:
    """Read, check and simplify the model at ``path`` (``.onnx`` or ONNX text ``.onnxtxt``).

    ``choice``: inputs that are replaced by a constant. Returns a graph with batch 1, unique names, constants folded into initializers and common
    subexpressions merged. Raises ``CompileError`` for anything that cannot be compiled.
    """
    path = Path(path)
    try:
        proto = _read(path)
        _check_opset(proto)
        _load_external_data(proto, path)
        substitute(proto, choice or {})
        _fix_batch(proto)
        _check_proto(proto, path)
        _check_weights(proto)
        _forget_shapes(proto)
        model = _simplify(proto)
        _check_precision(model)
        _check_choice(model, choice or {})
        return model
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(
            f"Model {path.name} must be a valid ONNX graph, not one that fails with "
            f"{type(error).__name__}: {_first_line(error)}; check it with onnx.checker and "
            f"export it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise CompileError(f"Model file must exist, not {str(path)!r}; check the path")
    head = path.read_bytes()[:1]
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (DecodeError, onnx.parser.ParseError, UnicodeDecodeError) as error:
        # A ModelProto starts with field 1 (ir_version, varint), which is the byte 0x08.
        truncated = path.suffix == ".onnx" and head == b"\x08"
        raise CompileError(
            f"Model {path.name} must be a complete ONNX file, not one that is "
            f"{'truncated or damaged' if truncated else 'in another format'} "
            f"({_first_line(error)}); {'copy or ' if truncated else ''}export it again"
        ) from error
    if not proto.ir_version or not proto.graph.node and not proto.graph.output:
        raise CompileError(
            f"Model {path.name} must be an ONNX file with a graph, not {head!r}…; "
            f"export it with torch.onnx.export"
        )
    return proto


def _check_opset(proto: onnx.ModelProto) -> None:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    for version in versions or [0]:
        if version not in OPSETS:
            raise CompileError(
                f"Opset of ai.onnx must be between {OPSETS[0]} and {OPSETS[-1]}, not {version}; "
                f"export with opset_version={OPSETS[3]} or use onnx.version_converter"
            )


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        if not (path.parent / location).is_file():
            raise CompileError(
                f"External data of initializer {tensor.name!r} must be beside the model, but "
                f"{location!r} is missing; copy it into the folder of {path.name}"
            )
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise CompileError(
                f"External data of initializer {tensor.name!r} must be readable from "
                f"{location!r}, not fail with {_first_line(error)}; copy the file again"
            ) from error


def _check_proto(proto: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise CompileError(
            f"Model {path.name} must pass the ONNX checker, not fail with: "
            f"{_first_line(error)}; repair the graph or export it again"
        ) from error


def _check_weights(proto: onnx.ModelProto) -> None:
    """Refuse non-finite and empty weights. A mask of minus infinities is not a weight."""
    readers: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if not np.issubdtype(array.dtype, np.floating):
            continue
        if array.size == 0 and readers.get(tensor.name, set()) - {"Resize"}:
            raise CompileError(
                f"Initializer {tensor.name!r} must have elements, not shape {array.shape}; "
                f"remove the empty layer and export again"
            )
        finite = array[np.isfinite(array)]
        is_mask = not np.isnan(array).any() and (finite.size == 0 or np.ptp(finite) == 0)
        if finite.size != array.size and not is_mask:
            kind = "NaN" if np.isnan(array).any() else "infinite"
            raise CompileError(
                f"Initializer {tensor.name!r} must be finite, not hold "
                f"{array.size - finite.size} {kind} values; repair the checkpoint"
            )


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


def _check_precision(model: ir.Model) -> None:
    """Refuse products in another precision than float32, as calibration and the host work in it."""
    for node in model.graph:
        kind = node.inputs[0].dtype if node.op_type in _PRODUCTS and node.inputs[0] else None
        if kind not in (None, ir.DataType.FLOAT):
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must compute in FLOAT, not {kind.name}; export "
                f"the model in float32 (in PyTorch: model.float())"
            )


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
    take_out(model)
    # Each round may fix a shape that lets the next one fold the nodes that read it.
    for _ in range(3):
        onnxscript.optimizer.optimize_ir(
            model, input_size_limit=_FOLD_ELEMENTS, output_size_limit=_FOLD_ELEMENTS
        )
        _register_constants(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.NameFixPass()(model)
        if not _fold_constants(model):
            break
    passes.IdentityEliminationPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
    inferred = passes.ShapeInferencePass()(model).model
    refuse_baked_counts(inferred)
    if any(value.shape is None for value in inferred.graph.outputs):
        # The pass swallows the reason why inference failed; the strict mode raises it.
        onnx.shape_inference.infer_shapes(ir.to_proto(inferred), strict_mode=True)
    for node in inferred.graph:
        for value in node.outputs:
            if value.shape is not None and any(size == 0 for size in value.shape):
                raise CompileError(
                    f"Value {value.name!r} of node {node.name!r} must have elements, not shape "
                    f"{list(value.shape)}; remove the empty slice and export again"
                )
    for value in inferred.graph.outputs:
        if value.is_graph_input() or value.is_initializer():
            raise CompileError(
                f"Graph output {value.name!r} must be computed, not be an input or a constant; "
                f"remove it from the model"
            )
    return inferred


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


def _fold_constants(model: ir.Model) -> bool:
    """Compute what depends on no graph input and is not folded yet; whether there was any.

    The optimizer leaves operators such as ConstantOfShape and Range.
    """
    variable: set[ir.Value] = set(model.graph.inputs)
    ready: list[ir.Value] = []
    for node in model.graph:
        random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
        if random or any(value in variable for value in inputs_of(node)):
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
