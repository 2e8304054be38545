"""Damaged ONNX files, seeded: each is a valid model with one thing broken.

A kind of damage is a function that breaks a copy of a model in place, or returns the bytes of its
file. ``weights.bin`` (64 bytes), ``sparse.bin`` (3 GB of nothing) and ``../outside.bin`` are
expected beside a file: external data refers to them.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["KINDS", "Case", "case"]

Damage = Callable[[onnx.ModelProto, random.Random], "bytes | None"]

EXTREMES = (-(2**63), -(2**31) - 1, -7, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
HUGE = (2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1)
KINDS: dict[str, Damage] = {}


@dataclass(frozen=True)
class Case:
    """A file ``name`` (its suffix says its format) with the bytes ``data``, and what was done."""

    seed: int
    kind: str
    model: str
    name: str
    data: bytes


class Unfit(Exception):
    """The model has nothing that this kind of damage breaks."""


def case(seed: int, models: Mapping[str, onnx.ModelProto]) -> Case:
    """The damaged file of ``seed``: the kinds take turns, all else is drawn."""
    kind = list(KINDS)[seed % len(KINDS)]
    draw = random.Random(seed)
    for name in draw.sample(sorted(models), len(models)):
        model = onnx.ModelProto()
        model.CopyFrom(models[name])
        try:
            data = KINDS[kind](model, draw)
        except Unfit:
            continue
        suffix = "onnxtxt" if kind == "text" else "onnx"
        return Case(seed, kind, name, f"damaged.{suffix}", data or model.SerializeToString())
    raise AssertionError(f"no model has anything for {kind!r}")


def damage(function: Damage) -> Damage:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def pick(draw: random.Random, items):
    items = list(items)
    if not items:
        raise Unfit
    return draw.choice(items)


def attributes(model, *types):
    found = [entry for node in model.graph.node for entry in node.attribute]
    return [entry for entry in found if entry.type in types or not types]


def edges(model):
    """(node, index) of every operand that is computed or a graph input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    return [(node, index) for node in model.graph.node for index, name in enumerate(node.input)
            if name and name not in constants]


def integers(model, size=None):
    """int64 constants, as initializers and as Constant nodes."""
    tensors = [*model.graph.initializer, *(entry.t for entry in attributes(model)
                                           if entry.type == onnx.AttributeProto.TENSOR)]
    return [tensor for tensor in tensors if tensor.data_type == TensorProto.INT64]


def weights(model):
    return [tensor for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims)]


def assign(tensor, array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def constant(model, values, dtype=np.int64) -> str:
    name = f"extra_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
    return name


def prepend(model, draw, nodes, result: str) -> None:
    """Put ``nodes`` before all others and add ``result`` to an operand of one of them."""
    node, index = pick(draw, edges(model))
    place = list(model.graph.node).index(node)
    after = [onnx.NodeProto.FromString(each.SerializeToString()) for each in model.graph.node]
    after.insert(place, helper.make_node("Add", [node.input[index], result], ["extra_sum"]))
    after[place + 1].input[index] = "extra_sum"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *after])


def reduced(model, name: str) -> list[onnx.NodeProto]:
    """Nodes that make one number ``extra_one`` of ``name``."""
    axes = constant(model, [-1])
    return [helper.make_node("Reshape", [name, axes], ["extra_flat"]),
            helper.make_node("Gather", ["extra_flat", constant(model, 0)], ["extra_one"])]


# Damage to bytes.

@damage
def bit_flips(model, draw):
    data = bytearray(model.SerializeToString())
    reach = len(data) // draw.choice([1, 8])  # the nodes come first, then the weights
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(data)


@damage
def truncation(model, draw):
    data = model.SerializeToString()
    return data[:draw.randrange(1, len(data))]


@damage
def spliced_bytes(model, draw):
    data = model.SerializeToString()
    first, second = sorted(draw.sample(range(len(data) // draw.choice([1, 8])), 2))
    return data[:first] + draw.choice([b"", draw.randbytes(8), 2 * data[first:second]]) + data[second:]


@damage
def length_of_2_gb(model, draw):
    data = model.SerializeToString()
    parts = [model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input]
    body = pick(draw, parts).SerializeToString()
    start = data.index(body)
    length = len(varint(len(body)))
    return data[:start - length] + varint(draw.choice([2**31 - 1, 2**31, 2**63])) + data[start:]


def varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


@damage
def text(model, draw):
    if model.ByteSize() > 4000:
        raise Unfit
    data = onnx.printer.to_text(model)
    first, second = sorted(draw.sample(range(len(data)), 2))
    second = min(second, first + draw.randint(1, 12))
    middle = draw.choice(["", "{", ">", "-1", "99999999999999999999", "é\0", data[first:second] * 2])
    return (data[:first] + middle + data[second:]).encode()


# Damage to the graph.

@damage
def deleted_node(model, draw):
    model.graph.node.remove(pick(draw, model.graph.node))


@damage
def repeated_node(model, draw):
    model.graph.node.insert(draw.randrange(len(model.graph.node)), pick(draw, model.graph.node))


@damage
def equal_node_names(model, draw):
    for node in draw.sample(list(model.graph.node), min(3, len(model.graph.node))):
        node.name = "twin"


@damage
def swapped_edges(model, draw):
    (node, index), (other, second) = pick(draw, edges(model)), pick(draw, edges(model))
    node.input[index], other.input[second] = other.input[second], node.input[index]


@damage
def swapped_operands(model, draw):
    node = pick(draw, [node for node in model.graph.node if len(node.input) > 1])
    first, second = draw.sample(range(len(node.input)), 2)
    node.input[first], node.input[second] = node.input[second], node.input[first]


@damage
def cycle(model, draw):
    node, index = pick(draw, edges(model))
    place = list(model.graph.node).index(node)
    node.input[index] = draw.choice(list(model.graph.node)[place:]).output[0]


@damage
def disorder(model, draw):
    nodes = list(model.graph.node)
    draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


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
def unknown_operator(model, draw):
    node = pick(draw, model.graph.node)
    node.op_type = draw.choice(["Quantum", "", node.op_type.lower(), "Linear", "If", "Loop", "Add"])


@damage
def unknown_domain(model, draw):
    domain = draw.choice(["example.com", "moeware", "ai.onnx.ml", "com.microsoft", "é"])
    node = pick(draw, model.graph.node)
    node.domain = domain
    if domain == "moeware" and draw.random() < 0.7:
        node.op_type = draw.choice(["Linear", "Experts", "Attention", "Add"])
    if draw.random() < 0.7:
        model.opset_import.add(domain=domain, version=draw.choice([1, 2**40]))


@damage
def versions(model, draw):
    if draw.random() < 0.5:
        model.opset_import[0].version = draw.choice([*EXTREMES, 9, 13, 19, 22, 24, 25])
    elif draw.random() < 0.5:
        model.ir_version = draw.choice([*EXTREMES, 3, 4, 8, 99])
    else:
        del model.opset_import[:]


def function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, [f"v{number}"], [f"v{number + 1}"],
                              domain="" if call == "Relu" else "local")
             for number, call in enumerate(calls)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["v0"], [f"v{len(calls)}"], nodes, opsets)


def call(model, draw, name: str) -> None:
    source = helper.make_node("Constant", [], ["extra_in"], value_float=1.0)
    prepend(model, draw, [source, helper.make_node(name, ["extra_in"], ["extra_out"],
                                                   domain="local")], "extra_out")
    model.opset_import.add(domain="local", version=1)


@damage
def recursive_functions(model, draw):
    length = draw.randint(1, 4)
    for number in range(length):
        model.functions.append(function(f"f{number}", "Relu", f"f{(number + 1) % length}"))
    call(model, draw, "f0")


@damage
def nested_functions(model, draw):
    depth, width = draw.choice([(3, 2), (8, 10), (30, 4), (2000, 1)])
    model.functions.append(function("f0", "Relu"))
    for number in range(1, depth):
        model.functions.append(function(f"f{number}", *[f"f{number - 1}"] * width))
    if draw.random() < 0.3:
        del model.functions[0]
    call(model, draw, f"f{depth - 1}")


def branch(name: str, nodes, output: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [value])


@damage
def broken_subgraphs(model, draw):
    missing = draw.choice(["nothing", "extra_out", "", model.graph.output[0].name])
    good = branch("good", [helper.make_node("Constant", [], ["a"], value_float=1.0)], "a")
    bad = branch("bad", [helper.make_node("Relu", [missing], ["b"])], draw.choice(["b", "c"]))
    condition = draw.choice([constant(model, True, bool), model.graph.input[0].name, "absent"])
    node = helper.make_node("If", [condition], ["extra_out"], then_branch=bad, else_branch=good)
    prepend(model, draw, [node], "extra_out")


@damage
def deep_subgraphs(model, draw):
    condition = constant(model, True, bool)
    node = helper.make_node("Constant", [], ["deep"], value_float=1.0)
    for number in range(draw.choice([3, 12, 25])):
        other = helper.make_node("Constant", [], ["other"], value_float=2.0)
        node = helper.make_node("If", [condition], [f"deep{number}"],
                                then_branch=branch("a", [node], node.output[0]),
                                else_branch=branch("b", [other], "other"))
    prepend(model, draw, [node], node.output[0])


@damage
def endless_loop(model, draw):
    trips = constant(model, draw.choice([*EXTREMES, 3]))
    go = constant(model, True, bool)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Relu", ["v"], ["w"])],
        "body", [helper.make_tensor_value_info("i", TensorProto.INT64, []),
                 helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                 helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("more", TensorProto.BOOL, []),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, None)])
    start = draw.choice([model.graph.input[0].name, constant(model, 1.0, np.float32)])
    loop = helper.make_node("Loop", [draw.choice([trips, ""]), go, start], ["extra_out"], body=body)
    prepend(model, draw, [loop, *reduced(model, "extra_out")], "extra_one")


@damage
def outputs(model, draw):
    choice = draw.randrange(5)
    if choice == 0:
        model.graph.output.append(helper.make_tensor_value_info("absent", TensorProto.FLOAT, [1]))
    elif choice == 1:
        model.graph.output.append(model.graph.output[0])
    elif choice == 2:
        model.graph.output.append(model.graph.input[0])
    elif choice == 3:
        model.graph.output[0].name = pick(draw, model.graph.initializer).name
    else:
        model.graph.output[0].name = pick(draw, model.graph.node).output[0]


@damage
def empty_parts(model, draw):
    fields = [model.graph.node, model.graph.output, model.graph.input, model.graph.initializer]
    del draw.choice(fields)[:]


@damage
def external_data(model, draw):
    tensor = pick(draw, weights(model))
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = ["weights.bin", "sparse.bin", "../outside.bin", "/dev/zero", "/etc/hostname", ".", "",
                "absent.bin", "a\0b", "x" * 5000]
    entries = {"location": draw.choice(location)}
    if draw.random() < 0.6:
        entries["length"] = draw.choice(["2147483648", "-1", "0", "many", str(2**70), "64"])
    if draw.random() < 0.4:
        entries["offset"] = draw.choice(["2147483648", "-1", "4", "", str(2**63)])
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    if draw.random() < 0.3:
        tensor.dims[0] = draw.choice(HUGE)


@damage
def attribute_type(model, draw):
    entry = pick(draw, attributes(model))
    name, value = entry.name, draw.choice([3, 2.5, "text", [1, 2], [0.5], b"\xff", ["a"]])
    entry.CopyFrom(helper.make_attribute(name, value))
    if draw.random() < 0.3:
        entry.type = draw.choice([0, 3, 5, 10, 14])


@damage
def attribute_value(model, draw):
    types = onnx.AttributeProto
    entry = pick(draw, attributes(model, types.INT, types.INTS, types.FLOAT, types.STRING))
    if entry.type == types.INT:
        entry.i = draw.choice([*EXTREMES, 2, 3, 16])
    elif entry.type == types.INTS and entry.ints:
        entry.ints[draw.randrange(len(entry.ints))] = draw.choice([*EXTREMES, 2, 3])
    elif entry.type == types.FLOAT:
        entry.f = draw.choice([0.0, -1.0, float("nan"), float("inf"), -1e38, 1e-45])
    else:
        entry.s = draw.choice([b"", b"\xff\xfe", b"ab,bc", b"...,...->...", b"->", b"a" * 100000])


@damage
def attribute_list(model, draw):
    node = pick(draw, [node for node in model.graph.node if node.attribute])
    entry = draw.choice(node.attribute)
    if draw.random() < 0.4:
        node.attribute.remove(entry)
    elif draw.random() < 0.5:
        node.attribute.append(entry)
    else:
        entry.name = draw.choice(["", "axis", "unheard"])


@damage
def axis_out_of_range(model, draw):
    names = ("axis", "axes", "perm", "start", "end", "batch_dims")
    entry = pick(draw, [entry for entry in attributes(model) if entry.name in names])
    value = draw.choice([-9, -5, 4, 5, 9, 2**31, -(2**63)])
    entry.CopyFrom(helper.make_attribute(entry.name, [value] * len(entry.ints) or value))


@damage
def k_of_top_k(model, draw):
    node = pick(draw, [node for node in model.graph.node if node.op_type == "TopK"])
    value = draw.choice([*EXTREMES, 5, 6, 100])
    node.input[1] = constant(model, draw.choice([[value], value, [value, value], [[value]]]))


@damage
def shape_of_reshape(model, draw):
    node = pick(draw, [node for node in model.graph.node if node.op_type == "Reshape"])
    size = draw.randint(1, 4)
    node.input[1] = constant(model, [draw.choice([*EXTREMES, 2, 3, 4]) for _ in range(size)])


def sizes(model, draw) -> str:
    return constant(model, [draw.choice([2**14, 2**20, *HUGE]) for _ in range(draw.randint(2, 3))])


@damage
def constants_that_explode(model, draw):
    make, one = helper.make_node, constant(model, [[1.0]], np.float32)
    node, end = draw.choice([
        make("ConstantOfShape", [sizes(model, draw)], ["extra_big"]),
        make("Expand", [one, sizes(model, draw)], ["extra_big"]),
        make("Tile", [one, constant(model, draw.choices(HUGE, k=2))], ["extra_big"]),
        make("RandomNormal", [], ["extra_big"], shape=draw.choices(HUGE, k=2)),
        make("Pad", [one, constant(model, [0, 0, *draw.choices(HUGE, k=2)])], ["extra_big"]),
        make("Resize", [one, "", "", constant(model, draw.choices(HUGE, k=2))], ["extra_big"])]), []
    if draw.random() < 0.3:
        node = make("Range", [constant(model, value) for value in (0, draw.choice(HUGE), 1)],
                    ["extra_range"])
        end = [make("Cast", ["extra_range"], ["extra_big"], to=TensorProto.FLOAT)]
    prepend(model, draw, [node, *end, *reduced(model, "extra_big")], "extra_one")


@damage
def computed_sizes_that_explode(model, draw):
    """The size is known only once what makes it is folded."""
    make, base = helper.make_node, constant(model, draw.choice([[2**16, 2**17], [2**20, 2**11]]))
    nodes = [make("Mul", [base, constant(model, [1, 2])], ["extra_size"]),
             make("ConstantOfShape", ["extra_size"], ["extra_fill"]),
             make("Exp", ["extra_fill"], ["extra_big"])]
    prepend(model, draw, [*nodes, *reduced(model, "extra_big")], "extra_one")


@damage
def broadcasts_that_explode(model, draw):
    size = draw.choice([2**16, 2**18])
    row = constant(model, np.zeros((1, size)), np.float32)
    column = constant(model, np.zeros((size, 1)), np.float32)
    node = helper.make_node(draw.choice(["Add", "MatMul"]), [column, row], ["extra_big"])
    prepend(model, draw, [node, *reduced(model, "extra_big")], "extra_one")


@damage
def values_that_explode(model, draw):
    make, image = helper.make_node, model.graph.input[0].name
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    large = [draw.choice([1, 2**13, 2**20, *HUGE]) for _ in range(rank - 1)]
    node = draw.choice([
        make("Tile", [image, constant(model, [1, *large])], ["extra_big"]),
        make("Pad", [image, constant(model, [0] * (rank + 1) + large)], ["extra_big"]),
        make("Expand", [image, constant(model, [2**40, *[1] * rank])], ["extra_big"])])
    prepend(model, draw, [node, *reduced(model, "extra_big")], "extra_one")


@damage
def concat_that_explodes(model, draw):
    start = draw.choice([model.graph.input[0].name, constant(model, [[1.0] * 4], np.float32)])
    names = [start, *(f"extra_{number}" for number in range(draw.choice([30, 60])))]
    nodes = [helper.make_node("Concat", [name, name], [double], axis=-1)
             for name, double in zip(names, names[1:])]
    prepend(model, draw, [*nodes, *reduced(model, names[-1])], "extra_one")


@damage
def split_sizes(model, draw):
    value = model.graph.input[0].name
    lengths = constant(model, [draw.choice([*EXTREMES, 2, 3]) for _ in range(draw.randint(1, 3))])
    names = [f"extra_part{number}" for number in range(draw.choice([1, 2, 3, 500]))]
    node = helper.make_node("Split", [value, lengths], names, axis=-1)
    prepend(model, draw, [node, *reduced(model, names[0])], "extra_one")


@damage
def names(model, draw):
    name = draw.choice(["", "x" * 10**6, "a\nb\r", "'; --", "é\U0001f600", "../../x", "%s{0}", "\0"])
    choice = draw.randrange(3)
    if choice == 0:
        pick(draw, model.graph.node).name = name
    elif choice == 1:
        pick(draw, model.graph.input).name = name
    else:
        pick(draw, model.graph.node).output[0] = name


@damage
def number_of_operands(model, draw):
    node = pick(draw, model.graph.node)
    if node.input and draw.random() < 0.5:
        del node.input[draw.randrange(len(node.input)):]
    else:
        node.input.extend([draw.choice(edges(model))[0].input[0]] * draw.choice([1, 3, 300]))
    if draw.random() < 0.2:
        node.output.append("extra_output")


@damage
def other_operators(model, draw):
    """Operators of no tensor, with randomness or without a fixed result."""
    make, image = helper.make_node, model.graph.input[0].name
    zero = constant(model, 0)
    prepend(model, draw, draw.choice([
        [make("SequenceConstruct", [image], ["q"]), make("SequenceAt", ["q", zero], ["extra_r"])],
        [make("Optional", [image], ["o"]), make("OptionalGetElement", ["o"], ["extra_r"])],
        [make("NonZero", [image], ["n"]), make("Cast", ["n"], ["extra_r"], to=1)],
        [make("RandomUniformLike", [image], ["extra_r"])],
        [make("Div", [zero, zero], ["d"]), make("Cast", ["d"], ["extra_r"], to=1)],
        [make("Mod", [zero, zero], ["d"]), make("Cast", ["d"], ["extra_r"], to=1)],
        [make("StringNormalizer", [image], ["extra_r"])],
        [make("Cast", [image], ["s"], to=8), make("Cast", ["s"], ["extra_r"], to=1)],
    ]) + reduced(model, "extra_r"), "extra_one")


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


@damage
def recorded_shapes(model, draw):
    """``value_info`` that lies."""
    for node in model.graph.node:
        shape = [draw.choice([*EXTREMES, 3, "n"]) for _ in range(draw.randint(0, 4))]
        info = helper.make_tensor_value_info(node.output[0], draw.choice([1, 7, 11]), None)
        for size in shape:
            dim = info.type.tensor_type.shape.dim.add()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
        model.graph.value_info.append(info)
