"""Replace calls of a model's local functions by the nodes of their bodies.

Everything behind this sees plain nodes. A body's node is named after the call that it stands for,
``block1/Gelu``, so that reports lead back to the file.
"""

import graphlib

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from moeware.compiler.errors import CompileError

# Nodes of a model whose calls are written out. Functions that call one another are a few bytes for
# any number of nodes.
_NODES = 100_000
_CALL = "moeware.call"  # metadata of a call, which the inliner hands to the nodes of the body


def inline_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto`` without local functions; itself where it has none.

    Raises ``CompileError`` for functions that call themselves, are too many nodes when written out,
    or need another opset.
    """
    if not proto.functions:
        return proto
    model = ir.from_proto(proto)
    _refuse_size(model, _callees_first(model))
    _refuse_misfits(model)
    _agree_on_opset(model)
    for function in model.functions.values():
        _forget_shapes(function)
        _separate_outputs(function)
    for node in model.graph.all_nodes():
        node.metadata_props[_CALL] = str(node.name or node.op_type)
    called = set(model.graph.all_nodes())
    passes.InlinePass()(model)
    for node in model.graph.all_nodes():
        call = node.metadata_props.pop(_CALL, None)
        if call is not None and node not in called:
            node.name = f"{call}/{node.name}"
    passes.RemoveUnusedOpsetsPass()(model)
    return ir.to_proto(model)


def _name(identifier: ir.OperatorIdentifier) -> str:
    domain, name, overload = identifier
    return f"{domain}::{name}" + (f":{overload}" if overload else "")


def _callees_first(model: ir.Model) -> list[ir.OperatorIdentifier]:
    """The functions, each behind those that it calls; refuses recursion."""
    calls = {
        identifier: {node.op_identifier() for node in function.all_nodes()} & set(model.functions)
        for identifier, function in model.functions.items()
    }
    try:
        return list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        # The sorter lists who is called before who calls.
        cycle = [_name(identifier) for identifier in reversed(error.args[1])]
        raise CompileError(
            f"Function {cycle[0]!r} must be free of recursion, not call itself "
            f"({' -> '.join(cycle)}); write the repetition out and export the model again"
        ) from None


def _refuse_size(model: ir.Model, order: list[ir.OperatorIdentifier]) -> None:
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for identifier in order:
        nodes = model.functions[identifier].all_nodes()
        sizes[identifier] = sum(sizes.get(node.op_identifier(), 1) for node in nodes)
    total = 0
    for node in model.graph.all_nodes():
        size = sizes.get(node.op_identifier(), 1)
        total += size
        if size > 1 and total > _NODES:
            raise CompileError(
                f"Node {node.name!r} must call a function with which the model has at most {_NODES} "
                f"nodes, not {_name(node.op_identifier())!r} of {size} nodes, with which it has "
                f"{total}; export the model without functions"
            )


def _refuse_misfits(model: ir.Model) -> None:
    """Refuse calls that the inliner does not understand."""
    bodies = [node for function in model.functions.values() for node in function.all_nodes()]
    for node in (*model.graph.all_nodes(), *bodies):
        function = model.functions.get(node.op_identifier())
        if function is None:
            continue
        for what, given, known in (
            ("inputs", node.inputs, function.inputs),
            ("outputs", node.outputs, function.outputs),
        ):
            if len(given) > len(known):
                raise CompileError(
                    f"Node {node.name!r} must have at most {len(known)} {what} as the function "
                    f"{_name(node.op_identifier())!r} that it calls, not {len(given)}; export the "
                    f"model again"
                )
        for name, attribute in node.attributes.items():
            if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                raise CompileError(
                    f"Attribute {name!r} of node {node.name!r} must be a value, not a graph, as the "
                    f"node calls the function {_name(node.op_identifier())!r}; export the model "
                    f"without functions"
                )


def _agree_on_opset(model: ir.Model) -> None:
    """Give functions the opset of the model, where it means the same to all of their nodes."""
    versions = [function.opset_imports.get("", 0) for function in model.functions.values()]
    version = model.opset_imports.get("", max(versions))
    for identifier, function in model.functions.items():
        own = function.opset_imports.get("", version)
        if own == version:
            continue
        for node in function.all_nodes():
            if not node.domain and _since(node, own) != _since(node, version):
                raise CompileError(
                    f"Function {_name(identifier)!r} must use opset {version} as the model does, "
                    f"not opset {own}, in which {node.op_type} is another operator; convert it "
                    f"with onnx.inliner.inline_local_functions(model, convert_version=True)"
                )
        function.opset_imports[""] = version


def _since(node: ir.Node, version: int) -> int:
    """The opset that last changed the operator of ``node``; 0 where ``version`` has none."""
    try:
        return onnx.defs.get_schema(node.op_type, version, "").since_version
    except onnx.defs.SchemaError:
        return 0


def _forget_shapes(function: ir.Function) -> None:
    """Shapes recorded in a body are those of one call, and of the exported batch."""
    for node in function.all_nodes():
        for value in node.outputs:
            value.shape = None


def _separate_outputs(function: ir.Function) -> None:
    """Make each output the result of a node of its own.

    The inliner gives the results of a body the names that the call gave them. An output that is an
    input, too, would so rename a value of the caller, even an input of the model.
    """
    seen = set(function.inputs)
    for index, value in enumerate(function.outputs):
        if value in seen:
            node = ir.node("Identity", [value], name=f"{value.name}_copy")
            node.outputs[0].name = f"{value.name}_copy_{index}"
            function.append(node)
            function.outputs[index] = node.outputs[0]
        seen.add(value)
