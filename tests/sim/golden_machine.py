"""A small golden machine, and its arithmetic in plain Python."""

import numpy as np

from moeware.hw.arch import isa
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Instruction, Opcode, Target

__all__ = ["CONFIG", "LINEAR", "ROUTE", "D", "execute", "exponential", "scaled", "wrapped"]

CONFIG = Config(tokens=2, outputs=3, depth=4, queries=2, lanes=1, bus_bytes=8, activation_banks=2,
                activation_words=64, residual_words=128, weight_words=64, param_words=32, tables=2,
                row_words=4, max_rows=12, max_experts=4, max_chosen=2, queue=2, products=1)
D = CONFIG.depth

LINEAR = {"rows": 5, "source": 10, "source_stride": 3, "source_words": 2, "weight": 7, "param": 3,
          "channels": 7, "destination": 60, "destination_stride": 2}
ROUTE = LINEAR | {"target": Target.ROUTER, "channels": 4, "chosen": 2, "multiplier": 50000,
                  "shift": 20, "destination": 0}


def execute(machine, *instructions, entry=0x1000):
    """Runs instructions, given as opcode and fields, and END."""
    code = b"".join(isa.encode(Instruction(opcode, fields)) for opcode, fields in
                    [*instructions, (Opcode.END, {})])
    machine.dram[entry:entry + len(code)] = np.frombuffer(code, np.uint8)
    return machine.run(entry)


def scaled(value, record, bits=8):
    """``floor(value * multiplier / 2**shift + 1/2)``, saturated, in exact rational arithmetic."""
    numerator = 2 * value * int(record["multiplier"]) + (1 << int(record["shift"]))
    result = numerator // (2 << int(record["shift"]))
    return max(-(1 << bits - 1), min((1 << bits - 1) - 1, result))


def wrapped(value):
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def exponential(difference, multiplier, shift):
    """65472 * 2**-t in the fixed point of the contract, t in 1/256 octaves."""
    steps = min((2 * difference * multiplier + (1 << shift)) // (2 << shift), 4095)
    return round(65472 * 2 ** (-(steps % 256) / 256)) >> steps // 256
