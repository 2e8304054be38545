"""Routing and experts."""

import math
from functools import partial

import numpy as np
import onnx_ir as ir

from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.kept_weights import kept_weights, usable_integers
from moeware.compiler.quantise.gated import STAGES, gated_layers
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
    """Rules for Route, Experts and GatedExperts."""

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

    _GatedExperts = _Experts

    def _experts(self, node: ir.Node, stream: Tensor, output: str) -> None:
        function = attributes(node)["function"]
        source = self._tensor(node.inputs[0])
        w1, b1, w2, b2, *third = self._constants(node, 3)
        bits = np.array([self.precision.of(f"{node.name}/expert{e}", node.name, "experts")
                         for e in range(len(w1))], np.uint8)
        quantiser = partial(self._scaled_weights, bits=bits)
        samples = self._expert_samples(node)
        if third:
            demand = np.max([np.abs(variant[node.name].inputs[5].const_value.numpy()).max(1)
                             for variant in self.variants], 0)
            made = gated_layers((w1, b1), third, source, function, samples, demand, quantiser,
                                whole=self._has_integers(node, 5))
            layers = {name: getattr(made, name)
                      for name in ("up", "up_affine", "gate", "gate_affine", "table")}
            w2 = w2 if made.gain is None else w2 * made.gain[:, None]
            hidden = Tensor("", made.step, mean=made.mean[:, None])
        else:
            activation = np.concatenate([each["activation"] for each in samples])
            before = shifted_grid(np.concatenate([each["hidden"] for each in samples]),
                                  of=FUNCTION[function])
            after = shifted_grid(activation)
            up, up_affine = quantiser(w1, b1 - before[1], source, before[0])
            layers = {"up": up, "up_affine": up_affine,
                      "table": function_table(function, before, after)}
            hidden = Tensor("", after[0], offset=after[1], mean=activation.mean(0))
        down, down_affine = quantiser(w2, b2, hidden, self.stream_step, 16)
        self._add(q.Experts(
            name=node.name, output=output, source=source.tensor, residual=stream.tensor,
            route=node.inputs[1].name, down=down, down_affine=down_affine, bits=bits, **layers))

    def _expert_samples(self, node: ir.Node) -> list[dict[str, np.ndarray]]:
        """Samples [rows, hidden] of every expert, by stage; without rows where none reached it."""
        experts, hidden, _ = shape(node.inputs[3])
        none = np.zeros((0, hidden), np.float32)
        found = [{stage: self.calibration.samples.get(f"{node.name}/expert{e}/{stage}", none)
                  for stage in STAGES} for e in range(experts)]
        if not any(len(each["hidden"]) for each in found):
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return found
