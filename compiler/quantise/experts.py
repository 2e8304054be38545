"""Routing and experts."""

import math

import numpy as np
import onnx_ir as ir

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

    def _Route(self, node, k, score, normalise, groups, chosen_groups, group_score):
        source = self._tensor(node.inputs[0])
        *layer, correction = self._constants(node)
        # One step for all experts: their logits are compared with one another.
        weight, bias, accumulator = quantise_weights(*layer, source, per_tensor=True)
        sigmoid, pair = score == "sigmoid", group_score == "pair"
        # A place on the sigmoid's curve is finer: of its 18 bits 4 are whole octaves, too.
        fraction = numerics.SIGMOID_BITS - 4 if sigmoid else numerics.OCTAVE_BITS
        multiplier, shift = encode_scale(float(accumulator[0]) * math.log2(math.e) * (1 << fraction))
        # Only differences of corrections count; without them the choice is exact, by logits.
        lifted = np.rint((correction - correction.min()).astype(np.float64) * (1 << numerics.GATE_BITS))
        self._add(q.Route(name=node.name, output=node.outputs[0].name, source=source.tensor,
                          weight=weight, bias=bias, chosen=k, over_chosen=normalise == "chosen",
                          multiplier=multiplier, shift=shift, sigmoid=sigmoid, pair=pair,
                          correction=lifted.astype(np.uint32) if pair or correction.any() else None,
                          group=len(bias) // groups if groups > 1 else 0,
                          chosen_groups=chosen_groups if groups > 1 else 0))

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
        limit = np.array([WEIGHT_BITS[each] for each in bits.tolist()])
        up, up_affine = scaled_weights(w1, b1 - before[1], source, before[0], limit=limit)
        mean = self._expert_samples(node, "activation").mean(0)
        hidden = Tensor("", after[0], offset=after[1], mean=mean)
        down, down_affine = scaled_weights(w2, b2, hidden, self.stream_step, 16, limit=limit)
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
