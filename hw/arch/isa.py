"""The instruction set.

An instruction is 32 bytes, little-endian: one `Header`, then the fields of its opcode, packed from
bit 0 upwards in the order of the tables below. `FIELDS` is the one definition that the assembler,
the golden device and the gateware's decoder share.

Engines take their instructions in program order, each engine on its own, and may start one while
the one before is at work; they are done in order. They meet by tokens. Bit e of `wait` takes one
token from the counter (engine e -> this engine) before the instruction starts; bit e of `signal`
adds one to the counter (this engine -> engine e) when all its effects are visible. Both hold for an
engine and itself, too: an instruction that needs what an earlier one of its engine writes, or
overwrites what that one reads, waits for its token like any other.
An instruction with `conditional` set does nothing but its tokens while queue `expert` is empty.
"""

import enum
from dataclasses import dataclass

__all__ = [
    "BYTES",
    "FIELDS",
    "HEADER",
    "HEAD_WORDS",
    "NORM_CHANNELS",
    "ROW_STRIDE",
    "TOKEN_LIMIT",
    "Engine",
    "Instruction",
    "Memory",
    "NormMode",
    "Opcode",
    "Target",
    "decode",
    "encode",
]

BYTES = 32
TOKEN_LIMIT = 255  # tokens that a counter can hold
HEAD_WORDS = 64  # activation words of a head, ATTENTION.words, at most
NORM_CHANNELS = (1 << 16) - 1  # channels of a row of NORM, at most
ROW_STRIDE = (1 << 13) - 1  # words from row to row, at most


class Engine(enum.IntEnum):
    LOAD = 0
    LINEAR = 1
    ATTENTION = 2
    NORM = 3
    STORE = 4


class Opcode(enum.IntEnum):
    """Opcodes below END are the engine that executes them."""

    LOAD = Engine.LOAD
    LINEAR = Engine.LINEAR
    ATTENTION = Engine.ATTENTION
    NORM = Engine.NORM
    STORE = Engine.STORE
    END = 7  # last instruction: the run is done when every engine is idle


class Memory(enum.IntEnum):
    """On-chip memories that LOAD writes; STORE reads the first two."""

    ACTIVATION = 0  # int8, `depth` values a word
    RESIDUAL = 1  # int16, `lanes` values a word
    WEIGHT = 2  # int8, `outputs` x `depth` values a word: output-major. For LINEAR.narrow the low
    #             half of a byte is a weight of the output, the high half one of `outputs` later
    PARAM = 3  # `lanes` records of (bias int32, multiplier uint16, shift uint8, 0) a word
    TABLE = 4  # int8, one entry a word; table t holds words 256 t ... 256 t + 255


class Target(enum.IntEnum):
    """Where LINEAR writes."""

    ACTIVATION = 0
    RESIDUAL = 1
    ROUTER = 2


class NormMode(enum.IntEnum):
    LAYER = 0  # subtract the mean, divide by the standard deviation
    RMS = 1  # divide by the root of the mean square
    SCALE = 2  # neither: the value itself


HEADER = (("opcode", 3), ("wait", 5), ("signal", 5), ("conditional", 1), ("expert", 8))

FIELDS: dict[Opcode, tuple[tuple[str, int], ...]] = {
    Opcode.LOAD: (
        ("memory", 3), ("local", 20), ("words", 20), ("address", 32),
        ("packed", 2),  # WEIGHT only: values of 8 (0), 4 (1) or 2 bits (2) in DRAM, see `layout`
    ),
    Opcode.STORE: (("memory", 3), ("local", 20), ("words", 20), ("address", 32)),
    Opcode.LINEAR: (
        ("rows", 13),  # token rows; the length of queue `expert` takes its place with `gather` or
        #                `scatter` or `queued`
        ("narrow", 1),  # weights of 4 bits, -7..7: an output group is twice `outputs` channels
        ("queued", 1),  # rows are those of queue `expert`, row i is its i-th entry
        ("gather", 1),  # with queued: source row is the entry's token, not i
        ("scatter", 1),  # with queued: target row is the entry's token, not i
        ("gated", 1),  # with queued, RESIDUAL: multiply by the entry's gate weight
        ("accumulate", 1),  # RESIDUAL: add to what is there
        ("target", 2),
        ("tabled", 1),  # ACTIVATION: look the int8 result up in table `table`
        ("table", 4),
        ("source", 20),  # activation word of row 0
        ("source_stride", 13),  # words from row to row
        ("source_words", 13),  # words of a row that are summed over
        ("weight", 20),  # weight word of output group 0; group g starts at weight + g * source_words
        ("param", 14),  # parameter word of channel 0
        ("channels", 16),  # output channels
        ("destination", 20),  # word of row 0, channel 0 in the target memory; ROUTER: token of row 0
        ("destination_stride", 13),  # words from row to row; ROUTER, with Config.router_forms: tokens of
        #                              a frame that a queue takes, those that come first, max_rows at
        #                              most, or 0 for any number
        # ROUTER only:
        ("append", 1),  # the queues keep what they hold; else they are emptied first
        ("chosen", 5),  # experts per token
        ("over_chosen", 1),  # softmax over the chosen experts alone (1) or over all (0)
        ("multiplier", 16),  # logit difference -> 1/256 octaves; sigmoid: logit -> 2**-14 octaves
        ("shift", 6),
        ("product", 1),  # ACTIVATION: words of `lanes` results come in pairs, an even number of them.
        #                  The first of a pair is as without `product`, the second of 16 bits;
        #                  their product, see `numerics.product`, is the one word that is written
        # With Config.router_forms, else 0:
        ("sigmoid", 1),  # scores are sigmoids of the logits, not softmax
        ("by_score", 1),  # sigmoid: choose by score plus correction, not by logit. The correction
        #                   of a channel is `multiplier` and above it `shift` of its parameters
        ("group", 8),  # experts of a group, dividing `channels`; 0: there are none
        ("chosen_groups", 5),
        ("pair", 1),  # a group is chosen by its two largest values, summed, not by the largest
        ("sparse", 1),  # softmax anew for each of the chosen, over those near it and not chosen before;
        #                 with none of the above, nor `over_chosen`
        ("threshold", 16),  # sparse: how near, see `routing.near`
        ("same_frame", 1),  # what queues took by instructions before this one counts, too, where they
        #                     take a limited number
        ("choice", 5),  # only the choice of this number, 1 the largest, is queued; 0: all of a token's
    ),
    Opcode.ATTENTION: (
        ("rows", 13), ("keys", 13), ("causal", 1),
        ("words", 8),  # activation words of one head
        ("query", 20), ("key", 20), ("value", 20), ("destination", 20),
        ("stride", 13),  # words from row to row, of query, key and value alike
        ("destination_stride", 13),
        ("multiplier", 16), ("shift", 6),  # score difference -> 1/256 octaves
        ("out_multiplier", 16), ("out_shift", 6),  # weighted mean of values -> int8
    ),
    Opcode.NORM: (
        ("rows", 13), ("mode", 2), ("channels", 16),
        ("source", 20), ("source_stride", 13),  # residual words
        ("destination", 20), ("destination_stride", 13),  # activation words
        ("param", 14),
        ("epsilon", 48),  # epsilon * channels**2 in squared units of the residual stream
        # With Config.rotary only:
        ("counted", 16),  # channels that statistics count, where others are zeros; 0: all of them
        ("factors", 20),  # residual word of the factors of row 0, as `numerics.rotate` takes them
        ("factor_stride", 13),
        ("factor_words", 13),  # words after which a row's factors begin again; 0: nothing is turned,
        #                        else `channels` are even
    ),
    Opcode.END: (),
}


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction; `fields` are those of `HEADER` and of the opcode, missing ones 0.

    Raises
    ------
    ValueError
        A field that the opcode lacks, or a value that its bits cannot hold.
    """

    opcode: Opcode
    fields: dict[str, int]

    def __post_init__(self):
        widths = dict(HEADER[1:] + FIELDS[self.opcode])
        for name, value in self.fields.items():
            if name not in widths:
                raise ValueError(f"{self.opcode.name} must have the fields {sorted(widths)}, "
                                 f"not {name!r}")
            if not 0 <= value < 1 << widths[name]:
                raise ValueError(f"{self.opcode.name}.{name} must be between 0 and "
                                 f"{(1 << widths[name]) - 1}, not {value!r}")

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        fields = object.__getattribute__(self, "fields")
        if name in fields:
            return fields[name]
        if any(name == known for known, _ in HEADER + FIELDS[self.opcode]):
            return 0
        raise AttributeError(f"{self.opcode.name} has no field {name!r}")


def encode(instruction: Instruction) -> bytes:
    """The 32 bytes of an instruction."""
    word, offset = 0, 0
    for name, width in HEADER + FIELDS[instruction.opcode]:
        value = instruction.opcode if name == "opcode" else instruction.fields.get(name, 0)
        word |= int(value) << offset
        offset += width
    return word.to_bytes(BYTES, "little")


def decode(raw: bytes) -> Instruction:
    """The instruction in 32 bytes.

    Raises
    ------
    ValueError
        Not 32 bytes, an unknown opcode, or a bit set past the last field.
    """
    if len(raw) != BYTES:
        raise ValueError(f"Instruction must be {BYTES} bytes, not {len(raw)}")
    word = int.from_bytes(raw, "little")
    number = word & ((1 << HEADER[0][1]) - 1)
    try:
        opcode = Opcode(number)
    except ValueError:
        raise ValueError(f"Opcode must be one of {[int(o) for o in Opcode]}, not {number}") from None
    values = {}
    for name, width in HEADER + FIELDS[opcode]:
        values[name] = word & ((1 << width) - 1)
        word >>= width
    if word:
        raise ValueError(f"{opcode.name} must have zeros after its last field, not {word:#x}")
    del values["opcode"]
    return Instruction(opcode, values)
