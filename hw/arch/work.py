"""What each instruction of a program has to do in a run: rows, products, bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import isa, layout
from .config import Config
from .isa import Engine, Instruction, Opcode, Target
from .program import DeviceStep, Program
from .quantised import Route

__all__ = ["Work", "instructions", "works"]


@dataclass(frozen=True)
class Work:
    """An instruction in a run.

    rows : token rows, those of its expert's queue where it has one; skipped : passed over, as its
    expert has no token; macs : products, zeros that fill up a row's last word included, and of a
    causal head those that are seen; array_cycles : those that its engine's products take at best;
    beats : bus words.
    """

    instruction: Instruction
    layer: str
    rows: int = 0
    skipped: bool = False
    macs: int = 0
    array_cycles: int = 0
    beats: int = 0

    @property
    def engine(self) -> Engine:
        return Engine(self.instruction.opcode)


def instructions(program: Program, step: DeviceStep) -> list[Instruction]:
    """The instructions of a step in the program's image, but END."""
    found, place = [], step.entry
    while (instruction := isa.decode(program.image[place:place + isa.BYTES])).opcode != Opcode.END:
        found.append(instruction)
        place += isa.BYTES
    return found


def works(program: Program, step: DeviceStep,
          choices: Mapping[str, np.ndarray] | None = None) -> list[Work]:
    """What the instructions of a step have to do, in program order.

    choices : chosen experts, integers [rows, chosen], by the name of the `Route` operation; for
    those that are missing every expert gets the same share of the tokens.

    Raises
    ------
    ValueError
        The step does not say which layers its instructions are of.
    """
    found = instructions(program, step)
    if len(step.layer_of) != len(found):
        raise ValueError(f"DeviceStep.layer_of must have {len(found)} layers, one for each "
                         f"instruction, not {len(step.layer_of)}: compile the model again")
    choices = choices or {}
    routes = {op.name: op for op in step.operations if isinstance(op, Route)}
    queues, taken = np.zeros((2, program.config.max_experts), int)
    result = []
    names = [step.layers[number] for number in step.layer_of]
    for i, layer in zip(found, names):
        result.append(_work(program.config, i, layer, queues))
        if i.opcode is Opcode.LINEAR and i.target == Target.ROUTER:
            if not i.append:
                queues[:] = 0
            if not i.same_frame:
                taken[:] = 0
            route = routes.get(layer)
            queued = _queued(i, choices.get(layer) if route is not None else None, len(queues))
            if i.destination_stride:  # the capacity of a queue
                queued = np.minimum(queued, i.destination_stride - taken)
                taken += queued
            queues += queued
    return result


def _queued(i: Instruction, chosen: np.ndarray | None, experts: int) -> np.ndarray:
    """Tokens that a LINEAR for the router sends to each queue, if it takes them."""
    if chosen is not None:
        rows = np.asarray(chosen)[i.destination:i.destination + i.rows]
        rows = rows[:, i.choice - 1] if i.choice else rows
        return np.bincount(rows.ravel(), minlength=experts)[:experts]
    balanced = _balanced(i.rows * (1 if i.choice else i.chosen), i.channels)
    return np.pad(balanced, (0, experts - i.channels))


def _balanced(slots: int, experts: int) -> np.ndarray:
    edges = np.arange(experts + 1) * slots // experts
    return np.diff(edges)


def _work(config: Config, i: Instruction, layer: str, queues: np.ndarray) -> Work:
    length = int(queues[i.expert]) if i.expert < len(queues) else 0
    if i.conditional and not length:
        return Work(i, layer, skipped=True)
    if i.opcode in (Opcode.LOAD, Opcode.STORE):
        return Work(i, layer, beats=layout.transfer_beats(config, i.fields))
    if i.opcode is Opcode.LINEAR:
        rows = length if i.queued else i.rows
        outputs = config.outputs * (2 if i.narrow else 1)
        passes = -(-rows // config.tokens) * -(-i.channels // outputs)
        return Work(i, layer, rows=rows, macs=rows * i.channels * i.source_words * config.depth,
                    array_cycles=passes * i.source_words)
    if i.opcode is Opcode.ATTENTION:
        last = np.arange(i.rows) + i.keys - i.rows + 1 if i.causal else np.full(i.rows, i.keys)
        seen = np.clip(last, 0, i.keys)
        groups = np.append(seen[config.queries - 1::config.queries],
                           seen[-1:] if i.rows % config.queries else [])
        return Work(i, layer, rows=i.rows,
                    macs=2 * int(seen.sum()) * i.words * config.depth,
                    array_cycles=int(groups.sum()) * i.words)
    return Work(i, layer, rows=i.rows)
