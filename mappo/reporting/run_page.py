"""The HTML page of one run or several: learning curves, evaluation, animated episodes and configuration.

The page contains everything that it shows. It needs no network, stores nothing, and works in a sandboxed frame
that allows only scripts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mappo.config import config_hash, differences, fields_of, from_dict
from mappo.errors import ConfigError
from mappo.evaluation.comparison import compare
from mappo.evaluation.evaluation import EvaluationReport, changed_settings
from mappo.evaluation.statistics import probability_of_improvement
from mappo.reporting.command_line import command_of
from mappo.reporting.diagnosis import diagnose
from mappo.reporting.html import embedded, render
from mappo.reporting.plots import Plot, Rows, evaluation_plot, training_plots
from mappo.reporting.run_record import RunRecord
from mappo.reporting.tables import checkpoint_notes, measurement_rows
from mappo.training.history import parse_history

MAX_BYTES = 8_000_000
_INTERVALS = "95 % intervals; resampled: "


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
    is_single = len(records) == 1
    return render(
        "page.html",
        plots,
        title=_title(records),
        subtitle=_subtitle(records),
        facts=_facts(records[0], histories[records[0].name]) if is_single else [],
        headline=None if is_single else _headline(records, histories),
        warnings=[*_warnings(records, histories), *warnings],
        findings=findings,
        players=players,
        evaluations=evaluations,
        others=_other_rows(records[0]) if is_single else [],
        comparison=None if is_single else _comparison(records),
        curves=curves,
        records=[_run_facts(record) for record in records],
    )


def _run_facts(record: RunRecord) -> dict[str, Any]:
    """Return what was run: where and when, the command that makes it again, and the whole configuration."""
    config = from_dict(record.config)
    facts = {**record.facts, "configuration hash": config_hash(config)}
    return {
        "name": record.name,
        "facts": [(name, value) for name, value in facts.items() if value],
        "command": command_of(config),
        "rows": [(name, json.dumps(value)) for name, value in fields_of(config).items()],
    }


def _title(records: Sequence[RunRecord]) -> str:
    scenarios = sorted({record.config["environment"]["scenario"] for record in records})
    return f"{', '.join(scenarios)}: {', '.join(record.name for record in records)}"


def _subtitle(records: Sequence[RunRecord]) -> str:
    runs = "A run" if len(records) == 1 else f"{len(records)} runs"
    algorithms = dict.fromkeys(from_dict(record.config).networks.algorithm for record in records)
    return f"{runs} of {' and '.join(algorithms)}: a team of agents learns a task together."


def _facts(record: RunRecord, rows: Rows) -> list[tuple[str, str]]:
    """Return the headline of one run: its evaluation, with the judged checkpoint, and its training."""
    facts: list[tuple[str, str]] = []
    if report := record.evaluation:
        facts.append((f"mean return of {_judged(record, rows)}", str(report.trained.mean)))
        facts += [
            (f"mean return of the {name} policy", str(returns.mean))
            for name, returns in report.policies().items()
            if name != "trained"
        ]
    if seconds := _last(rows, "elapsed_seconds"):
        facts.append(("seconds of training", f"{seconds:,.0f}"))
    if frames := _last(rows, "frames"):
        facts.append(("frames of training", f"{frames:,.0f}"))
    return [*facts, ("training seed", str(record.config["seed"]))]


def _judged(record: RunRecord, rows: Rows) -> str:
    """Return which checkpoint an evaluation judges, after how many frames."""
    report = record.evaluation
    assert report
    is_best = report.training_frames == record.best_frames or (
        record.best_frames is None and report.checkpoint == "best"
    )
    kind = "the best checkpoint" if is_best else "the checkpoint"
    frames = _last(rows, "frames")
    of_all = f" of {frames:,.0f}" if frames else ""
    return f"{kind}, after {report.training_frames:,}{of_all} frames"


def _headline(records: Sequence[RunRecord], histories: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the table with which a page of several runs begins."""
    first = from_dict(records[0].config)
    rows = []
    for record in records:
        report, history = record.evaluation, histories[record.name]
        changes = differences(first, from_dict(record.config))
        seed = changes.pop("seed", None)
        frames = _last(history, "frames")
        rows.append(
            (
                record.name,
                str(report.trained.mean) if report else "not evaluated",
                f"{report.training_frames:,}" if report else "",
                f"{frames:,.0f}" if frames else "",
                _duration(_last(history, "elapsed_seconds")),
                str(record.config["seed"]),
                "; ".join(f"{name} {change}" for name, change in changes.items())
                or ("" if record is records[0] else "only the seed" if seed else "nothing"),
            )
        )
    heads = ("run", "mean return", "judged after frames", "frames", "time", "seed", "differs from the first in")
    note = "Mean returns are those of evaluations on held-out seeds, with 95 % intervals over their episodes."
    return {"heads": heads, "rows": rows, "texts": [6], "note": note}


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.0f} s"


def _last(rows: Rows, column: str) -> float | None:
    """Return the last number of a column; None if there is none."""
    value = rows[-1].get(column, math.nan) if rows else math.nan
    return value if math.isfinite(value) else None


def _other_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Return a row for each evaluation of another checkpoint, or under other settings."""
    return [
        (
            report.checkpoint or "unknown",
            f"{report.training_frames:,}",
            str(report.trained.mean),
            str(len(report.trained.episode_returns)),
            "; ".join(f"{name} {change}" for name, change in _changed_settings(report).items()) or "none",
        )
        for report in record.others
    ]


def _changed_settings(report: EvaluationReport) -> dict[str, str]:
    return changed_settings(from_dict(report.config), from_dict(report.training_config))


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
    if report.no_heuristic:
        note += f" No heuristic policy: {report.no_heuristic}."
    named = Plot(f"{plot.identifier}-{index}", plot.title, plot.explanation, plot.figure)
    measured = measurement_rows({name: returns.measurements for name, returns in report.policies().items()})
    return {"name": record.name, "plot": named, "rows": rows, "note": note, "measured": measured}


def _comparison(records: Sequence[RunRecord]) -> dict[str, Any]:
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
    note = (
        f"{_INTERVALS}evaluation episodes of one trained policy. They do not cover other training seeds; `mappo "
        "compare` does. Probability of improvement: the probability that an episode of this run earns more than "
        f"an episode of {evaluated[0].name if evaluated else records[0].name}; a tie counts as one half."
    )
    heads = ("run", "mean return", "interquartile mean", "probability of improvement over the first")
    reports = {record.name: record.evaluation for record in evaluated if record.evaluation}
    seeds = _over_seeds([*reports.values()])
    measured = measurement_rows({name: report.trained.measurements for name, report in reports.items()})
    return {
        "heads": heads,
        "rows": rows,
        "note": note,
        "seeds": seeds,
        "measured": measured,
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
    note = " ".join([note, *(f"{line[0].upper()}{line[1:]}." for line in checkpoint_notes(result))])
    measured = measurement_rows(
        {
            name: configuration.measurements
            for (name, *_), configuration in zip(rows, result.configurations, strict=True)
        }
    )
    return {"heads": heads, "rows": rows, "note": note, "measured": measured}


def _warnings(records: Sequence[RunRecord], histories: Mapping[str, Rows]) -> list[str]:
    return [
        f"{record.name}: {warning}"
        for record in records
        for warning in [*_training_warnings(record, histories[record.name]), *_evaluation_warnings(record)]
    ]


def _training_warnings(record: RunRecord, rows: Rows) -> list[str]:
    warnings = list(record.problems)
    if failed := _last(rows, "num_failed_saves"):
        warnings.append(f"in the last attempt, saving a checkpoint failed {failed:.0f} times.")
    frames, final_frames = _last(rows, "frames"), from_dict(record.config).collection.final_frames
    if frames and frames < final_frames:
        warnings.append(f"this run has not finished: it has {frames:,.0f} of {final_frames:,} frames.")
    return warnings


def _evaluation_warnings(record: RunRecord) -> list[str]:
    report = record.evaluation
    if report is None:
        return ["not evaluated yet; run `mappo evaluate`."]
    warnings = []
    if record.best_frames not in (None, report.training_frames):
        warnings.append(
            f"the evaluation judges the checkpoint after {report.training_frames:,} frames, but the best is now "
            f"that after {record.best_frames:,}; run `mappo evaluate`."
        )
    if from_dict(report.training_config) != from_dict(record.config):
        warnings.append("the evaluation judges a training with another configuration.")
    if changes := _changed_settings(report):
        texts = ", ".join(f"{name} {change}" for name, change in changes.items())
        warnings.append(f"the evaluation has other settings than the run: {texts}.")
    return warnings


def _player(name: str, index: int, rollouts: dict[str, Any]) -> dict[str, Any]:
    has_lidar = any(episode["lidars"] for episode in rollouts["episodes"])
    policies = dict.fromkeys(episode["policy"] for episode in rollouts["episodes"])
    baselines = [policy for policy in policies if policy != "trained"]
    player = {"name": name, "identifier": f"rollouts-{index}", "has_lidar": has_lidar, "baselines": baselines}
    return {**player, "json": embedded(rollouts)}
