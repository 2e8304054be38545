"""The program: tokens, encoded instructions, the DRAM image."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moeware.compiler.allocate import place_blocks
from moeware.compiler.lowered import Block, Instr, Lowered, Part, Span
from moeware.compiler.synchronise import synchronise
from moeware.compiler.verify import verify_tokens
from moeware.hw.arch import isa
from moeware.hw.arch.config import Config
from moeware.hw.arch.program import DeviceStep

__all__ = ["emit"]


def emit(steps: list[Lowered], config: Config, choices: Sequence[Mapping[str, int]] | None = None,
         ) -> tuple[bytes, int, list[DeviceStep]]:
    """The DRAM image, the bytes that the program needs in all, and the device steps.

    choices : of each step, what it is for; None: one run has all of them.
    """
    choices = choices or [{}] * len(steps)
    entries, constants, total = place_blocks(steps, choices)
    image = bytearray(constants)
    result = []
    for lowered, entry, choice in zip(steps, entries, choices):
        code, masks = bytearray(), synchronise(lowered, config)
        verify_tokens(masks, [instr.engine for instr in lowered.instructions], config)
        for instr, (wait, signal) in zip(lowered.instructions, masks):
            code += isa.encode(_resolve(instr, wait, signal))
        code += isa.encode(isa.Instruction(isa.Opcode.END, {}))
        image[entry:entry + len(code)] = code
        for block in lowered.blocks:
            if block.data is not None:
                image[block.address:block.address + block.bytes] = block.data
        layers: dict[str, int] = {}
        layer_of = [layers.setdefault(instr.layer, len(layers))
                    for instr in lowered.instructions]
        result.append(DeviceStep(
            entry=entry, macs=lowered.macs, frames=lowered.frames, operations=lowered.operations,
            layers=list(layers), layer_of=np.array(layer_of, np.uint16), choice=dict(choice),
            inputs=[_placed(port, block) for port, block in lowered.inputs],
            outputs=[_placed(port, block) for port, block in lowered.outputs],
            probes=[_placed(probe, block) for probe, block in lowered.probes]))
    return bytes(image), total, result


def _resolve(instr: Instr, wait: int, signal: int) -> isa.Instruction:
    fields = {name: value.address if isinstance(value, (Span, Part)) else int(value)
              for name, value in instr.fields.items()}
    return isa.Instruction(instr.opcode, fields | {"wait": wait, "signal": signal})


def _placed(place, block: Block):
    return dataclasses.replace(place, region=dataclasses.replace(place.region,
                                                                 address=block.address))
