"""Routing and experts."""

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import FEW_TOKENS
from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.quantise.state import State
from moeware.compiler.scales import (
    FUNCTION,
    encode_scale,
    function_table,
    shifted_grid,
)
from moeware.compiler.weights import Tensor, quantise_weights, scaled_weights
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q

__all__ = ["Experts"]


class Experts(State):
    """Rules for Route and Experts."""

    def _Route(self, node, k, normalise):
        source = self._tensor(node.inputs[0])
        # One step for all experts: their logits are compared with one another.
        weight, bias, accumulator = quantise_weights(*self._constants(node), source, per_tensor=True)
        octave = 1 << numerics.OCTAVE_BITS
        multiplier, shift = encode_scale(float(accumulator[0]) * math.log2(math.e) * octave)
        self._add(q.Route(name=node.name, output=node.outputs[0].name, source=source.tensor,
                          weight=weight, bias=bias, chosen=k, over_chosen=normalise == "chosen",
                          multiplier=multiplier, shift=shift))

    def _Experts(self, node, function):
        self.pending[node.outputs[0].name] = node

    def _experts(self, node: ir.Node, stream: Tensor, output: str) -> None:
        function = attributes(node)["function"]
        source = self._tensor(node.inputs[0])
        w1, b1, w2, b2 = self._constants(node, 3)
        before = shifted_grid(self._expert_samples(node, "hidden"), of=FUNCTION[function])
        after = shifted_grid(self._expert_samples(node, "activation"))
        bits = [self.precision.of(f"{node.name}/expert{e}", node.name, "experts")
                for e in range(len(w1))]
        mean = self._expert_samples(node, "activation").mean(0)
        hidden = Tensor("", after[0], offset=after[1], mean=mean)
        sources, hiddens = [source] * len(w1), [hidden] * len(w1)
        for e in np.flatnonzero(np.array(bits) < 8):
            inputs, gates = self._expert_inputs(node, e)
            activation = FUNCTION[function](inputs @ w1[e].T + b1[e])
            sources[e] = self._informed(source, inputs, gates**2)
            hiddens[e] = self._informed(hidden, activation, gates**2)
        up, up_affine = _stacked(w1, b1 - before[1], sources, bits, before[0], 8)
        down, down_affine = _stacked(w2, b2, hiddens, bits, self.stream_step, 16)
        self._add(q.Experts(
            name=node.name, output=output, source=source.tensor, residual=stream.tensor,
            route=node.inputs[1].name, up=up,
            up_affine=up_affine, table=function_table(function, before, after), down=down,
            down_affine=down_affine, bits=np.array(bits, np.uint8)))

    def _expert_inputs(self, node: ir.Node, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that reach an expert and their gate weights; where they are too few to tell, what
        reaches the layer, equally weighted."""
        samples = self.calibration.samples
        inputs = samples.get(f"{node.name}/expert{expert}/input")
        if inputs is None or len(inputs) < FEW_TOKENS:
            inputs = self.calibration.rows(node.inputs[0].name)
            return inputs, np.ones(len(inputs))
        return inputs, samples[f"{node.name}/expert{expert}/gate"][:, 0]

    def _expert_samples(self, node: ir.Node, stage: str) -> np.ndarray:
        names = [f"{node.name}/expert{e}/{stage}" for e in range(shape(node.inputs[3])[0])]
        found = [self.calibration.samples[name] for name in names
                 if name in self.calibration.samples]
        if not found:
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return np.concatenate(found)


def _stacked(weight, bias, sources, bits, step, result_bits) -> tuple[np.ndarray, q.Affine]:
    """Each expert's `scaled_weights` for its own source, one behind the other."""
    integers, affines = zip(*(
        scaled_weights(*each, step, result_bits, limit=WEIGHT_BITS[b])
        for *each, b in zip(weight, bias, sources, bits, strict=True)))
    return np.stack(integers), q.Affine(**{
        field.name: np.stack([getattr(affine, field.name) for affine in affines])
        for field in dataclasses.fields(q.Affine)})
