"""The statistics of episode returns: means and differences with their confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % confidence interval. low and high are None if there are fewer than two values."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Return the value with its interval, as in `0.98 [0.96, 1]`."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


def plain_mean(values: Sequence[float]) -> Estimate:
    """Return the mean without an interval."""
    return Estimate(math.fsum(values) / len(values), None, None)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean, with a percentile bootstrap interval that resamples the values."""
    return _estimate(values, trimmed=0)


def interquartile_mean(values: Sequence[float]) -> Estimate:
    """Return the mean of the middle half of the values, which is robust to outliers.

    The interval is a percentile bootstrap, as in `mean`.

    Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (2021), 4.3.
    """
    return _estimate(values, trimmed=0.25)


def probability_of_improvement(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Return P(X > Y) + P(X = Y) / 2, with X drawn from `values` and Y from `reference`.

    The interval resamples both, independently.

    Source: Agarwal et al. (2021), 4.3: the Mann-Whitney statistic, averaged over tasks; there is only one task
    here.
    """
    from scipy.stats import bootstrap

    sample, baseline = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    value = float(_probability(sample, baseline, -1))
    if min(len(sample), len(baseline)) < 2:
        return Estimate(value, None, None)
    interval = bootstrap(
        (sample, baseline),
        _probability,
        n_resamples=2_000,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def mean_probability_of_improvement(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate:
    """Return the mean over tasks of the probability of improvement; a pair has a task's values and its reference.

    The interval is a percentile bootstrap that resamples the values within each task. It is missing if a task has
    fewer than two values on a side.

    Source: Agarwal et al. (2021), 4.3 and its stratified bootstrap, 4.1.
    """
    samples = [(np.asarray(values, np.float64), np.asarray(reference, np.float64)) for values, reference in pairs]
    value = math.fsum(float(_probability(one, other, -1)) for one, other in samples) / len(samples)
    if min(len(side) for sample in samples for side in sample) < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(0)

    def resampled(side: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return side[rng.integers(0, len(side), (2_000, len(side)))]

    means = np.mean([_probability(resampled(one), resampled(other), -1) for one, other in samples], axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean with Student's t interval, which is reliable even for three to five training seeds.

    A bootstrap interval of so few values is too narrow: it contains the true mean far less often than 95 % of the
    time.
    """
    from scipy.stats import ttest_1samp

    sample = np.asarray(values, dtype=np.float64)
    return _with_interval(float(sample.mean()), sample, lambda: ttest_1samp(sample, 0.0))


def difference_over_seeds(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Return mean(values) - mean(reference) with Welch's interval, for independent seeds and unequal variances."""
    from scipy.stats import ttest_ind

    sample, baseline = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    difference = float(sample.mean() - baseline.mean())
    if min(len(sample), len(baseline)) < 2:
        return Estimate(difference, None, None)
    return _with_interval(
        difference,
        np.concatenate([sample - sample.mean(), baseline - baseline.mean()]),
        lambda: ttest_ind(sample, baseline, equal_var=False),
    )


def by_seed(values: Sequence[float], episodes_per_seed: int) -> list[float]:
    """Return the mean of each seed's values, which are ordered by seed."""
    means: list[float] = np.asarray(values, dtype=np.float64).reshape(-1, episodes_per_seed).mean(1).tolist()
    return means


def paired_lower_bound(values: Sequence[float], reference: Sequence[float], confidence: float) -> float:
    """Return the one-sided lower confidence bound of mean(values - reference), by Student's t for pairs."""
    from scipy.stats import ttest_rel

    difference = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if np.ptp(difference) == 0:
        return float(difference[0])
    return float(ttest_rel(values, reference, alternative="greater").confidence_interval(confidence).low)


def upper_bound(values: Sequence[float], confidence: float) -> float:
    """Return the one-sided upper confidence bound of the mean, by Student's t. It needs two values that differ."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, 0.0, alternative="less").confidence_interval(confidence).high)


def is_rare(values: Sequence[float]) -> bool:
    """Return whether values above the smallest one are rare: at least half of all equal the smallest."""
    smallest = min(values)
    return 2 * sum(value == smallest for value in values) >= len(values)


def rare_upper_bound(values: Sequence[float], largest_event: float, confidence: float) -> float:
    """Return the one-sided upper confidence bound of the mean of independent values, most of which are equal.

    Values lie above the smallest one only by rare events, each by at most `largest_event`. Without an event the
    bound is the rule of three: at 95 %, 3 times the largest event over the number of values. If all events have
    the largest size, it is Poisson's exact bound, which is above the exact bound of a proportion.

    Source: Fay and Feuer, Confidence intervals for directly standardized rates (1997), with the sizes of events
    as weights.
    """
    from scipy.stats import gamma

    excess = np.asarray(values, dtype=np.float64) - min(values)
    total, variance = excess.sum() + largest_event, (excess**2).sum() + largest_event**2
    bound = gamma.ppf(confidence, total**2 / variance, scale=variance / total)
    return min(values) + float(bound) / len(excess)


def _probability(sample: Any, baseline: Any, axis: int) -> Any:  # noqa: ARG001  (scipy passes it; it is the last axis)
    """Return the Mann-Whitney statistic as a share of all pairs, computed from ranks."""
    from scipy.stats import rankdata

    size, baseline_size = sample.shape[-1], baseline.shape[-1]
    shape = np.broadcast_shapes(sample.shape[:-1], baseline.shape[:-1])
    both = np.concatenate(
        [np.broadcast_to(sample, (*shape, size)), np.broadcast_to(baseline, (*shape, baseline_size))], axis=-1
    )
    rank_sum = rankdata(both, axis=-1)[..., :size].sum(axis=-1)
    return (rank_sum - size * (size + 1) / 2) / (size * baseline_size)


def _with_interval(value: float, sample: "np.ndarray[Any, Any]", test: Callable[[], Any]) -> Estimate:
    """Add the interval of a t test to a value: none for fewer than two values, zero width if they do not vary."""
    if len(sample) < 2:
        return Estimate(value, None, None)
    if np.ptp(sample) == 0:
        return Estimate(value, value, value)
    interval = test().confidence_interval(CONFIDENCE)
    return Estimate(value, float(interval.low), float(interval.high))


def _estimate(values: Sequence[float], trimmed: float) -> Estimate:
    """Return the mean without the lowest and the highest share `trimmed` of the values."""
    from scipy.stats import bootstrap, trim_mean  # imported here: it takes a second, and few callers need it

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
