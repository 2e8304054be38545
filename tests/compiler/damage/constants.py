"""Damage to initializers and inputs: types, shapes, values."""

import numpy as np
from onnx import helper, numpy_helper

from .kinds import EXTREMES, HUGE, Unfit, assign, damage, integers, pick, weights


@damage
def missing_initializer(model, draw):
    model.graph.initializer.remove(pick(draw, model.graph.initializer))


@damage
def repeated_initializer(model, draw):
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(pick(draw, model.graph.initializer))
    if tensor.raw_data:
        tensor.raw_data = bytes(len(tensor.raw_data))


@damage
def initializer_type(model, draw):
    kinds = [*range(-1, 30), 2**31 - 1]
    pick(draw, model.graph.initializer).data_type = draw.choice(kinds)


@damage
def initializer_dims(model, draw):
    tensor = pick(draw, model.graph.initializer)
    if tensor.dims and draw.random() < 0.6:
        tensor.dims[draw.randrange(len(tensor.dims))] += draw.choice([-3, -1, 1, 5])
    else:
        tensor.dims.insert(0, draw.choice([-1, 2, 3]))


@damage
def initializer_bytes(model, draw):
    tensor = pick(draw, [each for each in model.graph.initializer if each.raw_data])
    tensor.raw_data = draw.choice([tensor.raw_data[:-1], tensor.raw_data * 2, b"", b"\0"])
    if draw.random() < 0.3:
        tensor.float_data.extend([1.0, 2.0])


@damage
def wrong_rank(model, draw):
    tensor = pick(draw, model.graph.initializer)
    array = numpy_helper.to_array(tensor)
    forms = [array.reshape(-1), array[None], array[..., None], array.T, array.reshape(1, -1, 1)]
    assign(tensor, draw.choice(forms))


@damage
def zero_size(model, draw):
    tensor = pick(draw, model.graph.initializer)
    array = numpy_helper.to_array(tensor)
    if array.ndim and draw.random() < 0.7:
        assign(tensor, np.take(array, [], draw.randrange(array.ndim)))
    else:
        dims = pick(draw, model.graph.input).type.tensor_type.shape.dim
        draw.choice(dims).dim_value = 0


@damage
def huge_dims(model, draw):
    tensor = pick(draw, model.graph.initializer)
    dims = [draw.choice([*HUGE, 1, 2]) for _ in range(draw.randint(1, 4))]
    tensor.dims[:] = dims if draw.random() < 0.5 else [draw.choice(HUGE), *tensor.dims[1:]]
    if draw.random() < 0.3:
        tensor.ClearField("raw_data")


@damage
def input_dims(model, draw):
    shape = pick(draw, model.graph.input).type.tensor_type.shape
    choice = draw.randrange(4)
    if choice == 0:
        shape.dim.pop()
    elif choice == 1:
        shape.dim.add().dim_value = 3
    else:
        draw.choice(shape.dim).dim_value = draw.choice([*EXTREMES, 3, 5, 30000])


@damage
def input_type(model, draw):
    value = pick(draw, model.graph.input)
    if draw.random() < 0.7:
        value.type.tensor_type.elem_type = draw.choice([*range(30), 2**31 - 1])
    elif draw.random() < 0.5:
        value.type.CopyFrom(helper.make_sequence_type_proto(value.type))
    else:
        value.ClearField("type")


@damage
def int64_overflow(model, draw):
    tensor = pick(draw, integers(model))
    array = numpy_helper.to_array(tensor).copy()
    if not array.size:
        raise Unfit
    array.reshape(-1)[draw.randrange(array.size)] = draw.choice(EXTREMES)
    assign(tensor, array)


@damage
def weights_not_finite(model, draw):
    tensor = pick(draw, weights(model))
    array = numpy_helper.to_array(tensor).copy()
    count = draw.choice([1, array.size])
    array.reshape(-1)[:count] = draw.choice([np.nan, np.inf, -np.inf, 3e38, -1e30, 1e-45])
    assign(tensor, array)


@damage
def odd_initializers(model, draw):
    tensor = pick(draw, model.graph.initializer)
    array = numpy_helper.to_array(tensor)
    choice = draw.randrange(4)
    if choice == 0:
        assign(tensor, array.astype(draw.choice([np.float16, np.float64, np.int8, np.uint64, bool])))
    elif choice == 1:
        assign(tensor, array.astype(str).astype(object))
    elif choice == 2:
        indices = numpy_helper.from_array(np.array([draw.choice(EXTREMES)]), "")
        values = numpy_helper.from_array(np.ones(1, np.float32), tensor.name)
        sparse = helper.make_sparse_tensor(values, indices, draw.choice([[4], [2**40], [2**20] * 3]))
        model.graph.sparse_initializer.append(sparse)
        model.graph.initializer.remove(tensor)
    else:
        tensor.segment.begin, tensor.segment.end = 0, 2**40
