"""What is legal between the stages. A violation is a fault of the stage before, never of the model."""

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Lowered
from moeware.compiler.quantise import QuantisedStep
from moeware.hw.arch import isa, routing
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory

__all__ = ["verify_addresses", "verify_order", "verify_quantised", "verify_tokens"]


def _require(condition: bool, what: str, rule: str) -> None:
    if not condition:
        raise CompileError(f"{what} must satisfy: {rule}; this is a fault of the compiler, please "
                           "report it with the model")


def verify_quantised(step: QuantisedStep) -> None:
    """Tensors are defined once and before use; shifts, types and accumulators are in range; experts
    follow their router, as there is one set of queues."""
    defined, decided = {port.tensor for port in step.inputs}, None
    for op in step.operations:
        what = f"Operation {op.name!r} ({type(op).__name__})"
        for role in ("source", "residual", "query", "key", "value", "route"):
            tensor = getattr(op, role, None)
            if isinstance(tensor, str):
                _require(tensor in defined, what, f"{role} {tensor!r} is defined before")
        if isinstance(op, q.Route):
            decided = op.output
        elif isinstance(op, q.Experts):
            _require(op.route == decided, what, f"{op.route!r} is the last choice before")
        _require(op.output not in defined, what, f"{op.output!r} is defined once")
        defined.add(op.output)
        for name in ("affine", "up_affine", "down_affine", "gate_affine"):
            affine = getattr(op, name, None)
            if affine is not None:
                _require(bool(((affine.shift >= 1) & (affine.shift <= 47)).all()), what,
                         "every shift is between 1 and 47")
        if getattr(op, "correction", None) is not None:
            _require(int(op.correction.max()) < 1 << routing.CORRECTION_BITS, what,
                     f"a correction has {routing.CORRECTION_BITS} bits")
        gate = getattr(op, "gate", None)
        if gate is not None:
            layer = op.weight if isinstance(op, q.Linear) else op.up
            _require(gate.shape == layer.shape and op.gate_affine is not None, what,
                     "the gate has the shape of its layer, and scales")
        if isinstance(op, q.Norm):
            _require(op.groups >= 1 and len(op.affine.bias) % op.groups == 0, what,
                     "its groups are equal")
            _require(0 <= op.epsilon < 1 << 48, what, "epsilon has 48 bits")
            if op.rotation is not None:
                rows, width = op.rotation.shape
                _require(rows == op.rows and width % 2 == 0 and len(op.affine.bias) % width == 0,
                         what, "there are factors for each pair of a head in each row")
        for weight, bias in _products(op):
            reach = 128 * np.abs(weight.astype(np.int64)).sum(-1) + np.abs(bias.astype(np.int64))
            _require(int(reach.max(initial=0)) < 1 << 31, what, "no accumulator passes 32 bits")
    for port in step.outputs:
        _require(port.tensor in defined, f"Output {port.name!r}", "it is defined")


def _products(op: q.Operation):
    if isinstance(op, (q.Linear, q.AddLinear)):
        yield op.weight, op.affine.bias
    elif isinstance(op, q.Route):
        yield op.weight, op.bias
    elif isinstance(op, q.Experts):
        yield op.up, op.up_affine.bias
        yield op.down, op.down_affine.bias
    if getattr(op, "gate", None) is not None:
        yield op.gate, op.gate_affine.bias


def verify_order(lowered: Lowered) -> None:
    """Spans lie in their buffers, and what is read has been written before."""
    written: set[int] = set()
    routed = False
    for number, instr in enumerate(lowered.instructions):
        what = f"Instruction {number} ({instr.opcode.name} of {instr.layer})"
        for span in instr.reads + instr.writes:
            _require(0 <= span.start and span.end <= span.buffer.words, what,
                     f"its span lies in {span.buffer.name!r}")
        _require(routed or not instr.queue_read, what, "a router decided before")
        routed |= instr.queue_write
        updates = {id(span.buffer) for span in instr.writes}
        for span in instr.reads:
            _require(id(span.buffer) in written or id(span.buffer) in updates, what,
                     f"{span.buffer.name!r} was written before")
        written |= updates


def verify_addresses(lowered: Lowered, config: Config) -> None:
    """No buffer is overwritten while it is needed: every word that is read belongs to its buffer.

    Computed from who wrote each word last, not from the lifetimes that the allocator uses.
    """
    owner = {Memory.ACTIVATION: config.activation_banks * config.activation_words,
             Memory.RESIDUAL: config.residual_words, Memory.WEIGHT: config.weight_words,
             Memory.PARAM: config.param_words, Memory.TABLE: 256 * config.tables}
    owner = {memory: np.zeros(words, np.int64) for memory, words in owner.items()}
    numbers = {id(buffer): n for n, buffer in enumerate(lowered.buffers, 1)}
    started: set[int] = set()
    for place, instr in enumerate(lowered.instructions):
        what = f"Instruction {place} ({instr.opcode.name} of {instr.layer})"
        for span in instr.reads + instr.writes:
            words = owner[span.buffer.memory]
            _require(0 <= span.address and span.buffer.address + span.end <= len(words), what,
                     f"{span.buffer.name!r} lies in its memory")
        for span in instr.reads:
            number = numbers[id(span.buffer)]
            if number in started:
                held = owner[span.buffer.memory][span.places(span.buffer.address)]
                _require(bool((held == number).all()), what,
                         f"{span.buffer.name!r} still holds what was written to it")
        for span in instr.writes:
            number = numbers[id(span.buffer)]
            started.add(number)
            owner[span.buffer.memory][span.places(span.buffer.address)] = number


def verify_tokens(masks: list[tuple[int, int]], engines: list[Engine], config: Config) -> None:
    """Every token is given before it is taken, all are taken, and no counter can overflow.

    Dispatch is in order, so beyond the program order an engine can be ahead of another by no more
    tokens than instructions wait at the other.
    """
    balance = np.zeros((len(Engine), len(Engine)), int)
    for number, ((wait, signal), engine) in enumerate(zip(masks, engines)):
        for other in Engine:
            balance[other, engine] -= wait >> other & 1
            balance[engine, other] += signal >> other & 1
        _require(balance.min() >= 0, f"Instruction {number}", "its tokens were given before")
        _require(balance.max() + config.queue + 1 <= isa.TOKEN_LIMIT, f"Instruction {number}",
                 f"at most {isa.TOKEN_LIMIT} tokens wait to be taken")
    _require(not balance.any(), "The program", "every token is taken")
