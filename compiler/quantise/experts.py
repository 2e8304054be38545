"""Routing and experts."""

import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import FEW_TOKENS
from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.kept_weights import kept_weights, usable_integers
from moeware.compiler.quantise.expert_layer import ExpertLayer
from moeware.compiler.quantise.hidden import (
    GATED_STAGES,
    STAGES,
    Hidden,
    gated_hidden,
    plain_hidden,
)
from moeware.compiler.quantise.state import State
from moeware.compiler.scales import encode_scale
from moeware.compiler.weights import Tensor, quantise_weights
from moeware.hw.arch import numerics, routing
from moeware.hw.arch import quantised as q

__all__ = ["Experts"]


class Experts(State):
    """Rules for Route, Experts and GatedExperts."""

    def _Route(self, node, k, score, normalise, groups, chosen_groups, group_score,
               threshold, capacity, order):
        source = self._tensor(node.inputs[0])
        weight, bias, correction = self._constants(node)
        # One step for all experts: their logits are compared with one another.
        integers = usable_integers(self.kept, weight, per_tensor=True)
        kept = integers and kept_weights(self.kept, *integers, bias, source)
        weight, bias, accumulator = kept or quantise_weights(weight, bias, source, per_tensor=True)
        sigmoid, sparse, pair = score == "sigmoid", score == "sparse", group_score == "pair"
        # A place on the sigmoid's curve is finer: of its 18 bits 4 are whole octaves, too.
        fraction = routing.SIGMOID_BITS - 4 if sigmoid else numerics.OCTAVE_BITS
        multiplier, shift = encode_scale(float(accumulator[0]) * math.log2(math.e) * (1 << fraction))
        # Only differences of corrections count; without them the choice is exact, by logits.
        by_score = not sparse and bool(pair or correction.any())
        lifted = np.rint((correction - correction.min()).astype(np.float64) * (1 << numerics.GATE_BITS))
        self._add(q.Route(name=node.name, output=node.outputs[0].name, source=source.tensor,
                          weight=weight, bias=bias, chosen=k, over_chosen=normalise == "chosen",
                          multiplier=multiplier, shift=shift, sigmoid=sigmoid, pair=pair,
                          correction=lifted.astype(np.uint32) if by_score else None,
                          group=len(bias) // groups if groups > 1 else 0,
                          chosen_groups=chosen_groups if groups > 1 else 0, sparse=sparse,
                          threshold=min(round(threshold * (1 << routing.NEAR_BITS)), 0xffff),
                          capacity=capacity, by_rank=order == "choice"))

    def _Experts(self, node, function):
        self.pending[node.outputs[0].name] = node

    _GatedExperts = _Experts

    def _experts(self, node: ir.Node, stream: Tensor, output: str) -> None:
        source, constants = self._tensor(node.inputs[0]), self._constants(node, 3)
        layer = ExpertLayer(
            name=node.name, function=attributes(node)["function"], constants=constants, kept=self.kept,
            source=source, hidden=self._hidden(node), stream_step=self.stream_step,
            rows=self._expert_rows(node), tokens=self.calibration.tokens[node.name],
            fixed=[self.precision.of_expert(node.name, e) for e in range(len(constants[0]))],
            rest={"output": output, "source": source.tensor, "residual": stream.tensor,
                  "route": node.inputs[1].name})
        if self.precision.nested:
            for e in range(len(layer.fixed)):
                layer.give_up(e, "nested weights were asked for, of which 4 bits are good ones, too")
        self.result.layers.append(layer)
        self._add(layer.operation([bits or 8 for bits in layer.fixed]))

    def _hidden(self, node: ir.Node) -> list[Hidden]:
        function = attributes(node)["function"]
        if node.op_type == "Experts":
            return plain_hidden(function, {stage: self._of_experts(node, stage) for stage in STAGES})
        demand = np.max([np.abs(variant[node.name].inputs[5].const_value.numpy()).max(1)
                         for variant in self.variants], 0)
        return gated_hidden(function, {stage: self._of_experts(node, stage) for stage in GATED_STAGES},
                            demand, whole=self._has_integers(node, 5))

    def _expert_rows(self, node: ir.Node) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows that reach each expert and their weights; where they are too few to tell, what reaches
        the layer, with equal weights."""
        inputs, weights = (self._of_experts(node, stage) for stage in ("input", "weight"))
        layer, mean = self.calibration.rows(node.inputs[0].name), np.concatenate(weights).mean()
        return [(rows, weight[:, 0]) if len(rows) >= FEW_TOKENS else (layer, np.full(len(layer), mean))
                for rows, weight in zip(inputs, weights, strict=True)]

    def _of_experts(self, node: ir.Node, stage: str) -> list[np.ndarray]:
        """Samples [rows, channels] of each expert; without rows where none reached it."""
        found = [self.calibration.samples.get(f"{node.name}/expert{e}/{stage}")
                 for e in range(shape(node.inputs[3])[0])]
        some = next((samples for samples in found if samples is not None), None)
        if some is None:
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return [some[:0] if samples is None else samples for samples in found]
