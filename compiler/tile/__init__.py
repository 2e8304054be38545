"""Quantised operations to instructions, in the order in which the linear unit is to work.

Wherever one engine hands over to another, an instruction is cut into chunks of rows, so that the
next engine starts on the first rows while the last ones are still made: the first tile of a product
follows its source chunk by chunk, and the last one leads what comes after. The heads of attention
are made one after another, so that attention works on one while the linear unit makes the next; what
follows attention row by row is made in blocks of rows, so that the linear unit works on the first ones
while attention works on the last ones.
"""

from moeware.compiler.lowered import Lowered
from moeware.compiler.quantise import QuantisedStep
from moeware.compiler.tile.attention import lower_attention
from moeware.compiler.tile.chain import Chain, chains, lower_chain
from moeware.compiler.tile.experts import lower_experts, lower_route
from moeware.compiler.tile.lowering import Lowering, Plan
from moeware.compiler.tile.norm import load_rotation, lower_norm
from moeware.compiler.tile.rows import lower_add_linear, lower_constant, lower_linear
from moeware.compiler.tile.spill import spill
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory

__all__ = ["PLANS", "Plan", "tile"]

# From the fastest to the one that takes the least room.
PLANS = (Plan(), Plan(experts=1), Plan(experts=1, blocks=2), Plan(experts=1, blocks=4),
         Plan(experts=1, spill=True))

_LOWER = {
    q.Constant: lower_constant, q.Linear: lower_linear, q.AddLinear: lower_add_linear,
    q.Norm: lower_norm, q.Attention: lower_attention, q.Route: lower_route,
    q.Experts: lower_experts,
}


def tile(step: QuantisedStep, config: Config, *, trace: bool = False, frames: int = 1,
         plan: Plan = PLANS[0]) -> Lowered:
    """Instructions of one device step, in an order that is right without any overlap.

    trace : store every operation's result in DRAM, as a probe; frames : that a run works on at
    once.

    Raises
    ------
    CompileError
        A row, tile or count that the configuration has no room for: which, and by how much.
    """
    lowering = Lowering(step, config, frames, trace, plan)
    if plan.spill:
        return spill(lowering)
    for port in step.inputs:
        lowering.input(port)
    for number, part in enumerate(chains(lowering)):
        if isinstance(part, Chain):
            lower_chain(lowering, part)
            operation = part.operations[-1]
        else:
            operation = part
            _LOWER[type(operation)](lowering, operation)
            if trace and operation.output in lowering.tensors:
                lowering.probe(operation)
        # At once, as the stream is updated in place.
        for port in step.outputs:
            if port.tensor == operation.output:
                lowering.output(port)
        if number == 0:
            _load_rotations(lowering)
    return Lowered(lowering.assembly.instructions, lowering.inputs, lowering.outputs,
                   lowering.probes, step.operations, lowering.macs, frames)


def _load_rotations(lowering: Lowering) -> None:
    """Behind the inputs and before all weights: in the midst they would hold these back, and take the
    residual memory from products."""
    for op in lowering.step.operations:
        if isinstance(op, q.Norm) and op.rotation is not None:
            load_rotation(lowering, op, lowering.shape(op.source, Memory.RESIDUAL, op.rows,
                                                       len(op.affine.bias)))
