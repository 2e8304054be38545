# amaranth: UnusedElaboratable=no
"""`DotArray` alone: with two products to a DSP block the same sums, and half the blocks."""

import itertools
import random

import pytest
from amaranth.back import rtlil

from moeware.hw.interfaces import READ_LATENCY
from moeware.hw.linear.array import DotArray

from .linear_machine import config
from .simulate import simulate

WORDS = 3  # of a row, on sizes whose `row_words` is more


class UltraScale:
    device = "xczu9eg"


def sums(sizes, primitive, groups):
    """Results ``[group][token][output]`` of the array.

    groups : of each, activations ``[token][WORDS * depth]`` and weights ``[WORDS][output * depth]``.
    """
    array, found = DotArray(sizes, primitive=primitive), []
    per_word = sizes.outputs // sizes.lanes

    async def bench(ctx):
        for rows, weights in groups:
            for token, row in enumerate(rows):
                for word in range(WORDS):
                    ctx.set(array.tile, {
                        "enable": 1, "bank": token, "address": word,
                        "data": packed(row[word * sizes.depth:][:sizes.depth])})
                    await ctx.tick()
            ctx.set(array.tile.enable, 0)
            for cycle in range(WORDS + array.latency):
                ctx.set(array.work, {"enable": cycle < WORDS, "first": cycle == 0,
                                     "last": cycle == WORDS - 1, "address": min(cycle, WORDS - 1)})
                came = cycle - READ_LATENCY
                ctx.set(array.weights, packed(weights[came]) if 0 <= came < WORDS else 0)
                await ctx.tick()
            group = []
            for token in range(sizes.tokens):
                group.append([])
                for word in range(per_word):
                    ctx.set(array.row, token)
                    ctx.set(array.word, word)
                    await ctx.tick()
                    group[-1] += list(ctx.get(array.results))
            found.append(group)

    simulate(array, bench)
    return found


def packed(values):
    return sum((value & 255) << 8 * i for i, value in enumerate(values))


def expected(sizes, groups):
    return [[[sum(row[word * sizes.depth + k] * weights[word][output * sizes.depth + k]
                  for word in range(WORDS) for k in range(sizes.depth))
              for output in range(sizes.outputs)] for row in rows] for rows, weights in groups]


@pytest.mark.parametrize("primitive", ["generic", "dsp48e2"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (3, 2, 5, 1), (4, 4, 4, 2), (1, 2, 2, 1)], ids=str)
def test_sums_at_extreme_operands(shape, primitive):
    """Whole rows of -128, 127, 0 or -1 beside each other, so that every pair of tokens meets every
    extreme weight; then such numbers in any order."""
    sizes, draw = config(*shape), random.Random(sum(shape))
    extremes, depth, outputs = (-128, 127, 0, -1), WORDS * sizes.depth, sizes.outputs * sizes.depth
    groups = [([[(a, b)[token % 2]] * depth for token in range(sizes.tokens)],
               [[c] * outputs] * WORDS) for a, b, c in itertools.product(extremes, repeat=3)]
    groups += [([draw.choices(extremes, k=depth) for _ in range(sizes.tokens)],
                [draw.choices(extremes, k=outputs) for _ in range(WORDS)]) for _ in range(10)]
    assert sums(sizes, primitive, groups) == expected(sizes, groups)


@pytest.mark.parametrize(("shape", "narrow", "blocks"), [
    ((4, 4, 8, 2), 0, 64), ((3, 2, 4, 2), 0, 16), ((1, 2, 4, 2), 0, 8), ((4, 4, 8, 2), 1, 128)])
def test_two_tokens_share_a_dsp_block(shape, narrow, blocks):
    text = rtlil.convert(DotArray(config(*shape, narrow=narrow)), platform=UltraScale())
    assert text.count("cell \\DSP48E2 ") == blocks
