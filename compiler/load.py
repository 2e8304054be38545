"""Read an ONNX file into a checked, folded graph of one frame (batch 1, every shape static).

The batch axis of a model is the frame axis: every later stage sees one frame, and running
several frames repeats the graph. So the first axis of each graph input is fixed to 1 here.
"""

import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
from google.protobuf.message import DecodeError

from moeware.compiler.bounds import check_sizes, is_foldable, weight_elements
from moeware.compiler.choices import describe, substitute
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.moe import refuse_baked_counts
from moeware.compiler.fuse.region import inputs_of, run

OPSETS = range(17, 25)

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")

_CONTROL = ("If", "Loop", "Scan")
_FOLDING_ROUNDS = 8
_LARGE_CONSTANT = 100  # elements; shape inference reads the values of smaller ones

# The reason ends where that of a node that reads its result begins.
_NODE_OF_INFERENCE = re.compile(
    r"\(op_type:(.*?), node name: (.*?)\): (?:\[\w+\] )*(.*?)(?:\s*\(op_type:|$)", re.DOTALL
)


def load(path: str | Path, choice: Mapping[str, int] | None = None) -> ir.Model:
    """Read, check and simplify the model at ``path`` (``.onnx`` or ONNX text ``.onnxtxt``).

    ``choice``: inputs that are replaced by a constant. Returns a graph with batch 1, unique names, constants folded into initializers and common
    subexpressions merged. Raises ``CompileError`` for anything that cannot be compiled.
    """
    path = Path(path)
    try:
        proto = _read(path)
        _name_nodes(proto.graph)
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


def _one_line(message: str) -> str:
    """A message of several lines, of which a later one may name the node."""
    return textwrap.shorten(message.replace("==> Context: ", ""), 400, placeholder=" …")


def _name_nodes(graph: onnx.GraphProto) -> None:
    """So that every error can name its node; text models, for example, have no names."""
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _name_nodes(inner)


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


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The constants of a graph: initializers, attributes, those of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not os.path.isfile(path.parent / location):
            raise CompileError(
                f"External data of initializer {tensor.name!r} must be beside the model, but "
                f"{location!r} is missing; copy it into the folder of {path.name}"
            )
        try:
            _check_length(tensor, entries, (path.parent / location).stat().st_size)
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise CompileError(
                f"External data of initializer {tensor.name!r} must be readable from "
                f"{location!r}, not fail with {_first_line(error)}; copy the file again"
            ) from error


def _check_length(tensor: onnx.TensorProto, entries: Mapping[str, str], file_bytes: int) -> None:
    """Refuse, before they are read, bytes of another number than the tensor's shape takes."""
    needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
    offset = int(entries.get("offset") or 0)
    given = int(entries.get("length") or file_bytes - offset)
    if given != needed or offset + given > file_bytes:
        raise ValueError(
            f"bytes {offset} to {offset + given} of a file of {file_bytes} for the shape "
            f"{list(tensor.dims)}, which takes {needed}"
        )


def _check_proto(proto: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise CompileError(
            f"Model {path.name} must pass the ONNX checker, not fail with: "
            f"{_one_line(str(error))}; repair the graph or export it again"
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
    weights = weight_elements(model)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    check_sizes(model, weights)

    def is_small(node: ir.Node) -> bool | None:
        return None if is_foldable(node, weights) else False

    # Each round may fix a shape that lets the next one fold the nodes that read it.
    for _ in range(_FOLDING_ROUNDS):
        onnxscript.optimizer.optimize_ir(
            model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize, should_fold=is_small
        )
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
            if value.shape is not None and any(size == 0 for size in value.shape):
                raise CompileError(
                    f"Value {value.name!r} of node {node.name!r} must have elements, not shape "
                    f"{list(value.shape)}; remove the empty slice and export again"
                )
    names = [value.name for value in model.graph.outputs]
    for value in model.graph.outputs:
        if names.count(value.name) > 1:
            raise CompileError(
                f"Graph output {value.name!r} must be listed once, not {names.count(value.name)} "
                f"times; remove the others from the model"
            )
        if value.is_graph_input() or value.is_initializer():
            raise CompileError(
                f"Graph output {value.name!r} must be computed, not be an input or a constant; "
                f"remove it from the model"
            )
    return model


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
            f"fail shape inference with: {_one_line(reason)}; repair the node or export the model "
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
        random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
        stays = random or node.op_type in _CONTROL or not is_foldable(node, weights)
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
