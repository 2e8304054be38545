"""Shapes that the parts of the attention unit share, and their delay line."""

from amaranth import Shape, Signal, signed
from amaranth.lib import data

from ..arch.config import Config
from ..arch.isa import HEAD_WORDS
from ..arch.numerics import PROBABILITY_BITS

__all__ = [
    "Arrival",
    "Group",
    "Pass",
    "Weights",
    "accumulator_shape",
    "delayed",
    "difference_bits",
    "score_shape",
    "total_bits",
]


def score_shape(config: Config) -> Shape:
    """A score: at most HEAD_WORDS * depth products of int8, each at most 2**14."""
    return signed((HEAD_WORDS * config.depth << 14).bit_length() + 1)


def difference_bits(config: Config) -> int:
    """Bits of the largest maximum less the smallest score."""
    return (HEAD_WORDS * config.depth * (128 * 128 + 128 * 127)).bit_length()


def total_bits(config: Config) -> int:
    """Bits of a row's sum of probabilities."""
    return (config.max_rows * ((1 << PROBABILITY_BITS) - 1)).bit_length()


def accumulator_shape(config: Config) -> Shape:
    """A row's sum of probability times value."""
    return signed((config.max_rows * ((1 << PROBABILITY_BITS) - 1) * 128).bit_length() + 1)


class Group(data.StructLayout):
    """Up to `queries` consecutive query rows, and of their instruction what is still to do.

    `over` is the number by which key 0 exceeds the last key that row 0 sees when `causal`; key j
    is hidden from row r if over + j > r. `last_key` is the last one that any row sees, or 0.
    """

    def __init__(self, config: Config):
        super().__init__({
            "rows": range(config.queries + 1), "last_key": 13, "over": signed(15), "causal": 1,
            "final": 1,  # the instruction's last group
            "words": 8, "value": 20, "stride": 13,
            "destination": 20,  # of row 0
            "destination_stride": 13,
            "multiplier": 16, "shift": 6, "out_multiplier": 16, "out_shift": 6,
        })


class Arrival(data.StructLayout):
    """What the word that comes out of `key_read` is."""

    def __init__(self, config: Config):
        super().__init__({
            "query": 1,  # a query word, else a key word
            "row": range(config.queries), "word": range(HEAD_WORDS),
            "first": 1, "last": 1,  # word of its row
            "end": 1,  # word of the group's last key
            "hidden": config.queries,  # query rows that must not see the key
        })


class Weights(data.StructLayout):
    """The probabilities of a key, one for each query row, and its place in a pass."""

    def __init__(self, config: Config):
        super().__init__({
            "first": 1, "last": 1,
            "counted": 1,  # the group's first pass, in which probabilities are summed
            "probability": data.ArrayLayout(PROBABILITY_BITS, config.queries),
        })


class Pass(data.StructLayout):
    """One word of the results of a group: how to scale and where to write it."""

    def __init__(self, config: Config):
        super().__init__({
            "rows": range(config.queries + 1), "destination": 20, "destination_stride": 13,
            "out_multiplier": 16, "out_shift": 6,
            "counted": 1,  # the group's first pass: its reciprocals are to be computed
            "final": 1,  # nothing of the instruction comes after it
        })


def delayed(m, value, cycles: int, *, name: str, reset_less: bool = True):
    """`value`, `cycles` cycles later."""
    for cycle in range(cycles):
        stage = Signal(value.shape(), name=f"{name}_{cycle + 1}", reset_less=reset_less)
        m.d.sync += stage.eq(value)
        value = stage
    return value
