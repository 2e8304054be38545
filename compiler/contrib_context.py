"""What the expansions of ONNX Runtime's operators ask of a model."""

import numpy as np
import onnx
from onnx import helper

__all__ = ["HALVES", "Context"]

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SHAPE = 64  # elements that a constant shape has at most


class Context:
    """Opset, types, ranks and producers of values, constants without elements."""

    def __init__(self, proto: onnx.ModelProto):
        graph = proto.graph
        versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
        self.opset = max(versions, default=0)  # which is refused later
        self.initializers = graph.initializer
        self.producers = {name: node.op_type for node in graph.node for name in node.output}
        self.empty = {tensor.name for tensor in graph.initializer if 0 in tensor.dims}
        self.ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                self.ranks[value.name] = len(value.type.tensor_type.shape.dim)
        self._proto: onnx.ModelProto | None = proto
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type
                       for value in (*graph.input, *graph.value_info, *graph.output)}

    def rank(self, name: str) -> int:
        """Number of axes of a value; 0 where it is not known. Optimisers do not record those that they
        make, which are inferred when one is asked for."""
        if name not in self.ranks and self._proto is not None:
            graph, self._proto = _inferred(self._proto).graph, None
            self.ranks |= {value.name: len(value.type.tensor_type.shape.dim)
                           for value in graph.value_info if value.type.tensor_type.HasField("shape")}
        return self.ranks.get(name, 0)

    def kind(self, node: onnx.NodeProto) -> int | None:
        """The type of floats that ``node`` reads, as far as it is known."""
        found = (self.types.get(name) for name in node.input)
        return next((each for each in found if each in (*HALVES, onnx.TensorProto.FLOAT)), None)

    def add(self, node: onnx.NodeProto) -> None:
        """Take note of the types of the results of ``node``."""
        casts = [each.i for each in node.attribute if each.name == "to" and node.op_type == "Cast"]
        kind = casts[0] if casts else self.kind(node)
        if kind is not None:
            for name in node.output:
                self.types.setdefault(name, kind)


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes of its values, and without the values of its weights."""
    small = [each for each in proto.graph.initializer if np.prod(each.dims) <= _SHAPE]
    large = [helper.make_tensor_value_info(each.name, each.data_type, each.dims)
             for each in proto.graph.initializer if np.prod(each.dims) > _SHAPE]
    known = {value.name for value in proto.graph.input}
    inputs = [*proto.graph.input, *(value for value in large if value.name not in known)]
    graph = helper.make_graph(proto.graph.node, "ranks", inputs, proto.graph.output, small,
                              value_info=proto.graph.value_info)
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)
