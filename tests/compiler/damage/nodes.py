"""Damage to nodes: edges, operators, attributes, operands."""

import onnx
from onnx import TensorProto, helper

from .kinds import EXTREMES, attributes, constant, damage, edges, pick, prepend, reduced

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
