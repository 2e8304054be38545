"""The router's arithmetic against exact rationals and against real mathematics."""

import math
from fractions import Fraction

import numpy as np
import pytest

from moeware.hw.arch import numerics, routing

from .test_numerics import floor_half_up

RNG = np.random.default_rng(1)
INT32 = [-2**31, -2**31 + 1, -1, 0, 1, 2**31 - 1]


def test_chosen_experts_prefer_the_lower_index():
    logits = np.array([[5, 7, 7, 5], [0, 0, 0, 0], [-(2**31), 2**31 - 1, 0, 0]])
    assert routing.chosen_experts(logits, 2).tolist() == [[1, 2], [0, 1], [1, 2]]


def test_gate_weights_are_a_softmax():
    logits = RNG.integers(-3000, 3000, (50, 8))
    multiplier, shift = 47274, 15  # one unit of logit is 1 / 256 nat
    nats = logits / 256 * 47274 / 2**15 / 256 * math.log(2) * 256
    for over_chosen in (False, True):
        chosen = routing.chosen_experts(logits, 2)
        got = routing.gate_weights(logits, chosen, multiplier, shift, over_chosen=over_chosen)
        real = np.exp(nats - nats.max(-1, keepdims=True))
        picked = np.take_along_axis(real, chosen, -1)
        real = picked / (picked if over_chosen else real).sum(-1, keepdims=True)
        # Exponents are multiples of 1/256 octave (rounded), weights are truncated.
        assert (np.abs(got / 65536 - real) < 0.003).all()


def test_one_chosen_expert_saturates_its_weight():
    logits = np.array([[3, 9, 1]])
    assert routing.gate_weights(logits, np.array([[1]]), 1, 1, over_chosen=True).tolist() == [[65535]]


NATS = 47274, 17  # logits in units of 2**-16 nats to octaves in steps of 2**-14


def test_scores_are_those_of_the_sigmoid():
    logits = np.concatenate([[-(2**31)], np.arange(-900_000, 900_000, 7), [2**31 - 1]])
    scores = routing.sigmoid_scores(logits, *NATS)
    octaves = logits * (NATS[0] / 2**NATS[1] / 2**14)
    # A place is rounded to 0.7 units at most, a chord is 0.4 off, a score rounded to one.
    assert np.abs(scores - np.clip(65536 / (1 + 2.0**-np.maximum(octaves, -99)), 1, 65535)).max() < 1.3
    assert scores.min() == 1 and scores.max() == 65535
    assert (np.diff(scores) >= 0).all()
    assert (scores[1:-1] + routing.sigmoid_scores(-logits[1:-1], *NATS) == 65536)[logits[1:-1] != 0].all()


def test_scores_by_plain_integers():
    for logit in [0, 1, -1, 5, -77777, 300_000, -(2**31), 2**31 - 1, *RNG.integers(-10**6, 10**6, 200)]:
        place = min(floor_half_up(Fraction(abs(int(logit)) * NATS[0], 1 << NATS[1])), (16 << 14) - 1)
        low, high = (round(2**20 / (1 + 2.0 ** -(Fraction(place // 512 + i, 32)))) for i in (0, 1))
        score = floor_half_up(Fraction(low * 512 + (high - low) * (place % 512), 1 << 13))
        expected = score if logit >= 0 else 65536 - score
        assert routing.sigmoid_scores(int(logit), *NATS) == expected


def routed(row, corrections, form):
    """One row of `routing.route`, with sorted lists."""
    scores = routing.sigmoid_scores(np.array(row), *NATS).tolist()
    values = [s + c for s, c in zip(scores, corrections)] if form["by_score"] else list(row)
    seen = set(range(len(row)))
    if size := form["group"]:
        groups = [range(first, first + size) for first in range(0, len(row), size)]
        worth = [sum(sorted(values[e] for e in group)[-1 - form["pair"]:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[:form["chosen_groups"]]
        seen = {e for g in best for e in groups[g]}
    order = sorted(seen, key=lambda e: (-values[e], e))[:form["chosen"]]
    if not form["sigmoid"]:
        return order, None
    total = sum(scores[e] for e in order) if form["over_chosen"] else 65536
    bits = total.bit_length()
    inverse = min((1 << (bits + 15)) // total, 65535)
    return order, [min(scores[e] * inverse >> (bits - 1), 65535) for e in order]


@pytest.mark.parametrize("sigmoid, by_score, group, chosen_groups, pair", [
    (1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (0, 0, 4, 1, 0), (1, 0, 2, 3, 0), (1, 1, 3, 2, 0), (1, 1, 3, 2, 1),
    (1, 1, 12, 1, 1), (1, 1, 2, 6, 1)])
@pytest.mark.parametrize("over_chosen", [0, 1])
def test_routes_by_sorting(sigmoid, by_score, group, chosen_groups, pair, over_chosen):
    form = {"chosen": 3, "over_chosen": over_chosen, "sigmoid": sigmoid, "by_score": by_score,
            "group": group, "chosen_groups": chosen_groups, "pair": pair}
    logits = np.concatenate([RNG.integers(-1 << 18, 1 << 18, (40, 12)), RNG.integers(-1, 2, (40, 12)),
                             RNG.choice([-(2**31), 2**31 - 1], (20, 12))])
    corrections = RNG.integers(0, 1 << 15, 12)
    indices, weights = routing.route(logits, corrections, multiplier=NATS[0], shift=NATS[1], **form)
    for row, found, weight in zip(logits.tolist(), indices.tolist(), weights.tolist()):
        order, expected = routed(row, corrections.tolist(), form)
        assert found == order
        assert expected is None or weight == expected


SPREAD = 40000, 24  # logits of some 2**20 a few octaves apart


def mixed(row, chosen, threshold):
    """One row of `routing.route` with `sparse`, expert by expert, in fractions."""
    left, weights = dict(enumerate(row)), []
    for _ in range(chosen):
        expert = min(left, key=lambda e: (-left[e], e))
        largest, total = left[expert], 0
        for logit in left.values():
            divisor = max(abs(logit), largest)
            if divisor == 0 or Fraction(largest - logit, divisor) <= Fraction(threshold, 1 << 15):
                total += numerics.exp2_weight(numerics.octaves(largest - logit, *SPREAD))
        bits = int(total).bit_length()
        inverse = min((1 << (bits + 15)) // int(total), 65535)
        weights.append((expert, min(65472 * inverse >> (bits - 1), 65535)))
        del left[expert]
    return weights


@pytest.mark.parametrize("chosen", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0, 655, 1 << 14, 1 << 15, 0xffff])
def test_sparse_mixer_in_fractions(chosen, threshold):
    close = RNG.choice([-1, 1], (40, 1)) * (1 << 20) * RNG.uniform(0.95, 1, (40, 6))
    logits = np.concatenate([close.astype(int), RNG.integers(-1 << 18, 1 << 18, (40, 6)),
                             RNG.integers(-2, 3, (40, 6)), -RNG.integers(0, 1 << 18, (40, 6)),
                             RNG.choice([-(2**31), 2**31 - 1, 0], (20, 6))])
    indices, weights = routing.route(logits, None, chosen=chosen, over_chosen=False, multiplier=SPREAD[0],
                                      shift=SPREAD[1], sparse=True, threshold=threshold)
    for row, found, weight in zip(logits.tolist(), indices.tolist(), weights.tolist()):
        assert list(zip(found, weight)) == mixed(row, chosen, threshold)


def test_sparse_mixer_is_that_of_real_numbers():
    """Where no distance lies so near to the threshold that rounding the threshold decides."""
    draw = RNG.choice([-1, 1], (600, 1)) * RNG.uniform(1, 100, (600, 1)) * RNG.uniform(0.95, 1, (600, 16))
    logits = np.concatenate([draw, RNG.normal(size=(200, 16)) * 2])
    indices, found = routing.route(
        np.rint(logits * 65536).astype(int), None, chosen=2, over_chosen=False, multiplier=NATS[0],
        shift=NATS[1] + 6, sparse=True, threshold=round(0.02 * (1 << 15)))
    order = np.argsort(-logits, -1)
    assert (indices == order[:, :2]).all()
    for number in range(2):
        left = np.take_along_axis(logits, order[:, number:], -1)
        distance = (left[:, :1] - left) / np.maximum(np.abs(left), left[:, :1])
        clear = (np.abs(distance - 0.02) > 2e-5).all(-1)  # the threshold is rounded by half of 2**-15
        share = 1 / np.where(distance <= 0.02, np.exp(left - left[:, :1]), 0).sum(-1)
        # A distance is rounded to half of 1/256 octave: 0.14 %.
        assert clear.mean() > 0.9 and np.abs(found[:, number] / 65536 - share)[clear].max() < 2e-3


def test_least_scores_divide():
    """Of logits far below zero each score is one unit, and their shares are even."""
    logits = np.full((1, 4), -(2**31))
    scores, all_four = routing.sigmoid_scores(logits, *NATS), np.array([[0, 1, 2, 3]])
    assert routing.score_weights(scores, all_four, over_chosen=True).tolist() == [[16383] * 4]
    assert routing.score_weights(scores, all_four, over_chosen=False).tolist() == [[0] * 4]


def test_the_choice_is_that_of_real_numbers():
    """Where corrected scores, and pairs of them, lie further apart than rounding reaches."""
    logits = RNG.normal(size=(400, 16)) * 2
    correction = RNG.normal(size=16) * 0.1
    scores = 1 / (1 + np.exp(-logits)) + correction
    worth = np.sort(scores.reshape(-1, 4, 4), -1)[..., -2:].sum(-1)
    groups = np.argsort(-worth, -1)
    seen = np.zeros(worth.shape, bool)
    np.put_along_axis(seen, groups[:, :2], True, -1)
    values = np.where(np.repeat(seen, 4, -1), scores, -np.inf)
    order = np.argsort(-values, -1)[:, :4]  # three are chosen
    edge, best = (np.take_along_axis(scores, order, -1), np.take_along_axis(worth, groups, -1))
    # A score is 1.3 units off at most, a correction half of one.
    clear = ((edge[:, 2] - edge[:, 3]) * 65536 > 2 * 1.8) & ((best[:, 1] - best[:, 2]) * 65536 > 4 * 1.8)
    assert clear.mean() > 0.9
    found, _ = routing.route(
        np.rint(logits * 65536).astype(int), np.rint((correction - correction.min()) * 65536).astype(int),
        chosen=3, over_chosen=True, multiplier=47274, shift=17, sigmoid=True, by_score=True, group=4,
        chosen_groups=2, pair=True)
    assert (np.sort(found, -1) == np.sort(order[:, :3], -1))[clear].all()


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("rows, experts, chosen", [(1, 1, 1), (40, 5, 1), (40, 5, 2), (33, 4, 4)])
def test_places_go_to_those_who_come_first(rows, experts, chosen, by_rank):
    indices = RNG.random((rows, experts)).argsort(-1)[:, :chosen]
    order = sorted(np.ndindex(rows, chosen), key=lambda place: place[::-1] if by_rank else place)
    for capacity in (1, 3, rows - 1, rows):
        kept, taken = np.zeros(indices.shape, bool), [0] * experts
        for place in order:
            kept[place] = taken[indices[place]] < capacity
            taken[indices[place]] += kept[place]
        found = routing.within_capacity(indices, capacity, by_rank=by_rank)
        assert found.dtype == bool and np.array_equal(found, kept)
    assert routing.within_capacity(indices, rows, by_rank=by_rank).all()


def test_first_choices_of_all_come_before_second_ones():
    """Row 0 chooses expert 1 second, row 1 first."""
    indices = np.array([[0, 1], [1, 0]])
    assert routing.within_capacity(indices, 1, by_rank=False).tolist() == [[1, 1], [0, 0]]
    assert routing.within_capacity(indices, 1, by_rank=True).tolist() == [[1, 0], [1, 0]]


def test_places_of_nothing():
    assert routing.places(np.zeros((0, 2), int)).shape == (0, 2)
