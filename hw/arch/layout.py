"""How the words of on-chip memories lie in DRAM.

Words narrower than the bus are packed, as many whole ones as fit into a bus word; wider words take
as many bus words as they need. What is left over at the end of a bus word is zero.

Weights of 4 or 2 bits may be packed further (LOAD.packed): n = 2 or 4 of these bus words, of signed
bytes that 8 / n bits hold, make one bus word, whose byte j holds, from its lowest bits up, byte j of
the first, the second, ... The last of them are filled up with bus words of zeros.
"""

from collections.abc import Mapping

import numpy as np

from .config import Config
from .isa import Memory

__all__ = ["ALIGNMENT", "PARAM", "aligned", "as_scale", "beats", "corrections", "pack", "pack_params",
           "transfer_beats", "unpack", "word_bytes"]

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


def beats(config: Config, memory: Memory, words: int, packed: int = 0) -> int:
    """Bus words that `words` words of a memory take in DRAM. packed : as in LOAD."""
    _, per_beat, beats_each = _geometry(config, memory)
    unpacked = -(-words // per_beat) * beats_each
    return -(-unpacked // (1 << packed))


def transfer_beats(config: Config, fields: Mapping) -> int:
    """Bus words that a LOAD or STORE of these fields moves."""
    return beats(config, Memory(fields.get("memory", 0)), fields.get("words", 0),
                 fields.get("packed", 0))


def pack(config: Config, memory: Memory, words: np.ndarray, packed: int = 0) -> bytes:
    """DRAM image of an array uint8 [words, word_bytes]. packed : as in LOAD.

    Raises
    ------
    ValueError
        A byte that is no signed number of the bits that it is packed into.
    """
    size, per_beat, beats_each = _geometry(config, memory)
    words = np.asarray(words, np.uint8).reshape(-1, size)
    groups = -(-len(words) // per_beat)
    padded = np.zeros((groups * per_beat, size), np.uint8)
    padded[:len(words)] = words
    image = np.zeros((groups, beats_each * config.bus_bytes), np.uint8)
    image[:, :per_beat * size] = padded.reshape(groups, per_beat * size)
    return _packed(image.reshape(-1, config.bus_bytes), packed).tobytes()


def unpack(config: Config, memory: Memory, image: bytes, words: int, packed: int = 0) -> np.ndarray:
    """Inverse of `pack`: uint8 [words, word_bytes]."""
    size, per_beat, beats_each = _geometry(config, memory)
    groups = -(-words // per_beat)
    raw = np.frombuffer(image[:beats(config, memory, words, packed) * config.bus_bytes], np.uint8)
    raw = _unpacked(raw.reshape(-1, config.bus_bytes), packed)[:groups * beats_each]
    raw = raw.reshape(groups, beats_each * config.bus_bytes)
    return raw[:, :per_beat * size].reshape(-1, size)[:words].copy()


def _packed(image: np.ndarray, packed: int) -> np.ndarray:
    """Bus words uint8 [unpacked, bus_bytes] as [packed, bus_bytes]."""
    count, bits = 1 << packed, 8 >> packed
    least = -1 << bits - 1
    wrong = image.view(np.int8)[(image.view(np.int8) < least) | (image.view(np.int8) >= -least)]
    if wrong.size:
        raise ValueError(f"Weights that are packed into {bits} bits must be between {least} and "
                         f"{-least - 1}, not {wrong[0]}")
    filled = np.zeros((-(-len(image) // count), count, image.shape[1]), np.uint8)
    filled.reshape(-1, image.shape[1])[:len(image)] = image
    fields = (filled & (1 << bits) - 1) << bits * np.arange(count)[:, None]
    return np.bitwise_or.reduce(fields, 1).astype(np.uint8)


def _unpacked(image: np.ndarray, packed: int) -> np.ndarray:
    """Inverse of `_packed`, with the bus words that filled up the last one."""
    count, bits = 1 << packed, 8 >> packed
    # Each field to the top of its byte, and down again with its sign.
    tops = (image[:, None] << bits * np.arange(count)[::-1, None]).astype(np.uint8)
    return (tops.view(np.int8) >> 8 - bits).view(np.uint8).reshape(-1, image.shape[1])


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


def corrections(records) -> np.ndarray:
    """What records of `PARAM` hold for the router: corrections, int64, in the place of a scale."""
    return records["multiplier"] | (records["shift"].astype(np.int64) & 63) << 16


def as_scale(correction) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `corrections`: multiplier and shift."""
    correction = np.asarray(correction, np.int64)
    return (correction & 0xffff).astype(np.uint16), (correction >> 16).astype(np.uint8)
