"""When instructions could begin at the earliest: engines in order, products and keys counted, the bus
and the rooms on chip left out."""

from moeware.compiler.lowered import Instr, Lowered
from moeware.hw.arch import layout
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Opcode

__all__ = ["least_times"]


def least_times(lowered: Lowered, config: Config) -> list[tuple[int, int]]:
    """The cycles in which each instruction could begin and be done, if all it waited for were its
    engine and what it reads. An expert is taken to have all tokens."""
    free = dict.fromkeys(Engine, 0)
    written: dict[int, list[tuple[int, int, int]]] = {}  # (first word, end, done), by buffer
    times = []
    for instr in lowered.instructions:
        start = free[instr.engine]
        for span in instr.reads:
            for first, end, done in written.get(id(span.buffer), ()):
                if first < span.end and span.start < end:
                    start = max(start, done)
        done = free[instr.engine] = start + _cycles(instr, config)
        for span in instr.writes:
            written.setdefault(id(span.buffer), []).append((span.start, span.end, done))
        times.append((start, done))
    return times


def _cycles(instr: Instr, config: Config) -> int:
    fields = instr.fields
    match instr.opcode:
        case Opcode.LINEAR:
            outputs = config.outputs << fields["narrow"]
            return (-(-fields["rows"] // config.tokens) * -(-fields["channels"] // outputs)
                    * fields["source_words"])
        case Opcode.ATTENTION:
            return -(-fields["rows"] // config.queries) * fields["keys"] * fields["words"]
        case Opcode.NORM:
            return fields["rows"] * -(-fields["channels"] // config.lanes)
        case _:
            return layout.transfer_beats(config, fields)
