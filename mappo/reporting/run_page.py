"""The HTML page of one run or several: learning curves, evaluation, animated episodes and configuration.

The page contains everything that it shows. It needs no network, stores nothing, and works in a sandboxed frame
that allows only scripts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mappo.config import config_hash, differences, from_dict
from mappo.errors import ConfigError
from mappo.evaluation.comparison import compare
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.statistics import probability_of_improvement
from mappo.reporting.diagnosis import diagnose
from mappo.reporting.html import embedded, render
from mappo.reporting.plots import Plot, evaluation_plot, training_plots
from mappo.reporting.run_record import RunRecord
from mappo.reporting.tables import group_rows, measurement_rows
from mappo.training.history import parse_history

MAX_BYTES = 8_000_000
_INTERVALS = "95 % intervals; resampled: "
_OVER_GROUPS = (
    "The mean return is over the agents of environment.return_groups, or of all groups; if groups are opponents, "
    "compare the returns of each group."
)


def build(records: Sequence[RunRecord], warnings: Sequence[str] = ()) -> str:
    """Return the page. If the page would exceed `MAX_BYTES`, it has a warning in place of the episodes."""
    page = _page(records, list(warnings), with_episodes=True)
    if len(page.encode()) <= MAX_BYTES:
        return page
    warning = "Episodes are left out: with them, this page would be larger than 8 MB."
    return _page(records, [*warnings, warning], with_episodes=False)


def _page(records: Sequence[RunRecord], warnings: list[str], with_episodes: bool) -> str:
    histories = {record.name: parse_history(record.history) for record in records}
    curves = training_plots(histories) if any(histories.values()) else []
    evaluations = [_evaluation(record, index) for index, record in enumerate(records) if record.evaluation]
    plots: list[Plot] = [*curves, *(evaluation["plot"] for evaluation in evaluations)]
    findings = [
        (record.name, diagnoses)
        for record in records
        if (diagnoses := diagnose(histories[record.name], from_dict(record.config).learner.clip_epsilon))
    ]
    players = [
        _player(record.name, index, record.rollouts)
        for index, record in enumerate(records)
        if with_episodes and record.rollouts
    ]
    return render(
        "page.html",
        plots,
        title=_title(records),
        subtitle=_subtitle(records),
        facts=_facts(records[0], histories[records[0].name]) if len(records) == 1 else [],
        warnings=[*_warnings(records), *warnings],
        findings=findings,
        players=players,
        evaluations=evaluations,
        comparison=_comparison(records) if len(records) > 1 else None,
        curves=curves,
        records=[{"name": record.name, "rows": _rows(record)} for record in records],
    )


def _title(records: Sequence[RunRecord]) -> str:
    scenarios = sorted({record.config["environment"]["scenario"] for record in records})
    return f"{', '.join(scenarios)}: {', '.join(record.name for record in records)}"


def _subtitle(records: Sequence[RunRecord]) -> str:
    runs = "A run" if len(records) == 1 else f"{len(records)} runs"
    algorithms = dict.fromkeys(from_dict(record.config).networks.algorithm for record in records)
    return f"{runs} of {' and '.join(algorithms)}: a team of agents learns a task together."


def _facts(record: RunRecord, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if record.evaluation:
        trained, random = record.evaluation.trained, record.evaluation.random
        # The mean over groups says little, since their rewards may be opposite.
        for name in trained.groups:
            facts.append((f"mean return of {name} in evaluation", str(trained.groups[name].mean)))
            facts.append((f"mean return of {name} by the random policy", str(random.groups[name].mean)))
        if not trained.groups:
            facts.append(("mean return in evaluation", str(trained.mean)))
            facts.append(("mean return of the random policy", str(random.mean)))
    for name, column, unit in (("frames of training", "frames", ""), ("training time", "elapsed_seconds", " s")):
        if rows and math.isfinite(last := rows[-1].get(column, math.nan)):
            facts.append((name, f"{last:,.0f}{unit}"))
    facts.append(("training seed", str(record.config["seed"])))
    return facts


def _evaluation(record: RunRecord, index: int) -> dict[str, Any]:
    report = record.evaluation
    assert report is not None
    plot = evaluation_plot(report.policies())
    rows = [
        (
            name,
            str(returns.mean),
            str(returns.interquartile_mean),
            f"{returns.episode_frames_mean:.0f}",
        )
        for name, returns in report.policies().items()
    ]
    episodes = len(report.trained.episode_returns)
    note = f"{episodes} episodes of each policy. {_INTERVALS}{report.resampled}."
    if report.trained.groups:
        note += f" {_OVER_GROUPS}"
    if report.no_heuristic:
        note += f" No heuristic policy: {report.no_heuristic}."
    named = Plot(f"{plot.identifier}-{index}", plot.title, plot.explanation, plot.figure)
    measured = measurement_rows({name: returns.measurements for name, returns in report.policies().items()})
    groups = group_rows({name: returns.groups for name, returns in report.policies().items()})
    return {"name": record.name, "plot": named, "rows": rows, "note": note, "measured": measured, "groups": groups}


def _comparison(records: Sequence[RunRecord]) -> dict[str, Any]:
    first = records[0]
    evaluated = [record for record in records if record.evaluation]
    rows = []
    for record in evaluated:
        report, reference = record.evaluation, evaluated[0].evaluation
        assert report is not None
        assert reference is not None
        better = probability_of_improvement(report.trained.episode_returns, reference.trained.episode_returns)
        rows.append(
            (
                record.name,
                str(report.trained.mean),
                str(report.trained.interquartile_mean),
                "" if record is evaluated[0] else str(better),
            )
        )
    differing = [
        (record.name, name, change)
        for record in records[1:]
        for name, change in differences(from_dict(first.config), from_dict(record.config)).items()
    ]
    note = (
        f"{_INTERVALS}evaluation episodes of one trained policy. They do not cover other training seeds; `mappo "
        "compare` does. Probability of improvement: the probability that an episode of this run earns more than "
        f"an episode of {evaluated[0].name if evaluated else first.name}; a tie counts as one half."
    )
    heads = ("run", "mean return", "interquartile mean", "probability of improvement over the first")
    reports = {record.name: record.evaluation for record in evaluated if record.evaluation}
    seeds = _over_seeds([*reports.values()])
    measured = measurement_rows({name: report.trained.measurements for name, report in reports.items()})
    groups = group_rows({name: report.trained.groups for name, report in reports.items()})
    return {
        "heads": heads,
        "rows": rows,
        "note": note,
        "differences": differing,
        "seeds": seeds,
        "measured": measured,
        "groups": groups,
    }


def _over_seeds(reports: Sequence[EvaluationReport]) -> dict[str, Any]:
    """Return the comparison of configurations over training seeds, or a note why there is none."""
    heads = (
        "configuration",
        "seeds",
        "mean return",
        "difference from the first",
        "interquartile mean",
        "improvement",
    )
    if len(reports) < 2:
        return {
            "heads": heads,
            "rows": [],
            "note": "Fewer than two of these runs have an evaluation.",
            "measured": [],
        }
    try:
        result = compare(reports)
    except ConfigError as error:
        note = f"Not compared over training seeds: {error}."
        return {"heads": heads, "rows": [], "note": note, "measured": []}
    rows = [
        (
            "; ".join(f"{name} {change}" for name, change in configuration.differs.items()) or "as the first run",
            ", ".join(map(str, configuration.training_seeds)),
            str(configuration.mean),
            str(configuration.gain or ""),
            str(configuration.interquartile_mean),
            str(configuration.improvement or ""),
        )
        for configuration in result.configurations
    ]
    note = (
        f"Mean and difference: {result.intervals}. Improvement: the probability that a training seed of this "
        "configuration earns more than a training seed of the first one. Interquartile mean and improvement: 95 % "
        "bootstrap intervals that resample training seeds; with fewer than about ten seeds they are too narrow. "
        "Source: Agarwal et al. (2021), for one task."
    )
    measured = measurement_rows(
        {
            name: configuration.measurements
            for (name, *_), configuration in zip(rows, result.configurations, strict=True)
        }
    )
    return {"heads": heads, "rows": rows, "note": note, "measured": measured}


def _rows(record: RunRecord) -> list[tuple[str, str]]:
    config = from_dict(record.config)
    flat = {"configuration hash": config_hash(config), **record.facts}
    for section, values in record.config.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": json.dumps(value) for name, value in values.items()}
        else:
            flat[section] = json.dumps(values)
    return list(flat.items())


def _warnings(records: Sequence[RunRecord]) -> list[str]:
    warnings = []
    for record in records:
        rows = parse_history(record.history)
        failed = rows[-1].get("num_failed_saves", 0.0) if rows else 0.0
        if failed > 0:
            warnings.append(f"{record.name}: in the last attempt, saving a checkpoint failed {failed:.0f} times.")
        if record.evaluation and record.evaluation.config["environment"] != record.config["environment"]:
            warnings.append(f"{record.name}: the evaluation used another task than the training.")
        if not record.evaluation:
            warnings.append(f"{record.name}: not evaluated yet; run `mappo evaluate`.")
    return warnings


def _player(name: str, index: int, rollouts: dict[str, Any]) -> dict[str, Any]:
    has_lidar = any(episode["lidars"] for episode in rollouts["episodes"])
    policies = dict.fromkeys(episode["policy"] for episode in rollouts["episodes"])
    baselines = [policy for policy in policies if policy != "trained"]
    player = {"name": name, "identifier": f"rollouts-{index}", "has_lidar": has_lidar, "baselines": baselines}
    return {**player, "json": embedded(rollouts)}
