"""The lines and tables that stages and look-ups print. It imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mappo.compute.resources import gibibytes, resolve_device
from mappo.config import ExperimentConfig, config_hash
from mappo.errors import one_line
from mappo.evaluation.constraints import Constraint
from mappo.evaluation.statistics import Estimate
from mappo.reporting.terminal import say
from mappo.reporting.texts import aligned
from mappo.tuning.search_space import value_of

if TYPE_CHECKING:
    from mappo.environment.validation import Check
    from mappo.evaluation.comparison import ComparisonReport, Configuration, SeedMeasurement
    from mappo.evaluation.evaluation import EpisodeReturns
    from mappo.evaluation.measurements import Measurement
    from mappo.promotion.champions import ChampionDecision
    from mappo.promotion.promotion import Decision
    from mappo.runs.checkpoint import Checkpoint, Manifest
    from mappo.runs.checkpoint_ref import CheckpointRef
    from mappo.training.history import IterationReport
    from mappo.training.training_state import StartingPoint
    from mappo.tuning.trial import TrialRecord

STUDY_NAMES = ("default", "best")  # the configurations that a study compares


def comparison_table(report: ComparisonReport, names: Sequence[str] = ()) -> list[str]:
    """Return lines of baselines, configurations and measurements, and a line that explains the intervals.

    names: those of the configurations, such as default and best; otherwise they are numbered.
    """
    trained = configuration_names(report, names)
    baselines = {"random": report.random, "heuristic": report.heuristic}
    width = max(map(len, (*baselines, *trained)))
    lines = [
        f"{name:<{width}} {returns.mean!s:<24} evaluation episodes"
        for name, returns in baselines.items()
        if returns
    ]
    measured: dict[str, Mapping[str, Measurement | SeedMeasurement]] = {
        name: returns.measurements for name, returns in baselines.items() if returns
    }
    for name, configuration in zip(trained, report.configurations, strict=True):
        lines.append(f"{name:<{width}} {configuration.mean!s:<24} training seeds  {_seed_returns(configuration)}")
        measured[name] = configuration.measurements
        if configuration.gain:
            changes = ", ".join(f"{name} = {change}" for name, change in configuration.differs.items())
            lines.append(f"{'':<{width}} {configuration.gain} more than {trained[0]}; {changes}")
    return [
        *lines,
        *measurement_lines(measured),
        *checkpoint_notes(report, names),
        f"intervals of trained policies: {report.intervals}",
    ]


def configuration_names(report: ComparisonReport, names: Sequence[str] = ()) -> list[str]:
    """Return the names of a comparison's configurations: the given ones, or trained 1, trained 2 and so on."""
    count = len(report.configurations)
    numbered = ["trained"] if count == 1 else [f"trained {number + 1}" for number in range(count)]
    return [*names[:count], *numbered[len(names) :]]


def checkpoint_notes(report: ComparisonReport, names: Sequence[str] = ()) -> list[str]:
    """Return lines about what differs between seeds: the frames of their checkpoints, and unfinished runs."""
    lines = []
    frames = {
        name: configuration.training_frames
        for name, configuration in zip(configuration_names(report, names), report.configurations, strict=True)
    }
    if len({number for numbers in frames.values() for number in numbers}) > 1:
        texts = (f"{name}: {', '.join(f'{number:,}' for number in numbers)}" for name, numbers in frames.items())
        lines.append(f"the checkpoints are those after different numbers of frames; {'; '.join(texts)}")
    for name, configuration in zip(frames, report.configurations, strict=True):
        if configuration.unfinished:
            seeds = ", ".join(map(str, configuration.unfinished))
            lines.append(f"warning: {name}: training from seed {seeds} had not finished when it was evaluated")
    return lines


def _seed_returns(configuration: Configuration) -> str:
    returns = zip(configuration.training_seeds, configuration.episode_returns, strict=True)
    return ", ".join(f"{seed}: {value:.3g}" for seed, value in returns)


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as `1 seed` and `4 seeds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def measurement_rows(policies: Mapping[str, Mapping[str, Measurement | SeedMeasurement]]) -> list[tuple[str, ...]]:
    """Return a table with a row for each measurement and a column for each policy, its heads first, or no row.

    policies: the measurements by name, for each policy.
    """
    by_label = {
        policy: {
            f"{name} ({measurement.reduction})": str(measurement) for name, measurement in measurements.items()
        }
        for policy, measurements in policies.items()
    }
    labels = sorted({label for cells in by_label.values() for label in cells})
    rows = [(label, *(cells.get(label, "") for cells in by_label.values())) for label in labels]
    return [("measurement", *by_label), *rows] if rows else []


def measurement_lines(policies: Mapping[str, Mapping[str, Measurement | SeedMeasurement]]) -> list[str]:
    """Return the lines of `measurement_rows`, with aligned columns."""
    rows = measurement_rows(policies)
    return aligned(rows, left=range(len(policies) + 1))


def say_check(check: Check) -> None:
    """Print the result of one check of the environment."""
    say("validate", f"{check.outcome:<7}  {check.name:<13}  {check.detail}")


def say_plan(config: ExperimentConfig, threads: int, start: StartingPoint | None, run: str) -> None:
    """Print the plan of a training: task, size, device, start and location."""
    collection = config.collection
    frames = collection.num_iterations * collection.frames_per_batch
    say(
        "train",
        f"{config.environment.scenario}: {frames:,} frames in {counted(collection.num_iterations, 'iteration')} "
        f"of {collection.frames_per_batch:,} ({counted(collection.num_envs, 'environment')} x "
        f"{collection.rollout_frames}) on {resolve_device(config.device)}, {counted(threads, 'CPU thread')}, "
        f"seed {config.seed}, "
        f"configuration {config_hash(config)[:12]}",
    )
    if frames != collection.total_frames:
        say("train", f"total_frames = {collection.total_frames:,} was rounded up to whole iterations")
    if start:
        checkpoint = start.checkpoint
        verb = "extends" if start.kind == "extend" else "starts with the networks of"
        frames_before, config_before = checkpoint.frames, config_hash(checkpoint.config)[:12]
        say("train", f"{verb} a run of {frames_before:,} frames, configuration {config_before}")
    say("train", f"a checkpoint is saved after every iteration in {run}")


def say_trained(final: IterationReport | None, trained: Checkpoint, chosen: Manifest, run: str) -> None:
    """Print the time and memory of a training, and its best checkpoint.

    final: the report of the last iteration; None if the run had finished before.
    """
    if final is None:
        say("train", f"this run has already finished, after {trained.frames:,} frames")
    else:
        gpu = f", {gibibytes(final.peak_gpu_memory_bytes)} of the GPU's" if final.peak_gpu_memory_bytes else ""
        say(
            "train",
            f"{trained.frames:,} frames in {final.elapsed_seconds:.1f} s; "
            f"peak memory {gibibytes(final.peak_memory_bytes)}{gpu}",
        )
        failures = final.saves.num_failed_saves
        if failures:
            say("train", f"warning: {failures} attempts to save a checkpoint failed; later attempts succeeded")
    reason = (
        "the last one; no evaluation during training"
        if chosen.selection_return is None
        else f"mean return {chosen.selection_return:.3g} in the evaluation"
    )
    say("train", f"best checkpoint: after {chosen.frames:,} frames ({reason}), in {run}")


def checkpoint_lines(
    refs: Sequence[CheckpointRef], readable: Mapping[CheckpointRef, Manifest], best: CheckpointRef | None
) -> list[str]:
    """Return a table of checkpoints that marks the last and the best."""
    lines = [f"{'iteration':>9}  {'frames':>13}  {'return':>9}  {'attempt':>7}  {'MiB':>7}"] if refs else ["none"]
    for ref in refs:
        manifest = readable.get(ref)
        if manifest is None:
            lines.append(f"{ref.iteration:>9}  {'damaged':>13}")
            continue
        mean_return = "" if manifest.selection_return is None else f"{manifest.selection_return:.4g}"
        mebibytes = manifest.size_bytes / 2**20
        marks = ["last"] * (ref == refs[0]) + ["best"] * (ref == best)
        lines.append(
            f"{ref.iteration:>9}  {manifest.frames:>13,}  {mean_return:>9}  {ref.attempt:>7}  {mebibytes:>7.2f}  "
            f"{', '.join(marks)}".rstrip()
        )
    return lines


def returns_line(policy: str, returns: EpisodeReturns) -> str:
    """Return a line with the returns of one policy in the evaluation."""
    return (
        f"{policy:<8} mean return {returns.mean}  "
        f"interquartile mean {returns.interquartile_mean}  "
        f"{len(returns.episode_returns)} episodes of {returns.episode_frames_mean:.0f} frames"
    )


def decision_lines(decision: Decision) -> list[str]:
    """Return the numbers and the decision of the promotion gate as lines."""
    gate, result = decision.gate, "is promoted" if decision.action == "promoted" else "is not promoted"
    if broken := [name for name, verdict in decision.constraints.items() if not verdict.is_kept]:
        result += f", because these episodes do not show that it keeps the constraint on {', '.join(broken)}"
    champion = f"the champion is decision {decision.champion}" if decision.champion else "there is no champion yet"
    return [
        f"candidate  mean return {decision.candidate_mean}",
        f"{decision.opponent:<10} mean return {decision.opponent_mean}",
        f"difference {decision.difference:.4g}, with {gate.confidence:.0%} confidence above "
        f"{decision.lower_bound:.4g}; the gate requires more than {gate.margin:.4g}",
        f"({decision.test})",
        *measurement_lines(decision.measurements()),
        *(f"constraint on {name}: {verdict}" for name, verdict in decision.constraints.items()),
        f"the candidate {result}; {champion}",
    ]


def trial_start(number: int, values: Mapping[str, Any], num_trials: int) -> str:
    """Return the line for the start of a trial, or for its next attempt."""
    return f"trial {number} (of {num_trials}): {_values(values)}"


def trial_end(number: int, outcome: str, reason: str, best: TrialRecord | None) -> str:
    """Return the line for the end of a trial; it also names the best trial so far."""
    best_so_far = f"; best so far {best.value:.4g}, trial {best.number}" if best else "; none is feasible so far"
    return f"trial {number} {outcome}: {reason}{best_so_far}"


def best_lines(best: TrialRecord, default: ExperimentConfig) -> list[str]:
    """Return the best trial and its changes to the default configuration as lines."""
    defaults = {path: value_of(default, path) for path in best.values}
    changed = {path: value for path, value in best.values.items() if value != defaults[path]}
    start = f"best of the study: trial {best.number}, value {best.value:.4g} on tuning seeds"
    if not changed:
        return [f"{start}: the default was best"]
    return [
        f"{start}; the highest of many values is too optimistic, so this configuration is trained again, from "
        "other seeds",
        *(f"{path} = {json.dumps(defaults[path])} -> {json.dumps(value)}" for path, value in changed.items()),
    ]


def why_no_best(trials: Sequence[TrialRecord], constraints: Mapping[str, Constraint]) -> str:
    """Return why a study has no best trial: no trial is complete, or none of them keeps the constraints."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        reasons = {trial.reason for trial in trials if trial.reason}
        return f"no trial is complete{': ' * bool(reasons)}{'; '.join(reasons)}"
    nearest = (_nearest(name, constraint, complete) for name, constraint in constraints.items())
    return (
        f"no trial is feasible: none of {len(complete)} complete trials keeps the constraints on "
        f"{'; '.join(nearest)}; nothing is chosen or promoted; request more trials, or begin a study with other "
        "tuning.constraints"
    )


def constraint_lines(trials: Sequence[TrialRecord], constraints: Mapping[str, Constraint]) -> list[str]:
    """Return a line with a study's constraints and the number of feasible trials, or no line."""
    if not constraints:
        return []
    complete = sum(trial.state == "complete" for trial in trials)
    feasible = sum(trial.is_feasible for trial in trials)
    listed = ", ".join(f"{name} {constraint}" for name, constraint in constraints.items())
    return [f"constraints: {listed}; {feasible} of {complete} complete trials are feasible"]


def _nearest(name: str, constraint: Constraint, trials: Sequence[TrialRecord]) -> str:
    """Return a constraint, and the trial that comes nearest to it."""
    measured = {trial.number: mean for trial in trials if (mean := trial.measured.get(name)) is not None}
    if not measured:
        return f"{name} ({constraint}; not measured in every episode of any trial)"
    number = min(measured, key=lambda number: constraint.excess(measured[number]))
    return f"{name} ({constraint}; nearest: {measured[number]:.4g}, trial {number})"


def trial_rows(trials: Sequence[TrialRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the column names and the cells of a table with one row for each trial."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
    constrained = list(dict.fromkeys(name for trial in trials for name in trial.measured))
    columns = [
        "trial",
        "state",
        "value",
        *constrained,
        *(["feasible"] if constrained else []),
        *(path.rpartition(".")[2] for path in paths),
        "minutes",
        "attempts",
        "reason",
    ]
    rows = [
        [
            str(trial.number),
            trial.state,
            "" if trial.value is None else f"{trial.value:.4g}",
            *(_short(trial.measured.get(name)) for name in constrained),
            *([_feasible(trial)] if constrained else []),
            *(_short(trial.values.get(path)) for path in paths),
            f"{trial.seconds / 60:.1f}",
            str(len(trial.attempts)),
            trial.reason or ("" if trial.origin == "sampled" else trial.origin),
        ]
        for trial in trials
    ]
    return columns, rows


def _feasible(trial: TrialRecord) -> str:
    """Return yes or no for a complete trial; other trials are not measured."""
    if trial.state != "complete":
        return ""
    return "yes" if trial.is_feasible else "no"


def trial_table(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the lines of a table with one line for each trial; numbers are aligned to the right."""
    columns, rows = trial_rows(trials)
    return aligned([columns, *rows], left=(columns.index("state"), columns.index("reason")))


def champion_line(entry: ChampionDecision) -> str:
    """Return the line of a decision that changed the champion."""
    difference, opponent = entry.evidence.get("difference"), entry.evidence.get("opponent")
    is_known = isinstance(difference, float) and isinstance(opponent, str)
    reason = f"{difference:.4g} better than {opponent}" if is_known else entry.reason
    decided, reason = one_line(entry.decided), one_line(reason)
    return f"{entry.number:>4}  {decided}  {entry.action:<11}  {entry.policy}  {reason}".rstrip()


def champion_summary(decision: Mapping[str, Any]) -> list[str]:
    """Return a line for each field of a champion's decision and of its evidence, without objects and lists."""
    fields = {name: value for name, value in decision.items() if name != "evidence"} | {**decision["evidence"]}
    texts = {name.replace("_", " "): _field_text(value) for name, value in fields.items()}
    width = max(map(len, texts))
    return [f"{name:<{width}}  {text}" for name, text in texts.items() if text]


def _field_text(value: Any) -> str:
    """Return a value, or an estimate with its interval, as text; empty for objects and lists."""
    if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
        return str(Estimate(**value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None or isinstance(value, Mapping | list) else one_line(value)


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} = {_short(value)}" for path, value in values.items())


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
