"""Do configurations differ? Evaluations of several training seeds, with the intervals that answer it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mappo.config import ExperimentConfig, differences, from_dict, override
from mappo.errors import ConfigError
from mappo.evaluation import statistics
from mappo.evaluation.evaluation import EpisodeReturns, EvaluationReport
from mappo.evaluation.statistics import Estimate
from mappo.strict_json import json_hash, to_dict

INTERVALS = "95 % Student's t intervals over training seeds, each with the mean return of its evaluation"
_NOT_THE_LEARNING = {"seed": 0, "threads": 1, "device": "auto"}  # what may differ within one configuration


@dataclass(frozen=True)
class Configuration:
    """One configuration trained from several seeds, all from scratch or all started alike.

    differs says what tells it from the first configuration; it is empty for that one itself. episode_returns are
    the mean evaluation returns, one for each of training_seeds. gain is their mean less that of the first
    configuration (Welch's interval); None for the first. interquartile_mean, and improvement, the probability that
    a seed of this configuration earns more than one of the first, are those of Agarwal et al. (2021) for one task:
    their intervals resample training seeds, and are too narrow for fewer than about ten.
    """

    differs: dict[str, str]
    training_seeds: list[int]
    episode_returns: list[float]
    mean: Estimate
    gain: Estimate | None
    interquartile_mean: Estimate
    improvement: Estimate | None


@dataclass(frozen=True)
class ComparisonReport:
    """Configurations side by side on the same evaluation episodes, beside the baselines.

    config is that of the first configuration and of its first seed. intervals says what the intervals of
    configurations mean; those of the baselines resample evaluation episodes, as no seed trains them.
    """

    config: dict[str, Any]
    intervals: str
    configurations: list[Configuration]
    random: EpisodeReturns
    heuristic: EpisodeReturns | None


def compare(reports: Sequence[EvaluationReport]) -> ComparisonReport:
    """Group evaluations by what was trained, whatever the seed, in the order in which they come.

    Raises:
        ConfigError: no report, reports evaluated on different episodes, or the same seed twice.
    """
    if not reports:
        raise ConfigError("there is no evaluation report to compare")
    _require_same_episodes(reports)
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
    start, other = first[0].started_from or "scratch", group[0].started_from or "scratch"
    differs = differences(_without_seed(first[0]), _without_seed(group[0]))
    return Configuration(
        differs=differs if start == other else {**differs, "started from": f"{start} -> {other}"},
        training_seeds=[report.training_config["seed"] for report in group],
        episode_returns=returns,
        mean=statistics.mean_over_seeds(returns),
        gain=None if group is first else statistics.difference_over_seeds(returns, reference),
        interquartile_mean=statistics.interquartile_mean(returns),
        improvement=None if group is first else statistics.probability_of_improvement(returns, reference),
    )


def _without_seed(report: EvaluationReport) -> ExperimentConfig:
    config = from_dict(report.training_config)
    return override(config, {**_NOT_THE_LEARNING, "evaluation": to_dict(ExperimentConfig())["evaluation"]})


def _require_same_episodes(reports: Sequence[EvaluationReport]) -> None:
    first = from_dict(reports[0].config)
    for number, report in enumerate(reports[1:], start=2):
        changed = differences(first, from_dict(report.config))
        episodes = [name for name in changed if name.startswith(("environment.", "evaluation."))]
        if episodes:
            listed = ", ".join(f"{name} = {changed[name]}" for name in episodes)
            raise ConfigError(f"report {number} was evaluated on other episodes than the first: {listed}")


def _require_different_seeds(group: list[EvaluationReport]) -> None:
    seeds = [report.training_config["seed"] for report in group]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ConfigError(f"seed {', '.join(map(str, twice))}: trained and evaluated more than once")
