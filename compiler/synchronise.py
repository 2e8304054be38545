"""Dependency tokens: which instruction must wait for which, engine by engine."""

import numpy as np

from moeware.compiler.lowered import Instr, Lowered
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Memory

__all__ = ["synchronise"]

QUEUES = "queues"


def synchronise(lowered: Lowered, config: Config) -> list[tuple[int, int]]:
    """The (wait, signal) masks of every instruction.

    Wherever two instructions touch a word and one of them writes it, the later in program order
    waits for the earlier. An engine is done with its instructions in order, so only the last such
    instruction of each engine counts, and none that the waiting engine knows to be done already, be
    it through a third one (vector clocks, Mattern 1989). Tokens between two engines are given and
    taken in one order, as both numbers only grow. Two loads never wait for each other: what LOAD
    writes, it writes in order.
    """
    sizes = {Memory.ACTIVATION: config.activation_banks * config.activation_words,
             Memory.RESIDUAL: config.residual_words, Memory.WEIGHT: config.weight_words,
             Memory.PARAM: config.param_words, Memory.TABLE: 256 * config.tables, QUEUES: 1}
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
        for memory, words, writes in _accesses(instr):
            need = np.maximum(need, written[memory][:, words].max(1))
            if writes:
                need = np.maximum(need, read[memory][:, words].max(1))
        # The most recent first: it may already know of the others.
        for other in sorted(Engine, key=lambda e: -need[e]):
            if need[other] > known[engine, other] and (other, engine) != (Engine.LOAD, Engine.LOAD):
                wait[number - 1] |= 1 << other
                signal[need[other] - 1] |= 1 << engine
                known[engine] = np.maximum(known[engine], snapshot[need[other]])
        snapshot[number] = known[engine].copy()
        snapshot[number][engine] = number
        for memory, words, writes in _accesses(instr):
            (written if writes else read)[memory][engine, words] = number
    return list(zip(wait, signal))


def _accesses(instr: Instr):
    for spans, writes in ((instr.reads, False), (instr.writes, True)):
        for span in spans:
            yield span.buffer.memory, span.places(span.buffer.address), writes
    if instr.queue_read:
        yield QUEUES, slice(0, 1), False
    if instr.queue_write:
        yield QUEUES, slice(0, 1), True
