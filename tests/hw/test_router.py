"""The router against `numerics`, and the known faults of earlier designs."""

import numpy as np
import pytest

from moeware.hw.router import Router

from .router_machine import FLAT, LOUD, config, expected_queues, random_logits, route

SHAPES = [
    ({"tokens": 1, "outputs": 1, "lanes": 1}, 16, 2),
    ({}, 16, 2),
    ({}, 13, 2),
    ({"tokens": 3, "lanes": 4, "outputs": 8, "max_experts": 6}, 6, 2),
    ({"tokens": 5, "lanes": 3, "outputs": 6, "depth": 6, "max_experts": 20, "max_chosen": 4},
     20, 4),
    ({"tokens": 4, "lanes": 8, "outputs": 8, "max_experts": 5, "max_chosen": 5}, 5, 5),
]


@pytest.mark.parametrize("shape, experts, chosen", SHAPES)
@pytest.mark.parametrize("over_chosen", [0, 1])
@pytest.mark.parametrize("pauses", [0.0, 0.6])
def test_matches_numerics(shape, experts, chosen, over_chosen, pauses):
    sizes = config(**shape)
    route(sizes, [(random_logits(7, experts, seed=1), chosen, over_chosen, LOUD),
                  (random_logits(6, experts, seed=2), chosen, 1 - over_chosen, LOUD)], pauses)


@pytest.mark.parametrize("over_chosen", [0, 1])
def test_all_tokens_on_one_expert(over_chosen):
    sizes = config()
    logits = random_logits(sizes.max_rows, 16, seed=3)
    logits[:, 11] = 1 << 21
    route(sizes, [(logits, 1, over_chosen, LOUD)])


def test_ties_go_to_the_lower_expert():
    sizes = config(max_chosen=4)
    logits = np.random.default_rng(4).integers(-2, 2, (20, 16))
    logits[5], logits[6] = 0, np.arange(16) // 4
    route(sizes, [(logits, 3, 0, FLAT), (logits, 4, 1, (65535, 8))])


def test_a_second_inference_sees_nothing_of_the_first():
    sizes = config()
    low, high = random_logits(5, 16, seed=5), random_logits(3, 16, seed=6)
    low[:, 8:] -= 1 << 22
    high[:, :8] -= 1 << 22
    none = np.zeros((0, 16), np.int64)
    route(sizes, [(low, 2, 0, LOUD), (high, 2, 0, LOUD), (none, 2, 1, LOUD), (low, 1, 1, LOUD)])


def test_queues_grow():
    sizes = config()
    route(sizes, [(random_logits(rows, 16, seed=rows), 2, 1, LOUD) for rows in (5, 1, 0, 8)],
          append=True)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_few_experts(experts):
    sizes = config(max_chosen=3)
    logits = random_logits(5, experts, seed=7)
    route(sizes, [(logits, experts, over_chosen, LOUD) for over_chosen in (0, 1)]
          + [(logits, 1, over_chosen, LOUD) for over_chosen in (0, 1)])


def test_single_expert_machine():
    sizes = config(max_experts=1, max_chosen=1)
    route(sizes, [(random_logits(3, 1, seed=8), 1, 0, LOUD),
                  (random_logits(2, 1, seed=9), 1, 1, LOUD)])


def test_a_lone_weight_is_one():
    sizes = config()
    logits = random_logits(2, 16, seed=10)
    queues = expected_queues(sizes, logits, 1, 1, *LOUD)
    assert {weight for queue in queues for _, weight in queue} == {65535}
    logits[:] = -(1 << 20)
    logits[:, 0] = 1 << 20
    route(sizes, [(logits, 1, 1, (65535, 1)), (logits, 2, 0, (65535, 1))])


def test_extreme_logits():
    sizes = config(max_chosen=4)
    draw = np.random.default_rng(11)
    logits = draw.choice([-(1 << 31), (1 << 31) - 1, 0, -1, 1], (9, 16))
    logits[0] = [(1 << 31) - 1] + [-(1 << 31)] * 15
    logits[1] = -(1 << 31)
    route(sizes, [(logits, 4, 0, (65535, 47)), (logits, 4, 1, (65535, 36)), (logits, 4, 0, (1, 20)),
                  (logits, 3, 1, (65535, 1))])


@pytest.mark.parametrize("experts, chosen, over_chosen", [(16, 2, 1), (16, 2, 0), (32, 4, 0),
                                                           (4, 2, 0), (4, 4, 1), (32, 4, 1)])
def test_rate(experts, chosen, over_chosen):
    sizes = config(max_experts=32, max_chosen=4, lanes=4)
    lone, many = route(
        sizes, [(random_logits(rows, experts, seed=12), chosen, over_chosen, LOUD)
                for rows in (1, 21)], check_queues=False)
    fed = 1 + experts // sizes.lanes  # cycles to send a row, after its setup
    scanned = chosen if over_chosen else experts + chosen
    assert lone == fed + experts + scanned + chosen + Router.LATENCY
    # The first rows come a token group at a time.
    assert many <= (lone + fed * (sizes.tokens - 1)
                    + 20 * max(experts, scanned, Router.ROW_INTERVAL))
