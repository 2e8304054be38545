"""Read an ONNX file and check it as a file: every byte that it claims is there, every name is
defined, every graph ends. What its nodes compute is looked at afterwards (``moeware.compiler.load``).
"""

import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from moeware.compiler.canonical import DOMAIN
from moeware.compiler.errors import CompileError

__all__ = ["check_model", "one_line", "read_model"]

OPSETS = range(17, 25)

_FILE_BYTES = (1 << 31) - 1  # of a message of protobuf
_TYPES = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}


def read_model(path: Path) -> onnx.ModelProto:
    """The model at ``path`` with its external data, and a name for every node and constant."""
    proto = _parse(path)
    for number, node in enumerate(_nodes(proto)):
        node.name = node.name or f"{node.op_type}_{number}"
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.name = attribute.t.name or f"{node.name}.{attribute.name}"
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external_data(tensor, path)
    return proto


def one_line(message: str) -> str:
    """A message of several lines, of which a later one may name the node."""
    return textwrap.shorten(message.replace("==> Context: ", ""), 400, placeholder=" …")


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise CompileError(f"Model file must exist, not {str(path)!r}; check the path")
    if path.stat().st_size > _FILE_BYTES:
        raise CompileError(
            f"Model {path.name} must have at most {_FILE_BYTES} bytes, as every file of its format, "
            f"not {path.stat().st_size}; export it with external data"
        )
    is_text = path.suffix == ".onnxtxt"
    data = path.read_bytes()
    try:
        proto = onnx.parser.parse_model(data.decode()) if is_text else onnx.load_from_string(data)
    except (DecodeError, onnx.parser.ParseError, IndexError, ValueError) as error:
        # The parser of texts lets errors of numbers that are too large through.
        # A ModelProto starts with field 1 (ir_version, varint), which is the byte 0x08.
        truncated = not is_text and data[:1] == b"\x08"
        is_bytes = isinstance(error, onnx.parser.ParseError)
        reason = b" ".join(error.args).decode(errors="replace") if is_bytes else str(error)
        raise CompileError(
            f"Model {path.name} must be a complete ONNX file, not one that is "
            f"{'truncated or damaged' if truncated else 'in another format'} "
            f"({one_line(reason)}); {'copy or ' if truncated else ''}export it again"
        ) from error
    if not proto.ir_version or not proto.graph.node and not proto.graph.output:
        raise CompileError(
            f"Model {path.name} must be an ONNX file with a graph, not {data[:1]!r}…; "
            f"export it with torch.onnx.export"
        )
    if not proto.graph.output:
        raise CompileError(
            f"Graph of {path.name} must have outputs, not none; name what the model computes"
        )
    return proto


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes: of the graph, of local functions, and of the subgraphs of either."""
    pending = [proto.graph, *proto.functions]
    while pending:
        for node in pending.pop(0).node:
            yield node
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants: initializers, and attributes of nodes."""
    yield from proto.graph.initializer
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from graph.initializer


def _check_opset(proto: onnx.ModelProto) -> None:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    for version in versions or [0]:
        if version not in OPSETS:
            raise CompileError(
                f"Opset of ai.onnx must be between {OPSETS[0]} and {OPSETS[-1]}, not {version}; "
                f"export with opset_version={OPSETS[3]} or use onnx.version_converter"
            )


def _load_external_data(tensor: onnx.TensorProto, path: Path) -> None:
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
            f"{location!r}, not fail with {one_line(str(error))}; copy the file again"
        ) from error


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes that the shape and type of a tensor take."""
    return math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)


def _check_length(tensor: onnx.TensorProto, entries: Mapping[str, str], file_bytes: int) -> None:
    """Refuse, before they are read, bytes of another number than the tensor's shape takes."""
    needed = _bytes_of(tensor)
    offset = int(entries.get("offset") or 0)
    given = int(entries.get("length") or file_bytes - offset)
    if given != needed or offset + given > file_bytes:
        raise ValueError(
            f"bytes {offset} to {offset + given} of a file of {file_bytes} for the shape "
            f"{list(tensor.dims)}, which takes {needed}"
        )


def check_model(proto: onnx.ModelProto, path: Path, known: Collection[str] = ()) -> None:
    """Refuse what the ONNX checker refuses, and what it lets pass but nobody can read; ``known``:
    constants that are not the file's own, which may be empty."""
    _check_opset(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise CompileError(
            f"Model {path.name} must pass the ONNX checker, not fail with: "
            f"{one_line(str(error))}; repair the graph or export it again"
        ) from error
    for node in _nodes(proto):
        _check_node(node)
    for value in (*proto.graph.input, *proto.graph.output):
        _check_value(value)
    names = [value.name for value in proto.graph.output]
    for name in set(names):
        if names.count(name) > 1:
            raise CompileError(
                f"Graph output {name!r} must be listed once, not {names.count(name)} times; remove "
                f"the others from the model"
            )
    for sparse in proto.graph.sparse_initializer:
        raise CompileError(
            f"Initializer {sparse.values.name!r} must be dense, not sparse; write its zeros out"
        )
    for tensor in _tensors(proto):
        _check_tensor(tensor)
    _check_weights(proto, known)


def _check_node(node: onnx.NodeProto) -> None:
    if node.domain == DOMAIN:
        raise CompileError(
            f"Node {node.name!r} must be of a domain of ONNX, not {DOMAIN!r}, which is the "
            f"compiler's own; give it the file that was exported"
        )
    for attribute in node.attribute if node.domain in ("", "ai.onnx") else ():
        if attribute.name in ("to", "dtype") and attribute.i not in _TYPES:
            raise CompileError(
                f"Attribute {attribute.name!r} of node {node.name!r} ({node.op_type}) must be a "
                f"type of ONNX, not {attribute.i}; repair the node or export the model again"
            )


def _check_value(value: onnx.ValueInfoProto) -> None:
    kind = value.type.tensor_type.elem_type
    if value.type.HasField("tensor_type") and kind not in _TYPES:
        raise CompileError(
            f"Type of {value.name!r} must be one of ONNX, not {kind}; export the model again"
        )


def _check_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in _TYPES or tensor.data_type == onnx.TensorProto.STRING:
        raise CompileError(
            f"Constant {tensor.name!r} must hold numbers, not elements of type "
            f"{tensor.data_type}; leave what reads it out of the model"
        )
    try:
        onnx.numpy_helper.to_array(tensor)
        if tensor.raw_data and len(tensor.raw_data) != _bytes_of(tensor):
            raise ValueError(f"{len(tensor.raw_data)} bytes where it takes {_bytes_of(tensor)}")
    except ValueError as error:
        raise CompileError(
            f"Constant {tensor.name!r} must hold the values of its shape {list(tensor.dims)}, not "
            f"fail with: {error}; export the model again"
        ) from error


_OF_SCORES = {"Add", "Attention", "Where"}  # what reads a mask


def _check_weights(proto: onnx.ModelProto, known: Collection[str]) -> None:
    """Refuse non-finite and empty weights. A mask of minus infinities is not a weight, nor one that is
    added to scores with a bias by position."""
    readers: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if not np.issubdtype(array.dtype, np.floating) or tensor.name in known:
            continue
        if array.size == 0 and readers.get(tensor.name, set()) - {"Resize"}:
            raise CompileError(
                f"Initializer {tensor.name!r} must have elements, not shape {array.shape}; "
                f"remove the empty layer and export again"
            )
        finite = array[np.isfinite(array)]
        is_mask = not np.isnan(array).any() and (finite.size == 0 or np.ptp(finite) == 0)
        hidden = array == -np.inf
        masks_scores = readers.get(tensor.name, set()) <= _OF_SCORES and array.ndim > 1
        is_mask |= masks_scores and 1 < hidden.sum() == array.size - finite.size
        if finite.size != array.size and not is_mask:
            kind = "NaN" if np.isnan(array).any() else "infinite"
            raise CompileError(
                f"Initializer {tensor.name!r} must be finite, not hold "
                f"{array.size - finite.size} {kind} values; repair the checkpoint"
            )
