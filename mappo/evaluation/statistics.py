"""Summaries of episode returns with the intervals that a reader needs to believe a difference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval; low and high are None where there are too few values for one."""

    value: float
    low: float | None
    high: float | None


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with a percentile bootstrap interval that resamples the values given."""
    return _estimate(values, trimmed=0)


def interquartile_mean(values: Sequence[float]) -> Estimate:
    """The mean of the middle half, robust to outliers, with an interval as that of `mean`.

    Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (2021), 4.3.
    """
    return _estimate(values, trimmed=0.25)


def probability_of_improvement(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """P(X > Y) + P(X = Y) / 2 for X of values and Y of reference; the interval resamples both, independently.

    Source: Agarwal et al. (2021), 4.3: the Mann-Whitney statistic, averaged over tasks, of which here is one.
    """
    from scipy.stats import bootstrap

    sample, other = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    value = float(_probability(sample, other, -1))
    if min(len(sample), len(other)) < 2:
        return Estimate(value, None, None)
    interval = bootstrap(
        (sample, other),
        _probability,
        n_resamples=2_000,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with Student's t interval, which is wide enough for the few seeds that people can afford.

    A bootstrap of three to five values is too narrow: it covers the true mean far less often than it says.
    """
    from scipy.stats import ttest_1samp

    sample = np.asarray(values, dtype=np.float64)
    return _with_interval(float(sample.mean()), sample, lambda: ttest_1samp(sample, 0.0))


def difference_over_seeds(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """mean(values) - mean(reference) with Welch's interval, for independent seeds and unequal variances."""
    from scipy.stats import ttest_ind

    sample, other = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    difference = float(sample.mean() - other.mean())
    if min(len(sample), len(other)) < 2:
        return Estimate(difference, None, None)
    return _with_interval(
        difference,
        np.concatenate([sample - sample.mean(), other - other.mean()]),
        lambda: ttest_ind(sample, other, equal_var=False),
    )


def paired_lower_bound(values: Sequence[float], reference: Sequence[float], confidence: float) -> float:
    """One-sided lower confidence bound of mean(values - reference), for pairs, by Student's t."""
    from scipy.stats import ttest_rel

    difference = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if np.ptp(difference) == 0:
        return float(difference[0])
    return float(ttest_rel(values, reference, alternative="greater").confidence_interval(confidence).low)


def _probability(sample: Any, other: Any, axis: int) -> Any:  # noqa: ARG001  (as scipy calls it: the last)
    """The Mann-Whitney statistic as a share of all pairs, from ranks."""
    from scipy.stats import rankdata

    size, num_others = sample.shape[-1], other.shape[-1]
    shape = np.broadcast_shapes(sample.shape[:-1], other.shape[:-1])
    both = np.concatenate(
        [np.broadcast_to(sample, (*shape, size)), np.broadcast_to(other, (*shape, num_others))], axis=-1
    )
    ranks = rankdata(both, axis=-1)[..., :size].sum(axis=-1)
    return (ranks - size * (size + 1) / 2) / (size * num_others)


def _with_interval(value: float, sample: "np.ndarray[Any, Any]", test: Callable[[], Any]) -> Estimate:
    """The interval of a t test, unless there are too few values for one or they do not vary."""
    if len(sample) < 2:
        return Estimate(value, None, None)
    if np.ptp(sample) == 0:
        return Estimate(value, value, value)
    interval = test().confidence_interval(CONFIDENCE)
    return Estimate(value, float(interval.low), float(interval.high))


def _estimate(values: Sequence[float], trimmed: float) -> Estimate:
    """The mean without a share `trimmed` of the values at either end."""
    from scipy.stats import bootstrap, trim_mean  # scipy takes a second to import; few callers need it

    sample = np.asarray(values, dtype=np.float64)
    value = float(trim_mean(sample, trimmed))
    if len(sample) < 2:
        return Estimate(value, None, None)
    if np.ptp(sample) == 0:
        return Estimate(value, value, value)
    interval = bootstrap(
        (sample,),
        lambda resample, axis: trim_mean(resample, trimmed, axis=axis),
        n_resamples=RESAMPLES,
        batch=1_000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
