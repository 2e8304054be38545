"""Canonical graphs with gated linear units, as the front end would hand them on."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import DOMAIN, PLAIN_ROUTE, verify

__all__ = ["Canonical", "gated_model"]

SIDE, PATCH, CHANNELS = 8, 4, 2


class Canonical:
    """Nodes of a canonical graph, one after the other; each method returns a value."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.image = self._value("image", (1, CHANNELS, SIDE, SIDE))

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph([self.image], outputs, nodes=self.nodes, initializers=self.constants,
                         opset_imports={"": 20, DOMAIN: 1}, name="graph")
        model = ir.Model(graph, ir_version=10)
        verify(model)
        return model

    def add(self, operator: str, inputs: list, *outputs: tuple[int, ...], **attributes):
        """The value, or values, of a node whose constant inputs are given as arrays."""
        name = f"{operator}_{len(self.nodes)}"
        given = [self._constant(f"{name}/{place}", each) if isinstance(each, np.ndarray) else each
                 for place, each in enumerate(inputs)]
        node = ir.node(operator, given, attributes, domain=DOMAIN, name=name,
                       num_outputs=len(outputs), metadata_props={"sources": "[]"})
        for place, (value, shape) in enumerate(zip(node.outputs, outputs)):
            value.name, value.shape = f"{name}/out{place}", ir.Shape(shape)
            value.dtype = ir.DataType.FLOAT
        if operator == "Route":
            node.outputs[0].dtype = ir.DataType.INT64
            node.outputs[0].name, node.outputs[1].name = f"{name}.indices", f"{name}.weights"
        self.nodes.append(node)
        return node.outputs[0] if len(outputs) == 1 else node.outputs

    def start(self, width: int) -> ir.Value:
        rows, features = (SIDE // PATCH) ** 2, CHANNELS * PATCH * PATCH
        x = self.add("PatchEmbed", [self.image, *self.layer(width, features)], (1, rows, width),
                     ph=PATCH, pw=PATCH, channels=CHANNELS, height=SIDE, width=SIDE)
        return self.add("AddConstant", [x, self.normal(rows, width)], tuple(x.shape))

    def norm(self, x: ir.Value) -> ir.Value:
        channels = x.shape[-1]
        return self.add("LayerNorm", [x, 1 + 0.3 * self.normal(channels), 0.3 * self.normal(channels)],
                        tuple(x.shape), epsilon=1e-5)

    def linear(self, x: ir.Value, channels: int) -> ir.Value:
        return self.add("Linear", [x, *self.layer(channels, x.shape[-1])],
                        (*x.shape[:-1], channels))

    def pointwise(self, x: ir.Value, function: str) -> ir.Value:
        return self.add("Pointwise", [x], tuple(x.shape), function=function)

    def multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.add("Multiply", [a, b], tuple(a.shape))

    def residual(self, x: ir.Value, branch: ir.Value) -> ir.Value:
        return self.add("Add", [x, branch], tuple(x.shape))

    def gated_experts(self, x: ir.Value, experts: int, chosen: int, hidden: int,
                      function: str) -> ir.Value:
        _, rows, width = x.shape
        gate = [*self.layer(experts, width), np.zeros(experts, np.float32)]
        indices, weights = self.add("Route", [x, *gate], (1, rows, chosen), (1, rows, chosen), k=chosen,
                                    normalise="chosen", **PLAIN_ROUTE)
        layers = [array for shape in ((hidden, width), (width, hidden), (hidden, width))
                  for array in self.layer(experts, *shape)]
        return self.add("GatedExperts", [x, indices, weights, *layers], (1, rows, width),
                        function=function)

    def layer(self, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight of such a shape, and bias."""
        return self.normal(*shape) / np.float32(np.sqrt(shape[-1])), 0.2 * self.normal(*shape[:-1])

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape).astype(np.float32)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = self._value(name, array.shape)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        self.constants.append(value)
        return value

    @staticmethod
    def _value(name: str, shape: tuple[int, ...]) -> ir.Value:
        return ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))


def gated_model(seed: int = 0, *, width: int = 20, hidden: int = 27, experts: int = 4,
                chosen: int = 2, function: str | None = "silu", swapped: bool = False) -> ir.Model:
    """A dense and a routed gated block, and a head; function : of the dense gate, or None; swapped :
    the dense gate is the second operand."""
    made = Canonical(seed)
    x = made.start(width)
    y = made.norm(x)
    gate = made.linear(y, hidden)
    gate = gate if function is None else made.pointwise(gate, function)
    operands = gate, made.linear(y, hidden)
    h = made.multiply(*operands[::-1] if swapped else operands)
    x = made.residual(x, made.linear(h, width))
    y = made.norm(x)
    x = made.residual(x, made.gated_experts(y, experts, chosen, hidden, function or "silu"))
    y = made.norm(x)
    pooled = made.add("MeanTokens", [y], (1, width))
    return made.model(made.linear(pooled, 5))
