"""How the words of on-chip memories lie in DRAM.

Words narrower than the bus are packed, as many whole ones as fit into a bus word; wider words take
as many bus words as they need. What is left over at the end of a bus word is zero.
"""

import numpy as np

from .config import Config
from .isa import Memory

__all__ = ["ALIGNMENT", "PARAM", "aligned", "beats", "pack", "pack_params", "unpack", "word_bytes"]

PARAM = np.dtype([("bias", "<i4"), ("multiplier", "<u2"), ("shift", "u1"), ("pad", "u1")])
ALIGNMENT = 128  # bytes; every region that an instruction names starts at a multiple of it


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def word_bytes(config: Config, memory: Memory) -> int:
    """Bytes of one word of an on-chip memory."""
    return {
        Memory.ACTIVATION: config.depth,
        Memory.RESIDUAL: 2 * config.lanes,
        Memory.WEIGHT: config.outputs * config.depth,
        Memory.PARAM: 8 * config.lanes,
        Memory.TABLE: 1,
    }[memory]


def _geometry(config: Config, memory: Memory) -> tuple[int, int, int]:
    """Bytes of a word; words per bus word (or 1); bus words per word (or 1)."""
    size = word_bytes(config, memory)
    return size, max(1, config.bus_bytes // size), -(-size // config.bus_bytes)


def beats(config: Config, memory: Memory, words: int) -> int:
    """Bus words that `words` words of a memory take in DRAM."""
    _, per_beat, beats_each = _geometry(config, memory)
    return -(-words // per_beat) * beats_each


def pack(config: Config, memory: Memory, words: np.ndarray) -> bytes:
    """DRAM image of an array uint8 [words, word_bytes]."""
    size, per_beat, beats_each = _geometry(config, memory)
    words = np.asarray(words, np.uint8).reshape(-1, size)
    groups = -(-len(words) // per_beat)
    padded = np.zeros((groups * per_beat, size), np.uint8)
    padded[:len(words)] = words
    image = np.zeros((groups, beats_each * config.bus_bytes), np.uint8)
    image[:, :per_beat * size] = padded.reshape(groups, per_beat * size)
    return image.tobytes()


def unpack(config: Config, memory: Memory, image: bytes, words: int) -> np.ndarray:
    """Inverse of `pack`: uint8 [words, word_bytes]."""
    size, per_beat, beats_each = _geometry(config, memory)
    groups = -(-words // per_beat)
    raw = np.frombuffer(image[:groups * beats_each * config.bus_bytes], np.uint8)
    raw = raw.reshape(groups, beats_each * config.bus_bytes)
    return raw[:, :per_beat * size].reshape(-1, size)[:words].copy()


def pack_params(config: Config, bias, multiplier, shift) -> np.ndarray:
    """Words of the parameter memory, uint8 [words, 8 * lanes], for arrays of one length; the last
    word is filled up with zeros (shift 1)."""
    count = len(bias)
    records = np.zeros(-(-count // config.lanes) * config.lanes, PARAM)
    records["shift"] = 1
    records["bias"][:count] = bias
    records["multiplier"][:count] = multiplier
    records["shift"][:count] = shift
    return records.view(np.uint8).reshape(-1, 8 * config.lanes)
