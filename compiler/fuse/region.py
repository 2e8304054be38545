"""Run a part of the graph on chosen numbers, to prove what it computes.

A match of structure proposes a canonical form; running the region and the form on random inputs
decides. So a form is accepted for what it computes, whatever operators wrote it.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

onnxruntime.set_default_logger_severity(4)


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Values that ``node`` reads, those captured by its subgraphs included."""
    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs = []
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.value]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.value)
        for graph in graphs:
            own = {value for inner in graph for value in inner.outputs} | set(graph.inputs)
            own |= set(graph.initializers.values())
            for inner in graph:
                read += [value for value in inputs_of(inner) if value not in own]
    return read


def region(
    outputs: Iterable[ir.Value], stop: Iterable[ir.Value]
) -> tuple[list[ir.Node], set[ir.Value]]:
    """Nodes between ``stop`` and ``outputs`` in topological order, and other leaves reached.

    Leaves are graph inputs; initializers are part of the region.
    """
    stops, leaves = set(stop), set()
    nodes: dict[ir.Node, None] = {}
    visited: set[ir.Value] = set()
    stack: list[tuple[ir.Value, bool]] = [(value, False) for value in outputs]
    while stack:
        value, done = stack.pop()
        node = value.producer()
        if done:
            assert node is not None
            nodes[node] = None
            continue
        if value in stops or value in visited or value.const_value is not None:
            continue
        visited.add(value)
        if node is None:
            leaves.add(value)
            continue
        stack.append((value, True))
        stack += [(read, False) for read in inputs_of(node)]
    return list(nodes), leaves


def run(
    model: ir.Model, feeds: Mapping[ir.Value, np.ndarray], outputs: list[ir.Value]
) -> list[np.ndarray] | None:
    """Values ``outputs`` when the values ``feeds`` hold the given arrays; None if it cannot run."""
    call = runner(model, feeds, outputs)
    return None if call is None else call(feeds)


def runner(
    model: ir.Model, like: Mapping[ir.Value, np.ndarray], outputs: list[ir.Value]
) -> Callable[[Mapping[ir.Value, np.ndarray]], list[np.ndarray] | None] | None:
    """`run` for many feeds with the types and shapes of those in ``like``.

    Reads standard operators only (a canonical node has no ONNX Runtime kernel).
    """
    nodes, leaves = region(outputs, like)
    if leaves or any(node.domain == "moeware" for node in nodes):
        return None
    constants = {
        value for node in nodes for value in inputs_of(node) if value.const_value is not None
    }
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "region",
        [
            onnx.helper.make_tensor_value_info(
                value.name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for value, array in like.items()
        ],
        [onnx.ValueInfoProto(name=value.name) for value in outputs],
        [_tensor(value) for value in constants],
    )
    proto = onnx.helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[
            onnx.helper.make_opsetid(domain, version)
            for domain, version in model.opset_imports.items()
        ],
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4

    def call(feeds: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray] | None:
        try:
            return session.run(None, {value.name: array for value, array in feeds.items()})
        except Exception:  # noqa: BLE001 - as below
            return None

    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    except Exception:  # noqa: BLE001 - ONNX Runtime raises many types; no run, no proof
        return None
    return call


def _tensor(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    return onnx.numpy_helper.from_array(np.asarray(value.const_value.numpy()), value.name)
