"""What a file may ask for, in proportion to what it holds.

A few bytes can claim a tensor of terabytes or a loop without end. What would be computed is
bounded by what is known of its shape, before it is: constants that fold, and values of one frame.
"""

import math

import onnx_ir as ir

from moeware.compiler.errors import CompileError

__all__ = ["check_sizes", "is_foldable", "is_random", "weight_elements"]

# Elements that any file may ask for, beside its weights: of a constant that folds (masks, positions),
# of a value of one frame.
_CONSTANT = 1 << 24
_VALUE = 1 << 22
# Elements of a value for each weight. Gathering the weights of each token's experts gives as many
# as there are tokens for each expert, which is the largest ratio of the forms that are recognised.
_VALUES_PER_WEIGHT = 256
_TRIPS = 1 << 12

# Their results have no shape that is known before, and no more elements than a few times their
# operands.
_DATA_DEPENDENT = ("NonZero", "Compress", "Unique")


def weight_elements(model: ir.Model) -> int:
    """Elements of all initializers."""
    values = model.graph.initializers.values()
    return sum(value.const_value.size for value in values if value.const_value is not None)


def is_random(node: ir.Node) -> bool:
    """Whether the results of ``node`` differ from run to run."""
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


def is_foldable(node: ir.Node, weights: int) -> bool:
    """Whether ``node``, all of whose inputs are constants, may be computed in the compiler."""
    if is_random(node):
        return False
    if node.op_type in _DATA_DEPENDENT:
        return True
    if node.op_type in ("Div", "Mod") and _has_zero_integer(node.inputs[1]):
        return False  # the host says so when it runs the node
    shapes = [value.shape for value in node.outputs]
    return all(
        shape is not None and shape.is_static() and _elements(shape) <= weights + _CONSTANT
        for shape in shapes
    )


def _has_zero_integer(value: ir.Value | None) -> bool:
    array = value.const_value.numpy() if value is not None and value.const_value else None
    return array is not None and array.dtype.kind in "iu" and not array.all()


def _elements(shape: ir.Shape) -> int:
    """The elements of a shape; an axis of unknown size counts as 1."""
    return math.prod(size for size in shape if isinstance(size, int))


def check_sizes(model: ir.Model, weights: int) -> None:
    """Refuse values and loops that are out of proportion to ``weights``, naming the node."""
    limit = max(_VALUE, _VALUES_PER_WEIGHT * weights)
    for value in model.graph.inputs:
        if value.shape is not None and _elements(value.shape) > limit:
            raise CompileError(
                f"Graph input {value.name!r} must have at most {limit} elements in a model of "
                f"{weights} weights, not shape {list(value.shape)}; repair the shape in the header"
            )
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value.shape is not None and _elements(value.shape) > limit:
                raise CompileError(
                    f"Value {value.name!r} of node {node.name!r} ({node.op_type}) must have at most "
                    f"{limit} elements in a model of {weights} weights, not shape "
                    f"{list(value.shape)}; repair the sizes that the node is given"
                )
        if node.op_type == "Loop" and node.domain == "":
            trips = node.inputs[0] and node.inputs[0].const_value
            if trips is None or trips.size != 1 or int(trips.numpy().reshape(())) > _TRIPS:
                raise CompileError(
                    f"Node {node.name!r} (Loop) must have a constant trip count of at most "
                    f"{_TRIPS}, not one that "
                    f"{'is computed' if trips is None else 'is ' + str(trips.numpy())}; "
                    f"unroll the loop and export again"
                )
