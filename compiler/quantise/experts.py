"""Routing and experts."""

import math

import numpy as np
import onnx_ir as ir

from moeware.compiler.calibrate import FEW_TOKENS
from moeware.compiler.canonical import attributes, shape
from moeware.compiler.errors import CompileError
from moeware.compiler.quantise.expert_layer import ExpertLayer
from moeware.compiler.quantise.state import State
from moeware.compiler.scales import FUNCTION, encode_scale, shifted_grid
from moeware.compiler.weights import Tensor, quantise_weights
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
        constants = self._constants(node, 3)
        before = shifted_grid(self._expert_samples(node, "hidden"), of=FUNCTION[function])
        after = shifted_grid(self._expert_samples(node, "activation"))
        mean = self._expert_samples(node, "activation").mean(0)
        experts = range(len(constants[0]))
        layer = ExpertLayer(
            name=node.name, function=function, constants=constants, source=source,
            hidden=Tensor("", after[0], offset=after[1], mean=mean), before=before, after=after,
            stream_step=self.stream_step, rows=[self._expert_inputs(node, e) for e in experts],
            tokens=self.calibration.tokens[node.name],
            fixed=[self.precision.of_expert(node.name, e) for e in experts],
            rest={"output": output, "source": source.tensor, "residual": stream.tensor,
                  "route": node.inputs[1].name})
        self.result.layers.append(layer)
        self._add(layer.operation([bits or 8 for bits in layer.fixed]))

    def _expert_inputs(self, node: ir.Node, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that reach an expert and their weights; where they are too few to tell, what reaches
        the layer, with equal weights."""
        samples = self.calibration.samples
        inputs = samples.get(f"{node.name}/expert{expert}/input")
        if inputs is None or len(inputs) < FEW_TOKENS:
            inputs = self.calibration.rows(node.inputs[0].name)
            return inputs, np.full(len(inputs), self._expert_samples(node, "weight").mean())
        return inputs, samples[f"{node.name}/expert{expert}/weight"][:, 0]

    def _expert_samples(self, node: ir.Node, stage: str) -> np.ndarray:
        names = [f"{node.name}/expert{e}/{stage}" for e in range(shape(node.inputs[3])[0])]
        found = [self.calibration.samples[name] for name in names
                 if name in self.calibration.samples]
        if not found:
            raise CompileError(f"Node {node.name!r} must be reached by the calibration data: no "
                               "token was routed to any of its experts")
        return np.concatenate(found)
