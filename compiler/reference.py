"""Float evaluation of the canonical graph on PyTorch: the reference for calibration and tests."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from moeware.compiler.canonical import attributes, is_canonical
from moeware.compiler.errors import CompileError

Record = Callable[[str, np.ndarray], None]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


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
    ``{node}/expert{e}/output``      output before the weight, ``[rows, D]``
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


Outputs = tuple[torch.Tensor, ...]


def _patch_embed(inputs, attrs, name, record) -> Outputs:
    image, weight, bias = inputs
    kernel = weight.reshape(len(bias), attrs["channels"], attrs["ph"], attrs["pw"])
    # A cast of the image to float is part of the operator.
    patches = torch.nn.functional.conv2d(image.float(), kernel, bias, (attrs["ph"], attrs["pw"]))
    return (patches.flatten(2).transpose(1, 2).contiguous(),)


def _class_token(inputs, attrs, name, record) -> Outputs:
    x, token = inputs
    return (torch.cat([token.expand(len(x), 1, -1), x], dim=1),)


def _add(inputs, attrs, name, record) -> Outputs:
    return (inputs[0] + inputs[1],)


def _layer_norm(inputs, attrs, name, record) -> Outputs:
    x, gamma, beta = inputs
    return (torch.nn.functional.layer_norm(x, gamma.shape, gamma, beta, attrs["epsilon"]),)


def _linear(inputs, attrs, name, record) -> Outputs:
    return (torch.nn.functional.linear(*inputs),)


def _attention(inputs, attrs, name, record) -> Outputs:
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    q, k, v = (
        x.unflatten(-1, (count, -1)).transpose(1, 2)
        for x, count in zip(inputs, (heads, kv_heads, kv_heads))
    )
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q * attrs["scale"]) @ k.transpose(-1, -2)
    record(f"{name}/scores", scores.detach().numpy())
    if attrs["causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -math.inf)
    return ((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2),)


def _pointwise(inputs, attrs, name, record) -> Outputs:
    return (FUNCTIONS[attrs["function"]](inputs[0]),)


def _route(inputs, attrs, name, record) -> Outputs:
    logits = torch.nn.functional.linear(*inputs)
    record(f"{name}/logits", logits.detach().numpy())
    # A stable sort breaks ties to the lower index; torch.topk promises no order.
    indices = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., : attrs["k"]]
    weights = torch.softmax(logits, -1).gather(-1, indices)
    if attrs["normalise"] == "chosen":
        weights = torch.softmax(logits.gather(-1, indices), -1)
    return indices.contiguous(), weights


def _experts(inputs, attrs, name, record) -> Outputs:
    x, indices, weights, w1, b1, w2, b2 = inputs
    rows, result = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    for expert in range(len(w1)):
        chosen, slots = (indices.flatten(0, 1) == expert).nonzero(as_tuple=True)
        if not len(chosen):
            continue
        hidden = torch.nn.functional.linear(rows[chosen], w1[expert], b1[expert])
        activation = FUNCTIONS[attrs["function"]](hidden)
        output = torch.nn.functional.linear(activation, w2[expert], b2[expert])
        result.index_add_(0, chosen, output * weights.flatten(0, 1)[chosen, slots][:, None])
        for part, array in (
            ("rows", chosen),
            ("hidden", hidden),
            ("activation", activation),
            ("output", output),
        ):
            record(f"{name}/expert{expert}/{part}", array.detach().numpy())
    return (result.reshape(x.shape),)


def _take_token(inputs, attrs, name, record) -> Outputs:
    return (inputs[0][:, attrs["index"]].contiguous(),)


def _mean_tokens(inputs, attrs, name, record) -> Outputs:
    return (inputs[0].mean(1),)


OPERATORS: dict[str, Callable[..., Outputs]] = {
    "PatchEmbed": _patch_embed,
    "ClassToken": _class_token,
    "AddConstant": _add,
    "LayerNorm": _layer_norm,
    "Linear": _linear,
    "Attention": _attention,
    "Pointwise": _pointwise,
    "Add": _add,
    "Route": _route,
    "Experts": _experts,
    "TakeToken": _take_token,
    "MeanTokens": _mean_tokens,
}


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
            feed[str(value.name)] = np.ascontiguousarray(array)
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
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options)
    except Exception as error:
        raise CompileError(
            f"Node {node.name!r} ({node.op_type}) must run in ONNX Runtime, not fail with: "
            f"{str(error).splitlines()[0]}; replace the operator in the model"
        ) from error
