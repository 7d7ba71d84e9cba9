import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from mappo.evaluation.statistics import (
    Estimate,
    difference_over_seeds,
    interquartile_mean,
    mean,
    mean_over_seeds,
    probability_of_improvement,
)


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert interquartile_mean([-1000, 1, 2, 3, 4, 5, 6, 1000]).value == pytest.approx(3.5)


def test_mean_interval_agrees_with_the_normal_one_on_many_values():
    values = np.random.default_rng(0).normal(10, 2, 1_000).tolist()
    estimate = mean(values)
    half = 1.96 * np.std(values) / np.sqrt(1_000)
    assert estimate.value == pytest.approx(np.mean(values))
    assert estimate.low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert estimate.high == pytest.approx(np.mean(values) + half, abs=0.02)


def test_interval_contains_the_true_mean_in_about_95_of_100_samples():
    generator = np.random.default_rng(1)
    num_hits = 0
    for _ in range(100):
        estimate = mean(generator.exponential(1.0, 60).tolist())
        num_hits += estimate.low <= 1.0 <= estimate.high
    assert 88 <= num_hits <= 98


def test_interval_is_the_same_every_time():
    assert mean([1.0, 2.0, 5.0]) == mean([1.0, 2.0, 5.0])


def test_equal_values_have_an_interval_of_no_width():
    estimate = interquartile_mean([2.0] * 5)
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def test_one_value_has_no_interval():
    estimate = mean([2.0])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, None, None)


def test_interval_over_four_seeds_has_its_nominal_coverage_and_a_bootstrap_has_not():
    generator = np.random.default_rng(2)
    samples = [generator.normal(0.0, 1.0, 4).tolist() for _ in range(150)]

    def coverage(interval):
        return sum(estimate.low <= 0 <= estimate.high for estimate in map(interval, samples)) / len(samples)

    assert 0.91 <= coverage(mean_over_seeds) <= 0.99
    assert coverage(mean) < 0.88


def test_difference_over_seeds_of_one_seed_has_no_interval():
    assert difference_over_seeds([2.0], [1.0, 1.5]) == Estimate(0.75, None, None)


def test_probability_of_improvement_is_the_mann_whitney_statistic_of_all_pairs():
    """Compare with scipy's statistic, and with a count by hand that has a tie: 5 of 6 pairs, and half of one."""
    generator = np.random.default_rng(3)
    values, reference = generator.integers(0, 20, 30).tolist(), generator.integers(0, 20, 17).tolist()
    expected = mannwhitneyu(values, reference).statistic / (30 * 17)
    assert probability_of_improvement(values, reference).value == pytest.approx(expected)
    assert probability_of_improvement([2.0, 3.0], [1.0, 2.0, 1.0]).value == pytest.approx(5.5 / 6)


def test_interval_of_the_probability_of_improvement_contains_the_true_value():
    """The true value is Phi(1 / sqrt(2)) for two normal distributions that are one deviation apart."""
    generator, true_value, num_hits = np.random.default_rng(4), norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(60):
        estimate = probability_of_improvement(
            generator.normal(1, 1, 40).tolist(), generator.normal(0, 1, 40).tolist()
        )
        num_hits += estimate.low <= true_value <= estimate.high
    assert num_hits >= 52
