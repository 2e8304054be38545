"""Routers with sigmoid scores, corrections and groups against `numerics`."""

import numpy as np
import pytest

from moeware.hw.arch import routing
from moeware.hw.router import Router

from .router_machine import LOUD, expected_queues, random_logits, route
from .router_machine import config as base

NATS = (47274, 17)  # multiplier and shift of logits in units of 2**-16: octaves in steps of 2**-14


def config(**sizes):
    return base(router_forms=1, max_chosen=4, **sizes)


def random_corrections(experts, seed, limit=1 << 16):
    return np.random.default_rng(seed).integers(0, limit, experts)


def forms(experts, seed=0):
    """All kinds of scores and choices, with groups of all sizes that divide the experts."""
    corrections = random_corrections(experts, seed)
    yield from ({}, {"sigmoid": 1}, {"sigmoid": 1, "corrections": corrections})
    for groups in (number for number in range(1, experts + 1) if experts % number == 0):
        size = experts // groups
        for count in sorted({-(-4 // size), min(groups, 4)}):
            grouped = {"group": size, "chosen_groups": count}
            if count <= groups:
                yield grouped
                yield {"sigmoid": 1, **grouped}
                yield {"sigmoid": 1, "corrections": corrections, **grouped}
                if size > 1:
                    yield {"sigmoid": 1, "corrections": corrections, "pair": 1, **grouped}


@pytest.mark.parametrize("shape, experts", [
    ({}, 16),
    ({"tokens": 1, "outputs": 1, "lanes": 1}, 12),
    ({"tokens": 3, "lanes": 3, "outputs": 6, "depth": 6, "max_experts": 20}, 18),
    ({"tokens": 4, "lanes": 8, "outputs": 8, "max_experts": 4}, 4)])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_matches_numerics(shape, experts, pauses):
    route(config(**shape), [
        (random_logits(5, experts, seed), 1 + seed % 4, seed % 3 == 0,
         NATS if "sigmoid" in form else LOUD, form)
        for seed, form in enumerate(forms(experts))], pauses)


def test_ties_go_to_the_lower_expert_and_group():
    draw = np.random.default_rng(4)
    logits = draw.integers(-1, 2, (12, 16)) << 16
    logits[3], logits[4], logits[5] = 0, np.arange(16) // 4, np.arange(16)[::-1] // 4
    steps = draw.integers(0, 2, 16) << 14  # some sums of score and correction are equal
    route(config(), [(logits, 4, seed % 2, NATS, form)
                     for seed, form in enumerate(forms(16))]
          + [(logits, 3, 1, (65535, 8), {"sigmoid": 1, "corrections": steps, "group": 4,
                                         "chosen_groups": 2, "pair": 1}),
             (logits, 4, 0, NATS, {"sigmoid": 1, "corrections": np.zeros(16, int), "group": 2,
                                   "chosen_groups": 4, "pair": 1})])


def test_all_scores_equal_leave_the_choice_to_the_corrections():
    logits = np.zeros((3, 16), np.int64)
    corrections = np.arange(16)
    queues = expected_queues(config(), logits, 2, 1, *NATS, corrections=corrections, sigmoid=True)
    assert [len(queue) for queue in queues] == [0] * 14 + [3, 3]
    route(config(), [(logits, 2, 1, NATS, {"sigmoid": 1, "corrections": corrections}),
                     (logits, 4, 0, NATS, {"sigmoid": 1, "corrections": corrections[::-1]})])


def test_saturated_scores():
    """Of extreme logits; the smallest score is one unit, so that no sum is zero."""
    draw = np.random.default_rng(5)
    logits = draw.choice([-(1 << 31), (1 << 31) - 1, -(1 << 31) + 1, 0, -1, 1], (9, 16))
    logits[0], logits[1] = -(1 << 31), (1 << 31) - 1
    assert set(routing.sigmoid_scores(logits[:2], 65535, 1).ravel()) == {1, 65535}
    most = np.full(16, (1 << routing.CORRECTION_BITS) - 1)
    route(config(), [(logits, 4, seed % 2, scale, form)
                     for seed, form in enumerate(forms(16)) for scale in ((65535, 1), (3, 20))]
          + [(logits, 4, 1, (65535, 1), {"sigmoid": 1, "corrections": most, "group": 8,
                                         "chosen_groups": 2, "pair": 1})])


@pytest.mark.parametrize("over_chosen", [0, 1])
def test_one_group_and_every_expert_chosen(over_chosen):
    logits = random_logits(6, 4, seed=6)
    one = {"group": 4, "chosen_groups": 1}
    every = {"group": 1, "chosen_groups": 4}
    route(config(), [(logits, 4, over_chosen, LOUD, one), (logits, 4, over_chosen, LOUD, every)]
          + [(logits, count, over_chosen, NATS, {"sigmoid": 1, "corrections": np.arange(4), **groups})
             for groups in (one, every) for count in (1, 4)])


def test_a_single_expert():
    sizes = base(router_forms=1, max_experts=1, max_chosen=1)
    logits = random_logits(3, 1, seed=7)
    route(sizes, [(logits, 1, over_chosen, NATS, {"sigmoid": 1, "corrections": np.array([5]), **groups})
                  for over_chosen in (0, 1)
                  for groups in ({}, {"group": 1, "chosen_groups": 1})])


def test_the_choice_is_corrected_and_the_weight_is_not():
    logits = np.array([[3 << 16, 2 << 16, 1 << 16, 0]])
    form = {"sigmoid": 1, "corrections": np.array([0, 0, 1 << 16, 1 << 17])}
    queues = expected_queues(config(), logits, 2, 0, *NATS, **form)
    assert [len(queue) for queue in queues[:4]] == [0, 0, 1, 1]
    assert queues[3] == [(0, 32767)]  # a half, less one unit
    route(config(), [(logits, 2, 0, NATS, form), (logits, 2, 1, NATS, form)])


def test_forms_take_turns():
    """Rows follow one another without a gap, and none sees what a form before it left behind."""
    plain = {"sigmoid": 1}
    sample = [form for each in list(forms(16))[3::3] for form in (plain, each)]
    route(config(), [(random_logits(rows, 16, number), 3, 1, NATS if "sigmoid" in form else LOUD, form)
                     for number, (rows, form) in enumerate(zip((32, 9, 0, 1, 1, 31) * 4, sample))])


def limited(rows, experts, chosen, fields, seed=0, spread=1 << 20, form=None):
    """Inferences of one form, one for each of `fields`, on logits that crowd on a few experts."""
    crowd = np.linspace(0, spread, experts).astype(int)
    return [(random_logits(rows, experts, seed + number) + crowd, chosen, number % 2,
             NATS if "sigmoid" in (form or {}) else LOUD, (form or {}) | each)
            for number, each in enumerate(fields)]


@pytest.mark.parametrize("shape, experts", [
    ({}, 16), ({"tokens": 1, "outputs": 1, "lanes": 1, "max_experts": 5}, 5),
    ({"tokens": 3, "lanes": 3, "outputs": 6, "depth": 6, "max_experts": 20}, 18)])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_queues_take_what_comes_first(shape, experts, pauses):
    """In frames of one and of several instructions, one place, and more than there are tokens; the
    next frame counts anew, and so does the second inference."""
    fields = [{"capacity": 1}, {"capacity": 1}, {"capacity": 3}, {"capacity": 5, "same_frame": 1},
              {"capacity": 5, "same_frame": 1}, {}, {"capacity": 31}, {"capacity": 2}]
    for chosen in (1, 2, 4):
        inferences = limited(9, experts, chosen, fields)
        route(config(**shape, max_rows=90), inferences, pauses, append=True)
        route(config(**shape), inferences, pauses)


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_first_choices_come_before_second_ones(chosen, pauses):
    """Two frames, each with an instruction for each choice of two chunks of rows."""
    logits = [random_logits(6, 16, seed) + np.linspace(0, 1 << 20, 16).astype(int) for seed in (1, 2)]
    inferences = []
    for capacity in (1, 4):
        for choice in range(1, chosen + 1):
            for chunk in range(2):
                fields = {"capacity": capacity, "choice": choice,
                          "same_frame": int(choice > 1 or chunk > 0)}
                inferences.append((logits[chunk], chosen, 1, LOUD, fields))
    route(config(max_rows=64), inferences, pauses, append=True)


def test_all_tokens_on_one_expert_and_ties():
    """An expert that is full takes no more, of equal logits the lower expert, and others are empty."""
    logits = np.zeros((12, 16), np.int64)
    queues = expected_queues(config(), logits, 2, 1, *LOUD, capacity=5)
    assert [len(queue) for queue in queues] == [5, 5] + [0] * 14
    assert queues[0] == [(token, 32767) for token in range(5)]
    route(config(), [(logits, 2, 1, LOUD, {"capacity": 5}), (logits, 2, 0, LOUD, {"capacity": 12}),
                     (logits, 1, 0, LOUD, {"capacity": 11}),
                     (logits, 2, 1, LOUD, {"capacity": 5, "choice": 2})])


def test_capacities_of_every_form():
    """Weights are those of before a token is dropped."""
    draw = [form for form in forms(16)]
    route(config(), [(random_logits(11, 16, number), 1 + number % 4, number % 2,
                      NATS if "sigmoid" in form else LOUD,
                      form | {"capacity": 1 + number % 3, "choice": number % 2})
                     for number, form in enumerate(draw)], 0.3)


@pytest.mark.parametrize("experts, chosen, over_chosen", [(16, 2, 1), (32, 4, 0), (4, 4, 1)])
@pytest.mark.parametrize("form", [
    {"capacity": 2},
    {}, {"sigmoid": 1}, {"sigmoid": 1, "group": 2, "chosen_groups": 2},
    {"sigmoid": 1, "group": 2, "chosen_groups": 2, "pair": 1, "corrections": np.arange(32)},
    {"group": 4, "chosen_groups": 1}],
    ids=["capacity", "softmax", "sigmoid", "groups", "pairs", "one group"])
def test_rate(experts, chosen, over_chosen, form):
    sizes = config(max_experts=32, lanes=4)
    lone, many = route(
        sizes, [(random_logits(rows, experts, seed=12), chosen, over_chosen, LOUD, form)
                for rows in (1, 21)], check_queues=False)
    fed = 1 + experts // sizes.lanes
    alone = over_chosen or "sigmoid" in form
    scanned = chosen if alone else experts + chosen
    grouped = experts + Router.GROUPS_LATENCY if "group" in form else 0
    corrected = experts // sizes.lanes  # cycles in which the bench sends corrections
    assert lone == (corrected + fed + experts + scanned + chosen + Router.LATENCY
                    + Router.FORMS_LATENCY + grouped)
    assert many <= (lone + fed * (sizes.tokens - 1)
                    + 20 * max(experts, scanned, Router.ROW_INTERVAL))
