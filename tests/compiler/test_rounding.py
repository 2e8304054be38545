"""Narrow weights, chosen with the inputs' covariance in view."""

import itertools

import numpy as np
import pytest

from moeware.compiler import rounding
from moeware.compiler.precision import WEIGHT_BITS
from moeware.compiler.rounding import inputs_covariance, rounded
from moeware.compiler.weights import Tensor, scaled_weights


def as_wanted(step):
    return step


def error(weight, integer, step, matrix) -> np.ndarray:
    """Of each channel's results, mean square."""
    rest = weight - integer * step[:, None]
    return ((rest @ matrix) * rest).sum(-1)


def nearest(weight, limit):
    """What per-channel rounding at the largest weight gives."""
    step = np.abs(weight).max(-1) / limit
    return np.clip(np.rint(weight / step[:, None]), -limit, limit), step


def correlated(rows, inputs, seed=0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mixture = draw.normal(size=(inputs // 4, inputs))  # a quarter as many causes as inputs
    return draw.normal(size=(rows, inputs // 4)) @ mixture + 0.1 * draw.normal(size=(rows, inputs))


@pytest.mark.parametrize(("limit", "gain"), [(7, 8), (1, 8)])
def test_results_on_unseen_rows_are_far_closer_than_by_the_nearest_integers(limit, gain):
    rows = correlated(2000, 48)
    weight = np.random.default_rng(1).normal(size=(30, 48))
    _, covariance = inputs_covariance(rows[:1000])
    integer, step = rounded(weight, limit, covariance, as_wanted)
    assert np.array_equal(integer, np.rint(integer)) and np.abs(integer).max() == limit
    unseen = np.cov(rows[1000:].T)
    ours, plain = (error(weight, *each, unseen).sum()
                   for each in ((integer, step), nearest(weight, limit)))
    assert ours * gain < plain


@pytest.mark.parametrize("limit", [7, 1])
def test_fewer_rows_than_inputs_do_not_make_it_worse(limit):
    """Relations that 12 rows of 48 inputs show by chance are not followed."""
    rows = correlated(2012, 48, seed=2)
    weight = np.random.default_rng(3).normal(size=(30, 48))
    unseen = np.cov(rows[12:].T)
    plain = error(weight, *nearest(weight, limit), unseen).sum()
    for count in (1, 2, 12):
        _, covariance = inputs_covariance(rows[:count])
        assert error(weight, *rounded(weight, limit, covariance, as_wanted), unseen).sum() < plain


def test_no_other_integer_of_one_weight_is_better(monkeypatch):
    """Where coordinate descent has ended; checked against every single change. The inputs are of more
    than two blocks."""
    monkeypatch.setattr(rounding, "SWEEPS", 30)
    inputs = 2 * rounding.BLOCK + 3
    rows = correlated(500, inputs, seed=4)
    _, covariance = inputs_covariance(rows)
    weight = np.random.default_rng(5).normal(size=(6, inputs))
    integer, step = rounded(weight, 1, covariance, as_wanted)
    damped = covariance + 0.01 * np.trace(covariance) / inputs * np.eye(inputs)
    best = error(weight, integer, step, damped)
    for column, value in itertools.product(range(inputs), (-1, 0, 1)):
        other = integer.copy()
        other[:, column] = value
        assert (error(weight, other, step, damped) >= best - 1e-4 * best).all()  # float32 on the way


def test_blocks_change_nothing(monkeypatch):
    """But the order in which float32 adds, which decides near ties."""
    monkeypatch.setattr(rounding, "SWEEPS", 0)
    rows = correlated(500, 50, seed=11)
    _, covariance = inputs_covariance(rows)
    weight, errors = np.random.default_rng(12).normal(size=(40, 50)), []
    for block in (7, 16, 1000):
        monkeypatch.setattr(rounding, "BLOCK", block)
        errors.append(error(weight, *rounded(weight, 7, covariance, as_wanted), covariance).sum())
    np.testing.assert_allclose(errors, errors[-1], rtol=0.03)


def test_independent_inputs_get_the_nearest_integers_of_a_searched_step():
    weight = np.random.default_rng(6).normal(size=(20, 33))
    for matrix in (None, np.eye(33), np.zeros((33, 33))):
        integer, step = rounded(weight, 1, matrix, as_wanted)
        assert np.array_equal(integer, np.clip(np.rint(weight / step[:, None]), -1, 1))
        assert (step < 0.95 * np.abs(weight).max(-1)).all()


def test_edges():
    weight = np.zeros((3, 5))
    weight[1], weight[2, 3] = 2.0, -1e-9
    integer, step = rounded(weight, 7, np.eye(5), as_wanted)
    np.testing.assert_array_equal(integer[0], 0)
    np.testing.assert_allclose(integer * step[:, None], weight, rtol=0.03)
    integer, step = rounded(np.array([[0.3]]), 1, np.array([[4.0]]), as_wanted)
    assert integer == 1 and step == pytest.approx(0.3)
    # Steps are the caller's: here powers of two.
    _, step = rounded(np.random.default_rng(0).normal(size=(4, 5)), 7, None,
                      lambda step: 2.0 ** np.ceil(np.log2(step)))
    np.testing.assert_array_equal(np.log2(step), np.rint(np.log2(step)))


def test_covariance_of_weighted_rows():
    rows = np.random.default_rng(7).normal(size=(4000, 3)) @ np.array([[1, 2, 0], [0, 1, 0], [0, 0, 3.0]])
    twice, weight = np.concatenate([rows, rows[:100]]), np.ones(4000)
    weight[:100] = 2
    mean, covariance = inputs_covariance(rows + 5, weight)
    np.testing.assert_allclose(mean, twice.mean(0) + 5)
    np.testing.assert_allclose(covariance, np.cov(twice.T, bias=True), rtol=2e-3, atol=2e-2)
    mean, covariance = inputs_covariance(rows[:5], np.zeros(5))  # gates that closed on all of them
    assert np.isfinite(covariance).all() and np.isfinite(mean).all()


@pytest.mark.parametrize("bits", [4, 2])
def test_what_rounding_loses_at_the_mean_is_in_the_bias(bits):
    rows = correlated(800, 24, seed=8) + 3
    weight, bias = np.random.default_rng(9).normal(size=(10, 24)), np.zeros(10)
    mean, covariance = inputs_covariance(rows)
    source = Tensor("x", 0.01, mean=mean, covariance=covariance)
    integer, affine = scaled_weights(weight, bias, source, 0.001, 16, limit=WEIGHT_BITS[bits])
    scale = affine.multiplier / 2.0 ** affine.shift * 0.001
    found = (integer * scale[:, None] / 0.01) @ mean + affine.bias * scale
    np.testing.assert_allclose(found, weight @ mean, atol=2 * scale.max())
