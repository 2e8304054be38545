"""Matrix products cut into weight tiles that fit on chip.

A tile is a run of output channels with the whole depth, so that a result needs no partial sums and
the integers do not depend on the configuration.
"""

import dataclasses
import math

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.tile.tensors import Tensor
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config

__all__ = ["activation_layers", "channel_unit", "filled", "filled_affine", "fits_pair", "require",
           "spread", "tiles",
           "weight_words"]

SHARE = 4  # tiles that the weight memory holds: one at work, the others on their way


def require(value: int, limit: int, what: str, field: str) -> None:
    """Refuse what a configuration has no room for."""
    if value > limit:
        raise CompileError(f"{what} takes {value}, {value - limit} more than Config.{field} = "
                           f"{limit}; use a configuration with more")


def channel_unit(config: Config, narrow: bool, per_word: int) -> int:
    """Tiles start at multiples of it: at an output group, and at a word of the target, which so many
    channels fill."""
    return math.lcm(config.outputs << narrow, per_word)


def tiles(config: Config, layer: str, channels: int, depth_words: int, unit: int,
          narrow: bool) -> list[tuple[int, int]]:
    """Channels [start, stop) of each tile, of about one size: a share of the weight and parameter
    memories, so that the next ones load meanwhile; more where too few output groups would not hide the
    fetch of a token group; one unit at least.

    Raises
    ------
    CompileError
        The smallest tile does not fit.
    """
    group = config.outputs << narrow
    require(depth_words, config.row_words, f"A row of {layer}", "row_words")

    def fits(size: int, share: int) -> bool:
        return (-(-size // group) * depth_words <= config.weight_words // share
                and -(-size // config.lanes) <= config.param_words // share)

    unit = min(unit, channels)
    if not fits(unit, 1):
        require(-(-unit // group) * depth_words, config.weight_words,
                f"The smallest weight tile of {layer}, in words,", "weight_words")
        require(-(-unit // config.lanes), config.param_words,
                f"The smallest parameter tile of {layer}, in words,", "param_words")
    units = -(-channels // unit)

    def size(count: int) -> int:
        return min(-(-units // count) * unit, channels)

    count = next((n for n in range(1, units) if fits(size(n), SHARE)), units)
    while count > 1 and size(count) <= config.tokens * group and fits(size(count - 1), 2):
        count -= 1
    return [(start, min(start + size(count), channels))
            for start in range(0, channels, size(count))]


def fits_pair(config: Config, ranges: list[tuple[int, int]], depth_words: int, narrow: bool) -> bool:
    """Whether the first two tiles leave half of the memories to the next ones."""
    group, channels = config.outputs << narrow, [stop - start for start, stop in ranges[:2]]
    return (2 * sum(-(-size // group) * depth_words for size in channels) <= config.weight_words
            and 2 * sum(-(-size // config.lanes) for size in channels) <= config.param_words)


def weight_words(config: Config, weight: np.ndarray, narrow: bool) -> np.ndarray:
    """Words of the weight memory, uint8 [words, outputs * depth], of int8 [channels, columns] whose
    columns are whole words."""
    wide = 1 + narrow
    group, depth_words = wide * config.outputs, weight.shape[1] // config.depth
    groups = -(-len(weight) // group)
    padded = np.zeros((groups * group, weight.shape[1]), np.int8)
    padded[:len(weight)] = weight
    words = padded.reshape(groups, wide, config.outputs, depth_words, config.depth)
    words = words.transpose(1, 0, 3, 2, 4).reshape(wide, groups * depth_words, -1).view(np.uint8)
    return words[0] if not narrow else words[0] & 15 | words[1] << 4


def spread(weight: np.ndarray, source: Tensor) -> np.ndarray:
    """Weight columns moved to where the source's channels lie in its rows; zeros elsewhere."""
    columns = np.zeros((len(weight), source.stride * source.config.depth), np.int8)
    columns[:, source.columns()] = weight
    return columns


def activation_layers(layer: tuple[np.ndarray, q.Affine], gate: tuple[np.ndarray, q.Affine] | None,
                      source: Tensor, columns: np.ndarray, words: int
                      ) -> tuple[np.ndarray, q.Affine, dict[str, int]]:
    """Weight and scale of a LINEAR that makes activations, and the field that says whether they are
    products: then words of the gate and of the layer take turns.

    layer, gate : int8 [channels, depth] and scale; columns : places of the channels in a row of so
    many words; results elsewhere are zero, as later products read whole words.
    """
    lanes, width = source.config.lanes, words * source.config.depth
    layers = [filled(spread(weight, source), affine, columns, width)
              for weight, affine in ([layer] if gate is None else [gate, layer])]
    if gate is None:
        return *layers[0], {}

    def in_turns(arrays: list[np.ndarray]) -> np.ndarray:
        apart = np.stack([array.reshape(width // lanes, lanes, -1) for array in arrays], 1)
        return apart.reshape(2 * width, *arrays[0].shape[1:])

    weight = in_turns([weight for weight, _ in layers])
    affine = q.Affine(**{field.name: in_turns([getattr(affine, field.name) for _, affine in layers])
                         for field in dataclasses.fields(q.Affine)})
    return weight, affine, {"product": 1}


def filled(weight: np.ndarray, affine: q.Affine, columns: np.ndarray,
            width: int) -> tuple[np.ndarray, q.Affine]:
    """Rows and parameters moved to `columns` of `width`; zero results elsewhere."""
    rows = np.zeros((width, weight.shape[1]), np.int8)
    rows[columns] = weight
    return rows, filled_affine(affine, columns, width)


def filled_affine(affine: q.Affine, columns: np.ndarray, width: int) -> q.Affine:
    """Parameters moved to `columns` of `width`; results are zero elsewhere."""
    parts = {}
    for name, default in (("bias", 0), ("multiplier", 0), ("shift", 1)):
        array = getattr(affine, name)
        parts[name] = np.full(width, default, array.dtype)
        parts[name][columns] = array
    return q.Affine(**parts)
