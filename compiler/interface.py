"""What a program takes and gives, where the file leaves it open: sizes of axes, inputs that are always
the same, and outputs that nobody reads.

The batch axis of a model is the frame axis: every later stage sees one frame, and running several
frames repeats the graph. So the first axis of each graph input is fixed to 1 here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from moeware.compiler.errors import CompileError

__all__ = ["LEAVE_OUT", "RANGE", "Interface"]

RANGE = "range"  # as the value of a fixed input: 0, 1, 2, … along its last axis
# What to do about an output that costs more than it is worth.
LEAVE_OUT = "leave it out: name the outputs to compute (--outputs)"

_Dimension = onnx.TensorShapeProto.Dimension


@dataclass(frozen=True)
class Interface:
    """How the inputs and outputs of a file are to be read.

    axes : sizes of dynamic axes, by the name that the file gives them (``sequence``), or by input and
        place (``ids.1``). An input without elements (a past of 0 tokens) becomes a constant.
    fixed : inputs that have one value in every run, such as the mask of a sequence without padding
        (1 everywhere) or positions (`RANGE`), and that value; they become constants.
    outputs : those to compute, in this order; none for all.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int | float | str] = field(default_factory=dict)
    outputs: Sequence[str] = ()

    def __post_init__(self):
        for name, size in self.axes.items():
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
                raise CompileError(f"Size of axis {name!r} must be 0 or more, not {size!r}")
        for name, value in self.fixed.items():
            if value != RANGE and not isinstance(value, (int, float, np.integer, np.floating)):
                raise CompileError(f"Value of the fixed input {name!r} must be a number or "
                                   f"{RANGE!r}, not {value!r}")

    def to_dict(self) -> dict:
        """As a value that ``json.dumps`` takes and ``Interface(**value)`` has been."""
        return asdict(Interface({name: int(size) for name, size in self.axes.items()},
                                {name: value.item() if isinstance(value, np.generic) else value
                                 for name, value in self.fixed.items()}, list(self.outputs)))

    def apply(self, proto: onnx.ModelProto) -> set[str]:
        """Give every input of `proto` a size, and make constants of those that are fixed, whose names
        are returned.

        Raises
        ------
        CompileError
            Something named is not there, an axis stays dynamic, or a value does not fit.
        """
        initializers = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in initializers]
        self._check_names(proto, inputs)
        constants: set[str] = set()
        for value in inputs:
            if not value.type.tensor_type.HasField("shape"):
                raise _without_batch(value)
            dims = list(value.type.tensor_type.shape.dim)
            sizes = [self._size(value.name, axis, dim) for axis, dim in enumerate(dims)]
            if value.name in self.fixed or 0 in sizes[1:] and not any(_is_zero(dim) for dim in dims):
                proto.graph.input.remove(value)
                proto.graph.initializer.append(self._constant(value, sizes))
                constants.add(value.name)
                continue
            _check_frame(value, sizes)
            for dim, size in zip(dims, [1, *sizes[1:]]):
                dim.Clear()
                dim.dim_value = size
        if self.outputs:
            outputs = {value.name: value for value in proto.graph.output}
            kept = [outputs[name] for name in dict.fromkeys(self.outputs)]
            del proto.graph.output[:]
            proto.graph.output.extend(kept)
        return constants

    def _size(self, name: str, axis: int, dim: _Dimension) -> int | None:
        """Elements along an axis; None where nothing says how many. That of the batch is 1."""
        if dim.HasField("dim_value"):
            return dim.dim_value
        sizes = [self.axes.get(f"{name}.{axis}", self.axes.get(dim.dim_param))]
        if sizes == [None] and dim.dim_param:  # past_sequence_length + sequence_length
            terms = [term.strip() for term in dim.dim_param.split("+")]
            sizes = [int(term) if term.isdecimal() else self.axes.get(term) for term in terms]
        if axis == 0 and None in sizes:
            return 1
        return None if None in sizes else sum(sizes)

    def _constant(self, value: onnx.ValueInfoProto, sizes: list[int | None]) -> onnx.TensorProto:
        if None in sizes:
            raise _dynamic(value, sizes.index(None))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        number = self.fixed.get(value.name, 0)
        if number == RANGE:
            number = np.arange(sizes[-1] if sizes else 1)
        array = np.broadcast_to(np.asarray(number), sizes)
        if not np.array_equal(array.astype(dtype), array):
            raise CompileError(f"Value of the fixed input {value.name!r} must be of its type {dtype}, "
                               f"not {self.fixed[value.name]}")
        return numpy_helper.from_array(array.astype(dtype), value.name)

    def _check_names(self, proto: onnx.ModelProto, inputs: list[onnx.ValueInfoProto]) -> None:
        dims = {f"{value.name}.{axis}": dim for value in inputs
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
                if not dim.HasField("dim_value")}
        named = {term.strip() for dim in dims.values() for term in dim.dim_param.split("+")}
        for what, given, known in (
                ("Axis", self.axes, {*dims, *named} - {""}),
                ("Fixed input", self.fixed, {value.name for value in inputs}),
                ("Output", self.outputs, {value.name for value in proto.graph.output})):
            for name in given:
                if name not in known:
                    kind = "dynamic axes" if what == "Axis" else f"{what.split()[-1].lower()}s"
                    raise CompileError(f"{what} to set must be one of the model's {kind} "
                                       f"{sorted(known)}, not {name!r}")


def _is_zero(dim: _Dimension) -> bool:
    return dim.HasField("dim_value") and not dim.dim_value


def _without_batch(value: onnx.ValueInfoProto) -> CompileError:
    return CompileError(
        f"Graph input {value.name!r} must have a shape whose first axis is the batch; export with example "
        f"inputs of fixed size, name the values of an integer that is chosen per run (--choices "
        f"{value.name}=0,1), or give it the one that it always has (--fix {value.name}=0)")


def _check_frame(value: onnx.ValueInfoProto, sizes: list[int | None]) -> None:
    """That an input is one of frames, each of a size that is known."""
    if not sizes:
        raise _without_batch(value)
    batch, *rest = sizes
    if batch != 1:
        raise CompileError(
            f"Batch axis of graph input {value.name!r} must be dynamic or 1, not {batch}; export with a "
            f"batch of one frame")
    for axis, size in enumerate(rest, start=1):
        if size is None:
            raise _dynamic(value, axis)
        if size <= 0:
            raise CompileError(f"Axis {axis} of graph input {value.name!r} must be positive, not "
                               f"{size}; export with a non-empty example input")


def _dynamic(value: onnx.ValueInfoProto, axis: int) -> CompileError:
    name = value.type.tensor_type.shape.dim[axis].dim_param
    named = name if name and "+" not in name else f"{value.name}.{axis}"
    return CompileError(
        f"Axis {axis} of graph input {value.name!r} must be fixed, not dynamic ({name or 'unnamed'}); "
        f"only the batch axis may be dynamic: say its size (--axis {named}=64), or export without "
        f"dynamic axes")
