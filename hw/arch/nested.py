"""Bit-nested weights: those of 4 bits are the upper halves of those of 8.

A program file holds such weights once. What the smaller program has in common with the larger one is
left out and made again when the file is read.
"""

from collections.abc import Iterator

import numpy as np

from . import isa, layout
from .config import Config
from .isa import Memory, Opcode

__all__ = ["common_weights", "left_out", "loads_of_weights", "made_again", "upper_half"]


def upper_half(weights: np.ndarray) -> np.ndarray:
    """int8 weights of 4 bits, -8..7: a sixteenth of int8 ones, rounded, ties up, saturated (from 120
    on)."""
    return np.minimum(weights.astype(np.int16) + 8 >> 4, 7).astype(np.int8)


def loads_of_weights(image: bytes, entry: int) -> Iterator[tuple[int, int, int]]:
    """Byte address, words and packing of each LOAD of weights, from an instruction's address to END."""
    for place in range(entry, len(image), isa.BYTES):
        instruction = isa.decode(image[place:place + isa.BYTES])
        if instruction.opcode is Opcode.END:
            return
        fields = instruction.fields
        if instruction.opcode is Opcode.LOAD and fields["memory"] == Memory.WEIGHT:
            yield fields["address"], fields["words"], fields["packed"]


def common_weights(config: Config, image: bytes, entries: list[int], upper_image: bytes,
                   upper_entries: list[int]) -> np.ndarray:
    """Weights of one image that another's can be made of, int64 [blocks, 4]: address in `upper_image`,
    address in `image`, words, and 1 where they are the upper halves, 0 where they are the same 8 bits.
    entries : of the steps."""
    known: dict[tuple[int, bytes], tuple[int, int, int]] = {}
    for address, words, packed in sorted({each for entry in entries
                                          for each in loads_of_weights(image, entry)}):
        if packed == 0:
            for half in (0, 1):
                known[half, _made(config, image, address, words, half)] = address, words, half
    found = {}
    for address, words, packed in {each for entry in upper_entries
                                   for each in loads_of_weights(upper_image, entry)}:
        size = layout.beats(config, Memory.WEIGHT, words, packed) * config.bus_bytes
        whole = known.get((packed, upper_image[address:address + size]))
        if whole is not None and whole[1] == words:
            found[address] = address, *whole
    return np.array([found[address] for address in sorted(found)], np.int64).reshape(-1, 4)


def left_out(config: Config, upper_image: bytes, common: np.ndarray) -> np.ndarray:
    """`upper_image` with zeros in place of the common weights, uint8."""
    rest = np.frombuffer(upper_image, np.uint8).copy()
    for upper, _, words, half in common.tolist():
        rest[upper:upper + layout.beats(config, Memory.WEIGHT, words, half) * config.bus_bytes] = 0
    return rest


def made_again(config: Config, image: bytes, upper_image: bytes, common: np.ndarray) -> bytes:
    """`upper_image` with the common weights, whatever it holds in their places."""
    whole = bytearray(upper_image)
    for upper, *source in common.tolist():
        made = _made(config, image, *source)
        whole[upper:upper + len(made)] = made
    return bytes(whole)


def _made(config: Config, image: bytes, address: int, words: int, half: int) -> bytes:
    """A block of weights of 8 bits, or its upper halves as a LOAD of 4 bits wants them."""
    size = layout.beats(config, Memory.WEIGHT, words) * config.bus_bytes
    block = image[address:address + size]
    if not half:
        return block
    weights = layout.unpack(config, Memory.WEIGHT, block, words).view(np.int8)
    return layout.pack(config, Memory.WEIGHT, upper_half(weights).view(np.uint8), 1)
