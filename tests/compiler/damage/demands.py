"""Nodes that ask for more than there is: memory, calls, iterations, depth."""

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper

from .kinds import EXTREMES, HUGE, constant, damage, prepend, reduced


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
    names = [start, *(f"twice_{number}" for number in range(draw.choice([30, 60])))]
    nodes = [helper.make_node("Concat", [name, name], [double], axis=-1)
             for name, double in itertools.pairwise(names)]
    prepend(model, draw, [*nodes, *reduced(model, names[-1])], "extra_one")


@damage
def split_sizes(model, draw):
    value = model.graph.input[0].name
    lengths = constant(model, [draw.choice([*EXTREMES, 2, 3]) for _ in range(draw.randint(1, 3))])
    names = [f"extra_part{number}" for number in range(draw.choice([1, 2, 3, 500]))]
    node = helper.make_node("Split", [value, lengths], names, axis=-1)
    prepend(model, draw, [node, *reduced(model, names[0])], "extra_one")
