"""Dependency tokens: which instruction must wait for which, engine by engine."""

import numpy as np

from moeware.compiler.lowered import Block, Instr, Lowered
from moeware.hw.arch import layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory, Opcode

__all__ = ["synchronise"]

QUEUES = "queues"


def synchronise(lowered: Lowered, config: Config) -> list[tuple[int, int]]:
    """The (wait, signal) masks of every instruction.

    Wherever two instructions touch a word, on chip or in DRAM, and one of them writes it, the later in program order
    waits for the earlier. An engine is done with its instructions in order, so only the last such
    instruction of each engine counts, and none that the waiting engine knows to be done already, be
    it through a third one (vector clocks, Mattern 1989). Tokens between two engines are given and
    taken in one order, as both numbers only grow. An engine writes in the order of its instructions,
    and adds to the residual stream in that order, and no later instruction overtakes what an earlier
    one still reads: so it waits for itself only to read activations or queues that it wrote.
    """
    sizes = {Memory.ACTIVATION: config.activation_banks * config.activation_words,
             Memory.RESIDUAL: config.residual_words, Memory.WEIGHT: config.weight_words,
             Memory.PARAM: config.param_words, Memory.TABLE: 256 * config.tables, QUEUES: 1}
    sizes |= _passed_on(lowered, config)
    engines = len(Engine)
    # Number (from 1) of the last instruction of each engine that wrote or read each word.
    written = {memory: np.zeros((engines, size), int) for memory, size in sizes.items()}
    read = {memory: np.zeros((engines, size), int) for memory, size in sizes.items()}
    known = np.zeros((engines, engines), int)
    snapshot: dict[int, np.ndarray] = {}
    wait, signal = [0] * len(lowered.instructions), [0] * len(lowered.instructions)
    for number, instr in enumerate(lowered.instructions, 1):
        engine = instr.engine
        need = np.zeros(engines, int)
        accesses = [access for access in _accesses(instr, config) if access[0] in sizes]
        for memory, words, writes in accesses:
            before = written[memory][:, words].max(1)
            if writes:
                before = np.maximum(before, read[memory][:, words].max(1))
            if writes or memory not in (Memory.ACTIVATION, QUEUES):
                before[engine] = 0
            need = np.maximum(need, before)
        # The most recent first: it may already know of the others.
        for other in sorted(Engine, key=lambda e: -need[e]):
            if need[other] > known[engine, other]:
                wait[number - 1] |= 1 << other
                signal[need[other] - 1] |= 1 << engine
                known[engine] = np.maximum(known[engine], snapshot[need[other]])
        snapshot[number] = known[engine].copy()
        snapshot[number][engine] = number
        for memory, words, writes in accesses:
            (written if writes else read)[memory][engine, words] = number
    return list(zip(wait, signal))


def _passed_on(lowered: Lowered, config: Config) -> dict[Block, int]:
    """Bus words of each block of DRAM that is stored and loaded again."""
    blocks = {opcode: {instr.fields["address"].block for instr in lowered.instructions
                       if instr.opcode is opcode} for opcode in (Opcode.LOAD, Opcode.STORE)}
    return {block: -(-block.bytes // config.bus_bytes)
            for block in blocks[Opcode.LOAD] & blocks[Opcode.STORE]}


def _accesses(instr: Instr, config: Config):
    """What an instruction touches: memory or block, words, and whether it writes them."""
    if instr.opcode in (Opcode.LOAD, Opcode.STORE):
        part = instr.fields["address"]
        first = part.offset // config.bus_bytes
        beats = layout.transfer_beats(config, instr.fields)
        yield part.block, slice(first, first + beats), instr.opcode is Opcode.STORE
    for spans, writes in ((instr.reads, False), (instr.writes, True)):
        for span in spans:
            yield span.buffer.memory, span.places(span.buffer.address), writes
    if instr.queue_read:
        yield QUEUES, slice(0, 1), False
    if instr.queue_write:
        yield QUEUES, slice(0, 1), True
