"""Operators on integers that carry their scales (ONNX Runtime's QOperator format), as the float operator
between DequantizeLinear and QuantizeLinear that each of them stands for."""

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["expand_qoperators"]

# Operator: the float operator, places of its operands (value, scale, zero point), place of the result's
# scale, before its zero point, and that of the bias (-1: none).
_FORMS: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "QLinearMatMul": ("MatMul", (0, 3), 6, -1),
    "QLinearConv": ("Conv", (0, 3), 6, 8),
    "QGemm": ("Gemm", (0, 3), 7, 6),
    "QLinearAdd": ("Add", (0, 3), 6, -1),
    "QLinearMul": ("Mul", (0, 3), 6, -1),
    "QLinearSigmoid": ("Sigmoid", (0,), 3, -1),
    "QLinearSoftmax": ("Softmax", (0,), 3, -1),
    "QLinearConcat": ("Concat", (), 0, -1),  # operands behind the scale, as many as there are
}
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_CHANNELS = {"Conv": 0, "Gemm": 1, "MatMul": 1}  # axis of a weight's output channels


def expand_qoperators(model: ir.Model) -> None:
    """Replace each operator of the table by its float operator between Dequantize- and
    QuantizeLinear."""
    for node in list(model.graph):
        if node.domain in _DOMAINS and node.op_type in _FORMS:
            _expand(model, node)


def _expand(model: ir.Model, node: ir.Node) -> None:
    operator, places, result, bias = _FORMS[node.op_type]
    given = [*node.inputs, *[None] * 9]
    places = places or range(2, len(node.inputs), 3)
    attributes = {name: each for name, each in node.attributes.items() if name != "opset"}
    axis = _CHANNELS.get(operator, 0)
    if operator == "Gemm" and "transB" in attributes and attributes["transB"].value:
        axis = 0
    made: list[ir.Node] = []

    def add(name: str, inputs: Sequence[ir.Value | None], **more) -> ir.Value:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        made.append(ir.node(name, inputs, more, name=f"{node.name}_{name}_{len(made)}"))
        made[-1].outputs[0].name = f"{node.outputs[0].name}_{name}_{len(made)}"
        return made[-1].outputs[0]

    reals = [add("DequantizeLinear", given[place:place + 3], axis=axis if place else 1)
             for place in places]
    if bias >= 0 and given[bias] is not None:
        scale = add("Mul", [given[places[0] + 1], given[places[1] + 1]])
        reals.append(add("DequantizeLinear", [given[bias], scale], axis=0))
    made.append(ir.node(operator, reals, attributes, name=node.name))
    made[-1].outputs[0].name = f"{node.outputs[0].name}_real"
    output = made[-1].outputs[0]
    if given[result] is not None:  # QGemm gives floats where its result has no scale
        output = add("QuantizeLinear", [output, *given[result:result + 2]])
    model.graph.insert_before(node, made)
    name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    node.outputs[0].name, output.name = output.name, name
    model.graph.remove(node, safe=True)
