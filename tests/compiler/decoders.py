"""Canonical graphs of language models' blocks, with random weights."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import calibrate
from moeware.compiler.canonical import DOMAIN, verify
from moeware.compiler.partition import partition
from moeware.compiler.quantise import QuantisedStep, quantise

__all__ = ["Decoder", "quantised", "rotary_factors"]


def rotary_factors(tokens: int, width: int, base: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [tokens, width / 2] as models have them."""
    angles = np.outer(np.arange(tokens), base ** (-np.arange(0, width, 2) / width))
    return np.cos(angles), np.sin(angles)


class Decoder:
    """Builds a canonical graph on an input ``embedded`` [1, tokens, features], which a host node
    makes the stream ``x``; methods return values."""

    def __init__(self, seed: int, tokens: int, features: int):
        self.random, self.tokens = np.random.default_rng(seed), tokens
        shape = ir.Shape((1, tokens, features))
        self.input = ir.val("embedded", dtype=ir.DataType.FLOAT, shape=shape)
        host = ir.node("Identity", [self.input], name="host")
        (self.x,) = host.outputs
        self.x.name, self.x.dtype, self.x.shape = "x", ir.DataType.FLOAT, shape
        self.nodes: list[ir.Node] = [host]
        self.weights: list[ir.Value] = []

    def weight(self, array: np.ndarray) -> ir.Value:
        name = f"weight{len(self.weights)}"
        value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(np.shape(array)))
        value.const_value = ir.tensor(np.asarray(array, np.float32), name=name)
        self.weights.append(value)
        return value

    def node(self, operator: str, *inputs: ir.Value, channels: int | None = None,
             **attributes) -> ir.Value:
        """One node whose output has the shape of its first input, but for the number of channels."""
        name = f"{operator}{len(self.nodes)}"
        node = ir.node(operator, list(inputs), attributes, domain=DOMAIN, name=name,
                       metadata_props={"sources": "[]"})
        self.nodes.append(node)
        (value,) = node.outputs
        *rows, features = inputs[0].shape
        value.name, value.dtype = f"{name}.y", ir.DataType.FLOAT
        value.shape = ir.Shape((*rows, channels or features))
        return value

    def gamma(self, channels: int) -> ir.Value:
        """Of both signs, and some near 0."""
        return self.weight(self.random.normal(size=channels))

    def norm(self, x: ir.Value, groups: int = 1, epsilon: float = 1e-5) -> ir.Value:
        return self.node("RMSNorm", x, self.gamma(int(x.shape[-1])), epsilon=epsilon, groups=groups)

    def linear(self, x: ir.Value, channels: int, bias: float = 0.0) -> ir.Value:
        features = int(x.shape[-1])
        weight = self.random.normal(size=(channels, features)) / np.sqrt(features)
        return self.node("Linear", x, self.weight(weight),
                         self.weight(bias * self.random.normal(size=channels)), channels=channels)

    def rotary(self, x: ir.Value, heads: int, scale: float = 1.0) -> ir.Value:
        factors = rotary_factors(self.tokens, int(x.shape[-1]) // heads)
        return self.node("Rotary", x, *(self.weight(scale * each) for each in factors), heads=heads)

    def block(self, x: ir.Value, heads: int, kv_heads: int, width: int, hidden: int, *,
              norm: str | None = None, rotary: bool = True, bias: float = 0.0,
              scale: float = 1.0) -> ir.Value:
        """norm : of queries and keys, over all "heads", over "each", or None."""
        y, features = self.norm(x), int(x.shape[-1])
        q, k, v = (self.linear(y, count * width, bias) for count in (heads, kv_heads, kv_heads))
        turned = []
        for value, count in ((q, heads), (k, kv_heads)):
            if norm:
                value = self.norm(value, count if norm == "each" else 1)
            turned.append(self.rotary(value, count, scale) if rotary else value)
        y = self.node("Attention", *turned, v, heads=heads, kv_heads=kv_heads, scale=width**-0.5,
                      causal=1)
        x = self.node("Add", x, self.linear(y, features))
        y = self.node("Pointwise", self.linear(self.norm(x), hidden), function="silu")
        return self.node("Add", x, self.linear(y, features))

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph([self.input], outputs, nodes=self.nodes, initializers=self.weights,
                         opset_imports={"": 20, DOMAIN: 1}, name="decoder")
        made = ir.Model(graph, ir_version=10)
        verify(made)
        return made


def quantised(model: ir.Model, x: np.ndarray) -> QuantisedStep:
    """The step that all but the first node of `model` is, calibrated with inputs [frames, tokens,
    features]."""
    host, step = partition(model).steps
    assert (len(host.nodes), step.kind) == (1, "fpga"), host.reasons
    return quantise(step.nodes, step.inputs, step.outputs, calibrate(model, {"embedded": x}))
