"""Routing and experts."""

import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.kept_weights import kept_weights, usable_integers
from moeware.compiler.quantise.state import State
from moeware.compiler.scales import (
    FUNCTION,
    encode_scale,
    function_table,
    shifted_grid,
)
from moeware.compiler.weights import Tensor, quantise_weights
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q

__all__ = ["Experts"]


class Experts(State):
    """Rules for Route and Experts."""

    def _Route(self, node, k, normalise):
        source = self._tensor(node.inputs[0])
        # One step for all experts: their logits are compared with one another.
        weight, bias = self._constants(node)
        integers = usable_integers(self.kept, weight, per_tensor=True)
        kept = integers and kept_weights(self.kept, *integers, bias, source)
        weight, bias, accumulator = kept or quantise_weights(weight, bias, source, per_tensor=True)
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
        bits = np.array([self.precision.of(f"{node.name}/expert{e}", node.name, "experts")
                         for e in range(len(w1))], np.uint8)
        up, up_affine = self._scaled_weights(w1, b1 - before[1], source, before[0], 8, bits)
        mean = self._expert_samples(node, "activation").mean(0)
        hidden = Tensor("", after[0], offset=after[1], mean=mean)
        down, down_affine = self._scaled_weights(w2, b2, hidden, self.stream_step, 16, bits)
        self._add(q.Experts(
            name=node.name, output=output, source=source.tensor, residual=stream.tensor,
            route=node.inputs[1].name, up=up,
            up_affine=up_affine, table=function_table(function, before, after), down=down,
            down_affine=down_affine, bits=bits))

    def _expert_samples(self, node: ir.Node, stage: str) -> np.ndarray:
        names = [f"{node.name}/expert{e}/{stage}" for e in range(shape(node.inputs[3])[0])]
        found = [self.calibration.samples[name] for name in names
                 if name in self.calibration.samples]
        if not found:
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return np.concatenate(found)
