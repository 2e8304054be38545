"""Simplify a model as it is read: fold constants, merge equal nodes, infer shapes."""

import logging
import re
import sys

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer

from moeware.compiler.bounds import check_sizes, is_foldable, weight_elements
from moeware.compiler.contrib_shapes import infer_shapes
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.moe import refuse_baked_counts
from moeware.compiler.fuse.region import inputs_of, run
from moeware.compiler.fuse.trace import is_op, operand
from moeware.compiler.qdq import take_out
from moeware.compiler.read import one_line

__all__ = ["refuse_contradictions", "simplify", "without_weights"]

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


def simplify(model: ir.Model) -> None:
    """Take pairs of quantisation out, fold constants, merge equal nodes and give every value its
    shape, in place.

    Raises ``CompileError`` for nodes whose operands and attributes contradict one another, and for
    sizes out of proportion (``bounds``).
    """
    passes.NameFixPass()(model)
    weights = weight_elements(model)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    check_sizes(model, weights)
    take_out(model)
    if any(node.domain for node in model.graph) and _fold_constants(model, weights):
        # Inference behind other domains' operators computes vectors, whose sizes are known now.
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
        check_sizes(model, weights)

    def is_small(node: ir.Node) -> bool | None:
        return None if is_foldable(node, weights) else False

    # Each round may fix a shape that lets the next one fold the nodes that read it.
    for _ in range(_FOLDING_ROUNDS):
        infer_shapes(model)
        _check_targets(model)
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
    # Before all must fit: counts of several frames do not fit one.
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    refuse_baked_counts(model)
    _infer_shapes(model)
    check_sizes(model, weights)


def _check_targets(model: ir.Model) -> None:
    """Refuse shapes that are no vectors, which the optimizer takes for some."""
    for node in model.graph.all_nodes():
        target = operand(node, 1) if is_op(node, "Expand", "Reshape") else None
        if target is not None and target.shape is not None and target.shape.rank() != 1:
            raise CompileError(
                f"Node {node.name!r} ({node.op_type}) must have a vector as its shape, not a tensor of "
                f"{target.shape.rank()} axes; repair the node or export the model again"
            )


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

    The pass swallows the reason why inference fails, so the graph is looked at before. No propagation of
    data: folding has done that, and it takes memory for each element of a vector.
    """
    refuse_contradictions(without_weights(model), strict=True)
    passes.ShapeInferencePass(data_prop=False)(model)


def without_weights(model: ir.Model) -> ir.Model:
    """A copy for shape inference, which only reads the values of small constants."""
    light = model.clone()
    _cut_other_domains(light)
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is None or value.const_value.size > _LARGE_CONSTANT:
            del light.graph.initializers[name]
            light.graph.inputs.append(value)
    return light


def refuse_contradictions(model: ir.Model, strict: bool) -> None:
    """Raise ``CompileError`` for a node whose operands are of types or, if ``strict``, also of shapes
    that do not go together."""
    try:
        onnx.shape_inference.infer_shapes(
            ir.to_proto(model), check_type=True, strict_mode=strict
        )
    except onnx.shape_inference.InferenceError as error:
        found = _NODE_OF_INFERENCE.search(str(error))
        if found is None:  # no node is at fault
            ends = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
            raise CompileError(
                f"Inputs and outputs {ends} must have the types of their values, not fail shape inference "
                f"with: {one_line(str(error))}; export the model again"
            ) from error
        operator, name, reason = found.groups()
        raise CompileError(
            f"Node {name!r} ({operator}) must have operands and attributes that fit together, not "
            f"fail shape inference with: {one_line(reason)}; repair the node or export the model "
            f"again"
        ) from error


def _cut_other_domains(model: ir.Model) -> None:
    """Let values that operators of other domains make enter instead: behind operators that it does not
    know, ONNX reports no contradiction."""
    for node in list(model.graph):
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if not node.domain or any(value.shape is None or value.dtype is None for value in used):
            continue
        for value in used:
            known = ir.val(f"{value.name}_known", dtype=value.dtype, shape=value.shape)
            value.replace_all_uses_with(known, replace_graph_outputs=True)
            model.graph.inputs.append(known)
        model.graph.remove(node, safe=True)


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
        stays = node.op_type in _CONTROL or not is_foldable(node, weights)
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
