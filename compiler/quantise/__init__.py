"""Float canonical nodes to the quantised graph.

Weights are int8, or narrower where `Precision` says so, per output channel (experts: per expert and
channel), activations int8 per tensor, the residual stream int16 on one grid. Exact identities are used
before anything is rounded:

- a key's bias adds one number to all scores of a row, which softmax does not see: it is dropped, where
  nothing normalises or turns the key behind it;
- a value's bias passes through attention unchanged, as weights sum to one: it moves into the bias of
  what follows;
- scale and shift of LayerNorm and RMSNorm, of the stream or between two Linears, move into the weights
  that follow. In exchange each channel of the normalised tensor is scaled so that tensor and weights
  share the rounding error (SmoothQuant, Xiao et al. 2023, section 4, with alpha = 1/2);
- what `Join` makes of two Linears is a sum of two products, each with zeros where the other makes a
  channel;
- scores do not depend on an order of channels that queries and keys share: where they are turned, the
  two of a pair are neighbours.
"""

from collections.abc import Sequence

import onnx_ir as ir

from moeware.compiler.calibrate import Calibration
from moeware.compiler.canonical import attributes
from moeware.compiler.kept import Kept
from moeware.compiler.precision import Precision
from moeware.compiler.quantise.attention import Attention
from moeware.compiler.quantise.experts import Experts
from moeware.compiler.quantise.projections import Projections
from moeware.compiler.quantise.rows import Rows
from moeware.compiler.quantise.soft import SoftExperts
from moeware.compiler.quantise.state import QuantisedStep
from moeware.compiler.quantise.stream import Stream

__all__ = ["QuantisedStep", "quantise"]


def quantise(nodes: Sequence[ir.Node], inputs: Sequence[str], outputs: Sequence[str],
             calibration: Calibration, precision: Precision | None = None,
             variants: Sequence[Sequence[ir.Node]] | None = None,
             kept: Kept | None = None) -> QuantisedStep:
    """Quantise the nodes of one device step.

    nodes : canonical, in topological order, as `partition` leaves them; inputs, outputs : names of
    the values that enter and leave the step; variants : the same nodes with each choice's constants
    (None: `nodes` alone), which are to have equal integers wherever their constants are equal; kept :
    scales that the model came with, which layers keep where they can: what became of each is noted.

    Raises
    ------
    CompileError
        A tensor without calibration samples, or nodes in an order that no device step may have.
    """
    return _Quantiser(nodes, inputs, outputs, calibration, precision or Precision(),
                      variants or [nodes], kept or Kept()).run()


class _Quantiser(Stream, Rows, Projections, Attention, Experts, SoftExperts):
    """Node after node by the rule of its operator."""

    def run(self) -> QuantisedStep:
        for value in self.inputs:
            self._input(value)
        for node in self.nodes:
            getattr(self, f"_{node.op_type}")(node, **attributes(node))
        for value in self.outputs:
            self._output(value)
        self.result.grids = self._grids()
        return self.result
