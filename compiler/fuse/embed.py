"""PatchEmbed, ClassToken, AddConstant and look-ups: from the inputs to the residual stream."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN, REASON
from moeware.compiler.fuse.rebuild import Builder, token_shape
from moeware.compiler.fuse.region import region
from moeware.compiler.fuse.trace import (
    attribute,
    constant,
    forward,
    is_op,
    operand,
    other_operand,
    static_shape,
    traces,
)


def fuse_patch_embed(model: ir.Model) -> None:
    """Replace a strided convolution, or a Linear on rearranged patches, by ``PatchEmbed``.

    Forms
    -----
    PatchEmbed
        - ``Conv`` whose stride is its kernel, without padding, dilation or groups, flattened to rows
        - the image, channels first or last, cut by ``Reshape`` and ``Transpose`` into rows of patches in
          any order of the features, then a linear form
    """
    for node in list(model.graph):
        if node.graph is None:
            continue
        if is_op(node, "Conv"):
            _from_convolution(model, node)
        elif node.domain == DOMAIN and node.op_type == "Linear":
            _from_linear(model, node)


def _from_convolution(model: ir.Model, node: ir.Node) -> None:
    image, weight = node.inputs[0], constant(operand(node, 1))
    bias = constant(operand(node, 2))
    image_shape, shape = static_shape(image), static_shape(node.outputs[0])
    if image is None or weight is None or image_shape is None or shape is None:
        return
    if weight.ndim != 4 or (bias is None and operand(node, 2) is not None):
        return
    ph, pw = weight.shape[2:]
    if weight.shape[1] != image_shape[1] or bias is not None and bias.shape != weight.shape[:1]:
        return
    if list(attribute(node, "strides", [1, 1])) != [ph, pw] or attribute(node, "group", 1) != 1:
        return
    if any(attribute(node, "pads", [0])) or set(attribute(node, "dilations", [1])) != {1}:
        return
    if image_shape[2] % ph or image_shape[3] % pw:
        return
    features, tokens = shape[1], shape[2] * shape[3]
    wanted = np.arange(features * tokens).reshape(features, tokens).T.reshape(-1)
    for value, numbers, nodes in forward(node.outputs[0]):
        if numbers.size == wanted.size and (numbers.reshape(-1) == wanted).all():
            bias = np.zeros(features, np.float32) if bias is None else bias
            weight = weight.reshape(features, -1)
            _patch_embed(model, image, weight, bias, (ph, pw), value, [node, *nodes])
            return


def _from_linear(model: ir.Model, node: ir.Node) -> None:
    """A Linear whose rows are patches of an image, whatever the order of a patch's features."""
    x, weight, bias = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    assert x is not None and weight is not None and bias is not None
    for trace in reversed(traces(x)):
        shape = static_shape(trace.root)
        if shape is None or len(shape) != 4 or shape[0] != 1 or not trace.nodes:
            continue
        pixels = trace.numbers.reshape(-1, weight.shape[1])
        if trace.numbers.size != np.prod(shape) or _after_canonical(trace.root):
            continue
        for axes in _LAYOUTS:
            found = _patches(pixels, shape, axes)
            if found is not None:
                image, nodes = trace.root, [*trace.nodes, node]
                image = Builder(model, node, trace.nodes).transpose(image, axes)
                _patch_embed(model, image, weight[:, found[0]], bias, found[1], node.outputs[0], nodes)
                return


# Of an image, the axes that are frames, channels, rows and columns.
_LAYOUTS = ((0, 1, 2, 3), (0, 3, 1, 2))


def _patches(
    pixels: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The canonical order of features and the size of patches, where the rows of ``pixels`` (places in
    an image of ``shape`` whose ``axes`` are so) are the patches in order."""
    channels, height, width = (shape[axis] for axis in axes[1:])
    places = np.unravel_index(pixels[0], shape)
    ph, pw = (int(places[axis].max()) + 1 for axis in axes[2:])
    if height % ph or width % pw or channels * ph * pw != pixels.shape[1]:
        return None
    image = np.arange(np.prod(shape)).reshape(shape).transpose(axes)
    image = image.reshape(channels, height // ph, ph, width // pw, pw)
    patches = image.transpose(1, 3, 0, 2, 4).reshape(-1, pixels.shape[1])
    # The canonical feature f is the exported feature order[f].
    order = np.argsort(pixels[0])[np.argsort(np.argsort(patches[0]))]
    if patches.shape == pixels.shape and (patches == pixels[:, order]).all():
        return order, (ph, pw)
    return None


def _after_canonical(value: ir.Value) -> bool:
    """Whether ``value`` is computed from the stream, so that it is no image."""
    return any(node.domain == DOMAIN for node in region([value], [])[0])


def _patch_embed(
    model: ir.Model,
    image: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray,
    patch: tuple[int, int],
    output: ir.Value,
    nodes: list[ir.Node],
) -> None:
    last, shape = output.producer(), static_shape(image)
    assert last is not None and shape is not None
    _, channels, height, width = shape
    tokens = (height // patch[0]) * (width // patch[1])
    build = Builder(model, last, nodes)
    attributes = {
        "ph": int(patch[0]),
        "pw": int(patch[1]),
        "channels": channels,
        "height": height,
        "width": width,
    }
    inputs = [image, build.weight(weight), build.weight(bias, "bias")]
    (result,) = build.node("PatchEmbed", inputs, [(1, tokens, len(weight))], attributes)
    build.replace(output, result)


def fuse_tokens(model: ir.Model) -> None:
    """Replace constant rows put before the tokens by ``ClassToken``, one for each row.

    Forms
    -----
    ClassToken
        - ``Concat`` of constant rows and the tokens, also of several (registers)
    """
    for node in list(model.graph):
        if not is_op(node, "Concat") or len(node.inputs) < 2:
            continue
        *first, x = node.inputs
        shape = static_shape(node.outputs[0])
        parts = [part for part in map(constant, first) if part is not None]
        if x is None or x.const_value is not None or shape is None or len(parts) < len(first):
            continue
        if len(shape) != 3 or shape[0] != 1 or attribute(node, "axis", 0) not in (1, -2):
            continue
        build = Builder(model, node, [node])
        x_shape = static_shape(x)
        assert x_shape is not None
        x = build.resolve(x, x_shape)
        rows = np.concatenate([part.reshape(-1, shape[2]) for part in parts])
        for number, row in enumerate(rows[::-1], start=1):
            grown = (1, x_shape[1] + number, shape[2])
            (x,) = build.node("ClassToken", [x, build.weight(row, "token")], [grown])
        build.replace(node.outputs[0], x)


def explain_lookups(model: ir.Model) -> None:
    """Say of the look-up of tokens' embeddings, which has no products, that the host makes it."""
    for node in model.graph:
        table, ids = operand(node, 0), operand(node, 1)
        if not is_op(node, "Gather") or constant(table) is None or constant(ids) is not None:
            continue
        if attribute(node, "axis", 0) == 0 and len(static_shape(table) or ()) == 2:
            node.metadata_props[REASON] = (
                "the embedding of tokens is a look-up without products, which the host makes; its "
                "rows enter the accelerator as the residual stream"
            )


def fuse_constants(model: ir.Model) -> None:
    """Replace the addition of a constant to the tokens by ``AddConstant``.

    Forms
    -----
    AddConstant
        - ``Add`` of a constant that broadcasts to the tokens (position embedding)
    """
    for node in list(model.graph):
        pair = other_operand(node) if is_op(node, "Add") else None
        array = constant(pair[1]) if pair else None
        if pair is None or array is None or not np.issubdtype(array.dtype, np.floating):
            continue
        shape, given = token_shape(pair[0]), static_shape(pair[0])
        if shape is None or given is None or len(shape) != 3:
            continue
        if static_shape(node.outputs[0]) != given:
            continue
        build = Builder(model, node, [node])
        x = build.resolve(pair[0], shape)
        if not array.any() and not node.outputs[0].is_graph_output():
            build.replace(node.outputs[0], x)
            continue
        rows = np.broadcast_to(array, given).reshape(shape[1:])
        (result,) = build.node("AddConstant", [x, build.weight(rows, "constant")], [shape])
        build.replace(node.outputs[0], result)
