"""Summaries of episode returns with the intervals that a reader needs to believe a difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % bootstrap interval; low and high are None for a single value."""

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
