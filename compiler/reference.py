"""Float evaluation of the canonical graph on PyTorch: the reference for calibration and tests."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from moeware.compiler.canonical import attributes, is_canonical
from moeware.compiler.errors import CompileError
from moeware.compiler.operators import OPERATORS, Record


def evaluate(
    model: ir.Model, feeds: Mapping[str, np.ndarray], record: Record | None = None
) -> dict[str, np.ndarray]:
    """Outputs of a canonical graph by name; inputs are ``[batch, ...]``, any batch, one for all.

    ``record(name, array)`` is called with every intermediate value, in order of computation:

    ==========================  ============================================================
    name                        array
    ==========================  ============================================================
    value name                  every output of every node (pre-activation Linear outputs are
                                the outputs of Linear; ``{node}.indices``, ``{node}.weights``
                                of a Route)
    ``{node}/logits``           Route: ``Wx + b``, ``[B, N, E]``
    ``{node}/scores``           Attention: scaled scores before softmax, ``[B, heads, N, N]``
    ``{node}/expert{e}/rows``   Experts: int64 rows of the flattened ``[B*N]`` that reach e
    ``{node}/expert{e}/hidden``      hidden before the function, ``[rows, H]``
    ``{node}/expert{e}/activation``  hidden after the function, ``[rows, H]``
    ``{node}/expert{e}/factor``      GatedExperts: what it is multiplied by, ``[rows, H]``
    ``{node}/expert{e}/product``     GatedExperts: and their product, ``[rows, H]``
    ``{node}/expert{e}/output``      output before the weight, ``[rows, D]``
    ``{node}/filled``           SoftExperts: the slots, ``[B, S, D]``; ``{node}/hidden``,
                                ``{node}/activation`` (``[B, S, H]``) and ``{node}/results``
                                (``[B, S, D]``) are what the experts make of them
    ==========================  ============================================================

    An expert that no row reaches records nothing. A plain ONNX node runs in ONNX Runtime, one
    frame at a time, because its shapes are those of one frame. Raises ``CompileError`` for
    missing or misshapen feeds.
    """
    record = record or (lambda name, array: None)
    frames = _check(model, feeds)
    values: dict[ir.Value, torch.Tensor] = {
        value: torch.from_numpy(np.array(feeds[str(value.name)])) for value in model.graph.inputs
    }
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            values[value] = torch.from_numpy(np.array(value.const_value.numpy()))
    with torch.no_grad():
        for node in model.graph:
            if is_canonical(node):
                inputs = [values[value] for value in node.inputs if value is not None]
                outputs = OPERATORS[node.op_type](inputs, attributes(node), str(node.name), record)
            else:
                outputs = _plain(model, node, values, frames)
            for value, array in zip(node.outputs, outputs):
                values[value] = array
                record(str(value.name), array.numpy())
    return {str(value.name): values[value].numpy() for value in model.graph.outputs}


def _check(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> int:
    frames = {len(feeds[str(value.name)]) for value in model.graph.inputs if value.name in feeds}
    for value in model.graph.inputs:
        assert value.shape is not None
        rest = tuple(value.shape)[1:]
        given = feeds[str(value.name)].shape if value.name in feeds else None
        if given is None or given[1:] != rest or len(frames) != 1:
            raise CompileError(
                f"Feed {value.name!r} must have shape [batch, {', '.join(map(str, rest))}] with "
                f"one batch for all inputs, not {given}; pass every graph input"
            )
    return frames.pop()


def _plain(
    model: ir.Model, node: ir.Node, values: dict[ir.Value, torch.Tensor], frames: int
) -> list[torch.Tensor]:
    """Run one ONNX node on each frame; the frames of a value lie behind each other on axis 0."""
    read = [value for value in dict.fromkeys(node.inputs) if value is not None]
    captured = [
        value
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for inner in attribute.value
        for value in inner.inputs
        if value in values and value not in read
    ]
    read = list(dict.fromkeys([*read, *captured]))
    session = _session(model, node, read, {value: values[value] for value in read})
    results: list[list[np.ndarray]] = []
    for frame in range(frames):
        feed = {}
        for value in read:
            array = values[value].numpy()
            if value.const_value is None and array.ndim:
                length = len(array) // frames
                array = array[frame * length : (frame + 1) * length]
            feed[str(value.name)] = np.asarray(array, order="C")  # a number stays one
        with _running(node):
            results.append(session.run(None, feed))
    used = [index for index, value in enumerate(node.outputs) if value.name]
    joined = dict.fromkeys(range(len(node.outputs)), torch.empty(0))
    for position, index in enumerate(used):
        arrays = [result[position] for result in results]
        if arrays[0].ndim == 0:
            if frames > 1:
                raise CompileError(
                    f"Node {node.name!r} must give a tensor with a batch axis, not one number; "
                    f"evaluate it with one frame"
                )
            joined[index] = torch.from_numpy(np.array(arrays[0]))
        elif len({array.shape[1:] for array in arrays}) > 1:
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must give the same shape for every frame, not "
                f"{sorted({array.shape for array in arrays})}; export without data-dependent shapes"
            )
        else:
            joined[index] = torch.from_numpy(np.concatenate(arrays))
    return list(joined.values())


def _session(
    model: ir.Model, node: ir.Node, read: list[ir.Value], arrays: dict[ir.Value, torch.Tensor]
) -> onnxruntime.InferenceSession:
    inputs = [
        onnx.helper.make_tensor_value_info(
            str(value.name),
            onnx.helper.np_dtype_to_tensor_dtype(arrays[value].numpy().dtype),
            [None] * arrays[value].ndim,
        )
        for value in read
    ]
    outputs = [onnx.ValueInfoProto(name=value.name) for value in node.outputs if value.name]
    graph = onnx.helper.make_graph([ir.to_proto(node)], "node", inputs, outputs)
    opsets = [onnx.helper.make_opsetid(*item) for item in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with _running(node):
        return onnxruntime.InferenceSession(proto.SerializeToString(), options)


@contextlib.contextmanager
def _running(node: ir.Node) -> Iterator[None]:
    """What ONNX Runtime raises, of many types, as an error that names the node."""
    try:
        yield
    except Exception as error:
        raise CompileError(
            f"Node {node.name!r} ({node.op_type}) must run in ONNX Runtime, not fail with: "
            f"{str(error).splitlines()[0]}; replace the operator in the model"
        ) from error
