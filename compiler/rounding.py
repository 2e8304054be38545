"""Narrow weights: the integers that leave a layer's results as they are, not each weight.

With few bits the nearest integer is a poor choice. An error in one weight can be made up for by
others that meet the same inputs; how much of it, the inputs' covariance says.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["inputs_covariance", "nested", "rounded"]

BLOCK = 32  # columns whose errors are summed before they reach the columns outside
DAMPING = 0.01  # of the mean variance, on each input's (Frantar et al. 2022, section 3.3)
NESTED_DAMPING = 0.3  # less error goes on, as the lower halves cannot take back much of it
ALIKE = 8  # rows, as of an expert that has just enough to be looked at by itself
SWEEPS = 2  # over all columns after the first choice
SHARES = {7: np.linspace(0.4, 1.0, 25), 1: np.linspace(0.2, 1.0, 33)}  # of a channel's largest weight


def inputs_covariance(samples: np.ndarray, weight: np.ndarray | None = None
                      ) -> tuple[np.ndarray, np.ndarray]:
    """Mean [K] and covariance [K, K] of a layer's inputs.

    samples : float [rows, K]; weight : [rows], how much each row counts. Few rows show relations that
    there are none of: half as many rows as inputs are added in which inputs are independent, and
    `ALIKE` in which all are equally large (shrinkage, Ledoit and Wolf 2004, with fixed shares).
    """
    samples = samples.astype(np.float64)
    if weight is None or not weight.any():
        weight = np.ones(len(samples))
    share = weight.astype(np.float64) / weight.sum(dtype=np.float64)
    mean = share @ samples
    centred = samples - mean
    covariance = (centred * share[:, None]).T @ centred
    rows = 1 / np.square(share).sum()  # that count: as many equal ones would
    own = np.diagonal(covariance)
    own = (rows * own + ALIKE * own.mean()) / (rows + ALIKE)
    covariance *= rows / (rows + samples.shape[1] / 2)
    np.fill_diagonal(covariance, own)
    return mean, covariance


def rounded(weight: np.ndarray, limit: int, covariance: np.ndarray | None,
            admissible: Callable[[np.ndarray], np.ndarray], damping: float = DAMPING,
            ) -> tuple[np.ndarray, np.ndarray]:
    """Integers [N, K], as floats, and the step [N] that stands for each channel's ones.

    weight : float [N, K]; limit : the largest integer; covariance : of the inputs, [K, K], None where
    nothing is known about them; admissible : steps that a channel may have for those it would like.

    Each channel's expected squared error ``(w - step q)' C (w - step q)`` is brought down: a step by
    search, integers by rounding with error feedback (GPTQ: Frantar et al. 2022, section 3, columns of
    large variance first), the step that fits them best, and sweeps of coordinate descent
    (QuantEase: Behdin et al. 2023).
    """
    matrix = _damped(covariance, weight.shape[1], damping)
    step = _searched(weight, limit, np.diagonal(matrix))
    integer = _fed_back(weight, step, limit, matrix)
    step = admissible(_fitted(weight, integer, step, matrix))
    return _descended(weight, step, -limit, limit, matrix, integer), step


def nested(weight: np.ndarray, covariance: np.ndarray | None,
           admissible: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Integers of 8 bits that are good ones of 4 bits when `upper_half` rounds them, with a step 16 times
    as large (bit-nested weights: D2MoE, Wang et al. 2025). Arguments and result as of
    `rounded`.

    The 4 bits are chosen first, then the others within what rounds to them.
    """
    upper, step = rounded(weight, 7, covariance, lambda step: 16 * admissible(step / 16),
                          NESTED_DAMPING)
    step, low, high = step / 16, 16 * upper - 8, 16 * upper + 7
    integer = np.clip(np.rint(weight / np.where(step == 0, 1.0, step)[:, None]), low, high)
    return _descended(weight, step, low.T, high.T, _damped(covariance, weight.shape[1]), integer), step


def _damped(covariance: np.ndarray | None, inputs: int, damping: float = DAMPING) -> np.ndarray:
    """Covariance of a mean variance of 1, that has an inverse."""
    matrix = np.eye(inputs) if covariance is None else covariance
    variance = np.trace(matrix) / inputs
    matrix = matrix / variance if variance > 0 else np.eye(inputs)
    return matrix + damping * np.eye(inputs)


def _nearest(weight: np.ndarray, step: np.ndarray, limit: int) -> np.ndarray:
    return np.clip(np.rint(weight / np.where(step == 0, step.dtype.type(1), step)), -limit, limit)


def _searched(weight: np.ndarray, limit: int, variance: np.ndarray) -> np.ndarray:
    """Step of each channel with the least error of nearest integers, inputs taken as independent."""
    largest = np.abs(weight).max(-1) / limit
    best, step = np.full(len(weight), np.inf), largest
    for share in SHARES[limit]:
        candidate = share * largest
        error = weight - _nearest(weight, candidate[:, None], limit) * candidate[:, None]
        error = np.square(error) @ variance
        step, best = np.where(error < best, candidate, step), np.minimum(error, best)
    return step


def _fed_back(weight: np.ndarray, step: np.ndarray, limit: int, matrix: np.ndarray) -> np.ndarray:
    """Column after column to the nearest integer; those to come take over its error."""
    order = np.argsort(-np.diagonal(matrix), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T.astype(np.float32)
    rest = np.ascontiguousarray(weight.T[order], np.float32)  # a column lies in one piece
    step = step.astype(np.float32)
    integer = np.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        error = np.empty((stop - start, rest.shape[1]), np.float32)
        for column in range(start, stop):
            chosen = _nearest(rest[column], step, limit)
            integer[column] = chosen
            error[column - start] = (rest[column] - chosen * step) / factor[column, column]
            rest[column + 1:stop] -= np.outer(factor[column, column + 1:stop],
                                              error[column - start])
        rest[stop:] -= factor[start:stop, stop:].T @ error
    result = np.empty_like(integer)
    result[order] = integer
    return result.T


def _fitted(weight: np.ndarray, integer: np.ndarray, step: np.ndarray, matrix: np.ndarray
            ) -> np.ndarray:
    """Step of each channel with the least error for the integers that it has."""
    met = integer @ matrix
    wanted, size = (met * weight).sum(-1), (met * integer).sum(-1)
    usable = (wanted > 0) & (size > 0)
    return np.where(usable, wanted / np.where(usable, size, 1.0), step)


def _descended(weight: np.ndarray, step: np.ndarray, low: np.ndarray | int, high: np.ndarray | int,
               matrix: np.ndarray, integer: np.ndarray) -> np.ndarray:
    """Each column in turn to its best integers beside the others'. low, high : the least and largest
    integer, [K, N] or one for all."""
    low, high = (np.broadcast_to(np.float32(limit), integer.T.shape) for limit in (low, high))
    integer = integer.T.copy()
    slope = (matrix @ (weight.T - integer * step)).astype(np.float32)
    matrix, step = matrix.astype(np.float32), step.astype(np.float32)
    divisor = np.where(step == 0, np.float32(1), step)
    for _ in range(SWEEPS):
        for start in range(0, len(integer), BLOCK):
            stop = min(start + BLOCK, len(integer))
            change = np.empty((stop - start, integer.shape[1]), np.float32)
            for column in range(start, stop):
                better = slope[column] / (matrix[column, column] * divisor)
                better = np.clip(np.rint(integer[column] + better), low[column], high[column])
                change[column - start] = (better - integer[column]) * step
                integer[column] = better
                slope[start:stop] -= np.outer(matrix[column, start:stop], change[column - start])
            slope[:start] -= matrix[:start, start:stop] @ change
            slope[stop:] -= matrix[stop:, start:stop] @ change
    return integer.T
