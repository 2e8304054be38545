"""Routers that choose one expert after another, by what is near the largest, against `numerics`."""

import numpy as np
import pytest

from moeware.hw.arch.routing import NEAR_BITS
from moeware.hw.router import Router

from .router_machine import FLAT, LOUD, config, expected_queues, random_logits, route

PHI = 655  # the threshold of Phi-3.5-MoE, a fiftieth
THRESHOLDS = (0, PHI, 9000, 0xffff)


def sizes(**fields):
    return config(router_forms=1, **{"max_chosen": 4} | fields)


def sparse(threshold=PHI):
    return {"sparse": 1, "threshold": threshold}


def close_logits(rows, experts, seed, reach=0.04):
    """Rows of one sign each, in which some are near the largest and some are not."""
    draw = np.random.default_rng(seed)
    largest = draw.choice([-1, 1], (rows, 1)) * draw.integers(1 << 10, 1 << 24, (rows, 1))
    return (largest * draw.uniform(1 - reach, 1, (rows, experts))).astype(np.int64)


def counts(logits, chosen, threshold):
    """Of one row, how many are near each chosen expert, itself included."""
    queues = expected_queues(sizes(), np.array([logits]), chosen, 0, *FLAT, **sparse(threshold))
    return {expert: round((1 << 16) / queue[0][1]) for expert, queue in enumerate(queues) if queue}


@pytest.mark.parametrize("shape, experts", [
    ({}, 16),
    ({"tokens": 1, "outputs": 1, "lanes": 1}, 12),
    ({"tokens": 3, "lanes": 3, "outputs": 6, "depth": 6, "max_experts": 20}, 18),
    ({"tokens": 4, "lanes": 8, "outputs": 8, "max_experts": 4}, 4),
    ({"max_experts": 2, "max_chosen": 2}, 2)])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_matches_numerics(shape, experts, pauses):
    subject = sizes(**shape)
    made = [drawn(5, experts, seed) for seed in range(4)
            for drawn in (random_logits, close_logits, lambda *size: -abs(random_logits(*size)))]
    route(subject, [(logits, 1 + number % min(experts, subject.max_chosen), 0,
                     (LOUD, (40000, 24))[number % 2], sparse(THRESHOLDS[number % 4]))
                    for number, logits in enumerate(made)], pauses)


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_at_the_threshold_are_near(sign):
    """Exactly there, and a unit beyond it, for both rounds."""
    unit = 1000
    if sign > 0:  # divided by the largest
        first, at = unit << NEAR_BITS, unit * ((1 << NEAR_BITS) - PHI)
    else:  # divided by the other
        first, at = -unit * ((1 << NEAR_BITS) - PHI), -unit << NEAR_BITS
    one, two = [first, at] + [at - 1] * 14, [first, first, at] + [at - 1] * 13
    assert counts(one, 1, PHI) == {0: 2}
    assert counts(two, 2, PHI) == {0: 3, 1: 2}
    assert counts([first, at - 1, at - 1], 1, PHI) == {0: 1}
    logits = np.array([one, two, one[::-1], two[::-1]])
    route(sizes(), [(logits, chosen, 0, scale, sparse()) for chosen in (1, 2, 3)
                    for scale in (FLAT, (40000, 33))])


def test_equal_logits_are_all_near_and_chosen_in_order():
    rows = [[value] * 16 for value in (0, 5, -5, (1 << 31) - 1, -(1 << 31))]
    for row in rows:
        assert counts(row, 3, 0) == {0: 16, 1: 15, 2: 14}
    route(sizes(), [(np.array(rows), chosen, 0, LOUD, sparse(threshold))
                    for chosen in (1, 2, 4) for threshold in THRESHOLDS])


def test_what_was_chosen_is_near_nothing():
    """Though it lies above the largest of those left, and ties do not count twice."""
    assert counts([7, 9, 7, 9], 4, 0xffff) == {1: 4, 3: 3, 0: 2, 2: 1}
    logits = np.array([[7, 9, 7, 9], [9, 9, 9, 9], [-1, -1, -2, -1], [0, 0, 0, -1]]) << 10
    route(sizes(), [(logits, chosen, 0, LOUD, sparse(threshold))
                    for chosen in (1, 2, 3, 4) for threshold in (0, 0xffff)])


def test_zero_is_the_largest():
    """Below it each distance is its own magnitude: one, which only larger thresholds reach."""
    row = [0, -1, -(1 << 20), -(1 << 31)] * 4
    assert counts(row, 1, (1 << NEAR_BITS) - 1) == {0: 4}
    assert counts(row, 1, 1 << NEAR_BITS) == {0: 16}
    route(sizes(), [(np.array([row, row[::-1]]), chosen, 0, LOUD, sparse(threshold))
                    for chosen in (1, 4) for threshold in (*THRESHOLDS, (1 << NEAR_BITS) - 1,
                                                           1 << NEAR_BITS)])


def test_extreme_logits():
    draw = np.random.default_rng(5)
    logits = draw.choice([-(1 << 31), (1 << 31) - 1, -(1 << 31) + 1, 0, -1, 1], (9, 16))
    logits[0, 1:], logits[0, 0] = -(1 << 31), (1 << 31) - 1
    route(sizes(), [(logits, 2, 0, scale, sparse(threshold))
                    for scale in ((65535, 1), (3, 20), (65535, 47)) for threshold in THRESHOLDS])


@pytest.mark.parametrize("chosen", [1, 2])
def test_two_experts(chosen):
    logits = np.array([[1, 2], [-100, -99], [99, 100], [-100, -103], [-5, 5], [0, 0]]) << 12
    route(sizes(max_experts=2, max_chosen=2),
          [(logits, chosen, 0, LOUD, sparse(threshold)) for threshold in THRESHOLDS])


def test_a_single_expert():
    logits = random_logits(3, 1, seed=7)
    route(sizes(max_experts=1, max_chosen=1), [(logits, 1, 0, LOUD, sparse())] * 2)


def test_turns_with_other_forms():
    """Rows follow one another without a gap, and none sees what a form before it left behind."""
    others = [{}, {"sigmoid": 1}, {"group": 4, "chosen_groups": 2}]
    route(sizes(), [(close_logits(rows, 16, number), 1 + number % 4, over_chosen, LOUD, form)
                    for number, rows in enumerate((32, 9, 0, 1, 2, 31))
                    for form, over_chosen in ((sparse(), 0), (others[number % 3], number % 2))])


def test_queues_grow():
    route(sizes(), [(close_logits(8, 16, seed), 2, 0, LOUD, sparse()) for seed in range(4)],
          append=True)


@pytest.mark.parametrize("experts, chosen", [(16, 2), (32, 4), (4, 4), (32, 1), (24, 3), (17, 2)])
def test_rate(experts, chosen):
    subject = sizes(max_experts=32, lanes=4)
    lone, many = route(subject, [(close_logits(rows, experts, seed=12), chosen, 0, LOUD, sparse())
                                 for rows in (1, 21)], check_queues=False)
    corrected = -(-experts // subject.lanes)  # cycles in which the bench sends corrections
    fed, turn = 1 + corrected, max(experts + 1, Router.ROW_INTERVAL)
    assert lone == (corrected + fed + 2 * experts + 2 + (chosen - 1) * turn + Router.LATENCY
                    + Router.FORMS_LATENCY)
    assert many <= lone + fed * (subject.tokens - 1) + 20 * chosen * turn


def test_capacities():
    """Each round of a row is a choice of its own number; a row ends with its last one."""
    fields = [{"capacity": 1}, {"choice": 2}, {"capacity": 3, "choice": 1},
              {"capacity": 3, "choice": 3, "same_frame": 1}, {}]
    route(sizes(), [(close_logits(7, 6, number), 3, 0, LOUD, sparse() | each)
                    for number, each in enumerate(fields)], 0.3)
