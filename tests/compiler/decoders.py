"""Canonical graphs of language models' blocks, with random weights."""

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import calibrate
from moeware.compiler.canonical import DOMAIN, verify
from moeware.compiler.partition import partition
from moeware.compiler.quantise import QuantisedStep, quantise
from moeware.compiler.reference import evaluate
from moeware.hw.arch.program import Program
from moeware.runtime.torch_path import TorchDevice

__all__ = ["Decoder", "loss", "quantised", "rotary_factors"]


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

    def weight(self, array: np.ndarray, dtype: type = np.float32) -> ir.Value:
        name, array = f"weight{len(self.weights)}", np.asarray(array, dtype)
        value = ir.val(name, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=name)
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

    def join(self, a: ir.Value, b: ir.Value, heads: int) -> ir.Value:
        """Heads with the channels of b, which all of them share, at the beginning of both halves and
        each its own of a behind them."""
        plain, turned = int(a.shape[-1]), int(b.shape[-1])
        own = np.arange(plain).reshape(heads, 2, -1)
        shared = np.broadcast_to(plain + np.arange(turned).reshape(1, 2, -1), (heads, 2, turned // 2))
        columns = np.concatenate([shared, own], -1).ravel()
        return self.node("Join", a, b, self.weight(columns, np.int64), channels=len(columns))

    def latent(self, x: ir.Value, heads: int, plain: int, turned: int, value: int, rank: int,
               query_rank: int = 0, *, joined: bool = False, bias: float = 0.0) -> ir.Value:
        """Multi-head latent attention. plain : channels of a head that are made of a normalised latent
        of `rank` channels; turned : of one that all heads share; value : of a head of values;
        query_rank : of the latent of queries, if any; joined : whether queries are joined, too."""
        y, features, width = self.norm(x), int(x.shape[-1]), plain + turned
        latent = self.norm(self.linear(y, rank, bias))
        of_query = self.norm(self.linear(y, query_rank, bias)) if query_rank else y
        join = lambda source: self.join(self.linear(source, heads * plain),
                                        self.linear(y, turned, bias), heads)
        q = join(of_query) if joined else self.linear(of_query, heads * width)
        k = join(latent)
        passing = np.ones((self.tokens, plain // 2)), np.zeros((self.tokens, plain // 2))
        factors = [self.weight(np.hstack(pair))
                   for pair in zip(rotary_factors(self.tokens, turned), passing)]
        q, k = (self.node("Rotary", each, *factors, heads=heads) for each in (q, k))
        y = self.node("Attention", q, k, self.linear(latent, heads * value, bias), heads=heads,
                      kv_heads=heads, scale=width**-0.5, causal=1, channels=heads * value)
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


def loss(model: ir.Model, step: QuantisedStep, compiled: Program, x: np.ndarray) -> float:
    """Error of the integers of `compiled`, made of `step`, against the float model: root mean square,
    in proportion to that of the results."""
    (expected,) = evaluate(model, {"embedded": x}).values()
    (entry,), (port,) = step.inputs, step.outputs
    found = TorchDevice().run(compiled, compiled.steps[0], {entry.tensor: entry.quantise(x)})
    error = port.dequantise(found[port.tensor]) - expected
    return float(np.sqrt(np.square(error).mean() / np.square(expected).mean()))
