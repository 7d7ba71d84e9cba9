"""The comparison of configurations: evaluations over several training seeds, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mappo.config import ExperimentConfig, differences, from_dict, override
from mappo.environment.reductions import MeasurementName, Reduction
from mappo.errors import ConfigError
from mappo.evaluation import statistics
from mappo.evaluation.evaluation import EpisodeReturns, EvaluationReport
from mappo.evaluation.statistics import Estimate
from mappo.strict_json import json_hash, to_dict

INTERVALS = (
    "95 % Student's t intervals over training seeds; the value of a seed is the mean return of its evaluation"
)
_NOT_THE_LEARNING = {"seed": 0, "threads": 1, "device": "auto"}  # fields that may differ within one configuration


@dataclass(frozen=True)
class SeedMeasurement:
    """A measurement of a configuration. seed_values: the mean over evaluation episodes, of each training seed.

    mean: their mean. difference: this mean minus that of the first configuration, with Welch's interval; None for
    the first itself, and if the first does not have the measurement.
    """

    reduction: Reduction
    seed_values: list[float]
    mean: Estimate
    difference: Estimate | None

    def __str__(self) -> str:
        """Return the mean, and the difference from the first configuration."""
        return str(self.mean) + (f"; difference {self.difference}" if self.difference else "")


@dataclass(frozen=True)
class Configuration:
    """A configuration that was trained with several seeds, all from scratch or all from the same start.

    differs: the differences from the first configuration; empty for the first itself. episode_returns: the mean
    evaluation return of each of training_seeds. mean: their mean. gain: this mean minus the mean of the first
    configuration, with Welch's interval; None for the first. interquartile_mean: the mean of the middle half of
    episode_returns. improvement: the probability that a seed of this configuration earns more than a seed of the
    first. The last two follow Agarwal et al. (2021), for one task. Their intervals resample training seeds, and
    are too narrow for fewer than about ten seeds. measurements: the measurements that every seed has, by name.
    """

    differs: dict[str, str]
    training_seeds: list[int]
    episode_returns: list[float]
    mean: Estimate
    gain: Estimate | None
    interquartile_mean: Estimate
    improvement: Estimate | None
    measurements: dict[MeasurementName, SeedMeasurement] = field(default_factory=dict)
    training_frames: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ComparisonReport:
    """The results of several configurations and of the baselines, all on the same evaluation episodes.

    config: the first configuration, with its first seed. intervals: the meaning of the configurations' intervals.
    The baselines are not trained, so that their intervals resample evaluation episodes.
    """

    config: dict[str, Any]
    intervals: str
    configurations: list[Configuration]
    random: EpisodeReturns
    heuristic: EpisodeReturns | None


def compare(reports: Sequence[EvaluationReport]) -> ComparisonReport:
    """Group evaluations by their training configuration without its seed, and compare the groups with the first.

    The groups have the order of the reports.

    Raises:
        ConfigError: there is no report, the reports were evaluated on different episodes or judge checkpoints of
            different kinds, such as best and last, or a configuration has the same seed twice.
    """
    if not reports:
        raise ConfigError("there is no evaluation report to compare")
    _require_same_episodes(reports)
    _require_same_checkpoint(reports)
    groups: dict[str, list[EvaluationReport]] = {}
    for report in reports:
        key = f"{json_hash(to_dict(_without_seed(report)))} {report.started_from}"
        groups.setdefault(key, []).append(report)
    for group in groups.values():
        _require_different_seeds(group)
    first, *_ = groups.values()
    return ComparisonReport(
        config=reports[0].training_config,
        intervals=INTERVALS,
        configurations=[_configuration(group, first) for group in groups.values()],
        random=reports[0].random,
        heuristic=reports[0].heuristic,
    )


def _configuration(group: list[EvaluationReport], first: list[EvaluationReport]) -> Configuration:
    returns = [report.trained.mean.value for report in group]
    reference = [report.trained.mean.value for report in first]
    first_start, start = first[0].started_from or "scratch", group[0].started_from or "scratch"
    differs = differences(_without_seed(first[0]), _without_seed(group[0]))
    return Configuration(
        differs=differs if first_start == start else {**differs, "started from": f"{first_start} -> {start}"},
        training_seeds=[report.training_config["seed"] for report in group],
        episode_returns=returns,
        mean=statistics.mean_over_seeds(returns),
        gain=None if group is first else statistics.difference_over_seeds(returns, reference),
        interquartile_mean=statistics.interquartile_mean(returns),
        improvement=None if group is first else statistics.probability_of_improvement(returns, reference),
        measurements=_measurements(group, first),
        training_frames=[report.training_frames for report in group],
        unfinished=[report.training_config["seed"] for report in group if _is_unfinished(report)],
    )


def _is_unfinished(report: EvaluationReport) -> bool:
    if report.run_frames is None:
        return False
    return report.run_frames < from_dict(report.training_config).collection.final_frames


def _measurements(group: list[EvaluationReport], first: list[EvaluationReport]) -> dict[str, SeedMeasurement]:
    values, reference = _seed_values(group), _seed_values(first)
    return {
        name: SeedMeasurement(
            reduction=reduction,
            seed_values=numbers,
            mean=statistics.mean_over_seeds(numbers),
            difference=statistics.difference_over_seeds(numbers, reference[name, reduction])
            if group is not first and (name, reduction) in reference
            else None,
        )
        for (name, reduction), numbers in values.items()
    }


def _seed_values(group: list[EvaluationReport]) -> dict[tuple[str, Reduction], list[float]]:
    """Return the means of the measurements that every evaluation has, by name and reduction."""
    means: dict[tuple[str, Reduction], list[float]] = {}
    for report in group:
        for name, measurement in report.trained.measurements.items():
            if measurement.mean:
                means.setdefault((name, measurement.reduction), []).append(measurement.mean.value)
    return {key: values for key, values in means.items() if len(values) == len(group)}


def _without_seed(report: EvaluationReport) -> ExperimentConfig:
    config = from_dict(report.training_config)
    return override(config, {**_NOT_THE_LEARNING, "evaluation": to_dict(ExperimentConfig())["evaluation"]})


def _require_same_episodes(reports: Sequence[EvaluationReport]) -> None:
    first = from_dict(reports[0].config)
    for number, report in enumerate(reports[1:], start=2):
        changes = differences(first, from_dict(report.config))
        fields = [name for name in changes if name.startswith(("environment.", "evaluation."))]
        if fields:
            text = ", ".join(f"{name} = {changes[name]}" for name in fields)
            raise ConfigError(f"report {number} was evaluated on other episodes than the first: {text}")


def _require_same_checkpoint(reports: Sequence[EvaluationReport]) -> None:
    """Refuse to mix best checkpoints with others. Reports of older versions do not say which one they judge."""
    kinds = {report.checkpoint: number for number, report in enumerate(reports, start=1) if report.checkpoint}
    if len(kinds) > 1:
        texts = " and ".join(f"{kind!r} (report {number})" for kind, number in kinds.items())
        raise ConfigError(
            f"the reports judge checkpoints of different kinds, {texts}: evaluate the same one of every run"
        )


def _require_different_seeds(group: list[EvaluationReport]) -> None:
    seeds = [report.training_config["seed"] for report in group]
    if duplicates := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ConfigError(f"seed {', '.join(map(str, duplicates))}: trained and evaluated more than once")
