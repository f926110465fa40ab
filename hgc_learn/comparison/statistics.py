"""95 % bootstrap intervals over samples; of two policies, over the differences of the same samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000

Interval = tuple[float, float]


def mean_interval(values: ArrayLike) -> Interval:
    """Percentile bootstrap interval of the mean of at least two values [n]."""
    return _interval((np.asarray(values, dtype=float),), np.mean)


def paired_difference(values: ArrayLike, others: ArrayLike) -> tuple[float, Interval]:
    """Mean of `values` - `others` [n], sample by sample, and its interval."""
    difference = np.asarray(values, dtype=float) - np.asarray(others, dtype=float)
    return float(difference.mean()), mean_interval(difference)


def resampled_interval(num_samples: int, statistic: Callable[[NDArray[np.int64]], NDArray[np.floating]]) -> Interval:
    """Interval of a figure that is no mean over samples: `statistic` is given indices of samples [resamples, n]
    and returns the figure of each row [resamples]."""

    def along_axis(indices: NDArray[np.int64], axis: int) -> NDArray[np.floating]:
        rows = np.moveaxis(indices, axis, -1).reshape(-1, num_samples)
        return statistic(rows).reshape(np.delete(np.array(indices.shape), axis))

    return _interval((np.arange(num_samples),), along_axis)


def _interval(data: tuple[NDArray, ...], statistic: Callable) -> Interval:
    # Percentiles, for they also hold where all values are the same. The same resamples in every run.
    result = bootstrap(
        data,
        statistic,
        n_resamples=NUM_RESAMPLES,
        batch=200,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(result.low), float(result.high)
