"""What one stage of a pipeline does, from its configuration to its files.

The terminal and the Kubeflow components call these functions and nothing else. Each takes the configuration as
JSON text, prints its progress, writes its files, and returns what the stage's artifacts are labelled with.
"""

import json
import logging
import math
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

import mappo
from mappo import compare as comparison
from mappo import evaluate as evaluation
from mappo import promote as promotion
from mappo import records, rollouts, runs
from mappo import report as pages
from mappo import train as training
from mappo import validate as validation
from mappo.attempts import COUNT_VARIABLE
from mappo.champions import Champions, task_name
from mappo.checkpoint import CheckpointError
from mappo.collectors import ProcessDied
from mappo.compare import ComparisonReport
from mappo.config import (
    ConfigError,
    ExperimentConfig,
    Gate,
    checked,
    config_hash,
    from_dict,
    from_json,
    override,
    parse_json,
    to_json,
)
from mappo.console import (
    WarningLines,
    comparison_table,
    decision_lines,
    returns_line,
    say,
    say_check,
    say_plan,
    say_trained,
    training_progress,
)
from mappo.environment import NonFiniteObservation
from mappo.evaluate import EvaluationReport, NonFiniteReturn
from mappo.exporting import NotExportable
from mappo.history import Beginning, HistoryFile, IterationReport
from mappo.learner import NonFiniteLoss
from mappo.monitor import Monitor, Settings
from mappo.promote import Decision
from mappo.resources import cpu_limit, require_gpu
from mappo.runs import Run
from mappo.saving import NotSaved
from mappo.simulation import SimulationStateError
from mappo.storage import StoreError, StoreUnavailable
from mappo.tensorboard import EventFiles
from mappo.training_state import Start
from mappo.validate import EnvironmentUnfit, ValidationReport

T = TypeVar("T")
_READABLE = (  # errors that people can mend, with messages that say how
    *(CheckpointError, ConfigError, EnvironmentUnfit, NotExportable),
    *(NonFiniteLoss, NonFiniteObservation, NonFiniteReturn),
    *(ProcessDied, SimulationStateError, StoreError, OSError, MemoryError, torch.OutOfMemoryError),
)
_MAY_PASS = (NotSaved, OSError, ProcessDied, StoreUnavailable)  # of those: what another attempt may not meet

HISTORY = "history.csv"  # of the whole training, beside the best checkpoint
_GOES_ON = {"train": "; training goes on from the last checkpoint"}
_NON_FINITE = {NonFiniteLoss: "loss", NonFiniteObservation: "observation", NonFiniteReturn: "return"}


class Preempted(SystemExit):
    """The machine is wanted back (SIGTERM); the exit status says so. What was saved is gone on with next time."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StageFailed(Exception):
    """A stage ended without its result, as it has printed. is_final: another attempt would fail alike."""

    def __init__(self, message: str, *, is_final: bool = False):
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True)
class Outcome:
    """What a finished stage tells the pipeline: finite numbers to plot, and what produced them."""

    metadata: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Looks:
    """An HTML page to be written, with the curves of this history. attempts: of training, if they were counted."""

    page: Path
    history: Path
    attempts: str = ""


def validate(config: str, report: Path | None = None, *, name: str = "", compiled_by: str = "") -> Outcome:
    """Check that the task is fit to train on; write the `ValidationReport` as JSON.

    In every stage, `compiled_by` is the version of this package that compiled the pipeline; another one than this
    is said. `seed` replaces that of the configuration. `name` is what metrics call the run; without it they say
    the pipeline run's ID, from MAPPO_PIPELINE_RUN in the environment, or the last part of the run's place.
    `gpu_count` is how many GPUs the pod asked for, as text: if any, the stage computes on one or fails at once.

    Raises:
        Preempted: in every stage, the process was asked to end; training has saved what it could in a hurry.
        StageFailed: a check failed.
    """
    with watched_stage("validate", config, compiled_by, label=_label(name)) as (experiment, monitor):
        result = validation.validate(experiment, on_check=say_check)
        monitor.validated(result)
        write_json(report, result)
        if result.failures:
            raise EnvironmentUnfit(_listed(result))
        counts = Counter(check.outcome for check in result.checks)
        say("validate", f"{counts['passed']} checks passed, {counts['warning']} with a warning, none failed")
        return Outcome(metadata_of(experiment))


def train(
    config: str,
    run: str | Path,
    history: Path,
    best: Path | None = None,
    *,
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
    extend: str = "",
    warm_start: str = "",
    keep: int = runs.KEEP_CHECKPOINTS,
    tensorboard: Path | None = None,
) -> Outcome:
    """Train a run, which is a directory or a place in a store, or go on with it; write the history as CSV.

    `best` is a directory for the best checkpoint alone. A run starts not from scratch, but on from the end of the
    run `extend`, or from the networks of the run `warm_start`, if one is given. `tensorboard` is a directory for
    event files.

    Raises:
        StageFailed: the configuration cannot be trained, training diverged, or the store failed.
    """
    label = _label(name, seed, str(run))
    with watched_stage("train", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor):
        start = _start(extend, warm_start)
        place = Run.at(run, on_request=monitor.requested)
        monitor.planned(experiment)
        say_plan(experiment, torch.get_num_threads(), start, place.store.location)
        final: deque[IterationReport] = deque(maxlen=1)
        file = HistoryFile(history)
        with training_progress(experiment.collection) as progress, _event_files(tensorboard) as (begin, write):
            try:
                trained = training.train(
                    *(experiment, place, file),
                    each(monitor.iterated, progress.show, write, final.append),
                    start,
                    on_begin=each(monitor.began, progress.begin, begin),
                    on_save=monitor.saved,
                    keep=keep,
                )
            except NotSaved as error:
                raise StoreError(f"{error}; kept in {_keep_here(error, history.parent / 'unsaved')}") from error
        chosen = place.choose("best")
        if best:
            place.export(chosen, best)
            shutil.copyfile(history, best / HISTORY)
        say_trained(final[0] if final else None, trained, place.manifest(chosen), place.store.location)
        return Outcome(metadata_of(experiment), finite("train", file.last_row()))


def evaluate(
    config: str,
    run: str | Path,
    report: Path | None = None,
    *,
    checkpoint: str = "best",
    looks: Looks | None = None,
    keep: bool = False,
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> Outcome:
    """Judge a run's checkpoint on held-out seeds, beside the baselines; write the `EvaluationReport` as JSON.

    `checkpoint` is `best`, `last` or the number of an iteration. An empty `config` is that of the checkpoint. With
    `looks`, an HTML page of the run is written.
    With `keep`, the report and episodes to watch are kept with the run, where `report` finds them.

    Raises:
        StageFailed: the checkpoint cannot be read or does not fit the task.
    """
    label = _label(name, seed, str(run))
    loaded = None
    if not config:
        with readable_errors("evaluate"):
            loaded = runs.load(run, checkpoint)
        config = to_json(loaded.config)
    with watched_stage("evaluate", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor):
        trained = loaded or runs.load(run, checkpoint)
        seeds, episodes = experiment.evaluation.seeds, experiment.evaluation.episodes_per_seed
        say("evaluate", f"{len(seeds) * episodes} episodes ({len(seeds)} seeds x {episodes}) for each policy")
        result = evaluation.evaluate(experiment, trained)
        monitor.evaluated(result)
        write_json(report, result)
        if looks or keep:
            seen = rollouts.record(experiment, trained, result)
            if keep:
                _keep_with_run(run, result, seen)
            if looks:
                text = looks.history.read_text()
                shown = records.of_checkpoint(label, trained, text, result, asdict(seen))
                if looks.attempts:
                    shown = replace(shown, facts={"attempts of training": looks.attempts, **shown.facts})
                write_page(looks.page, [shown])
        for policy, returns in result.policies().items():
            say("evaluate", returns_line(policy, returns))
        if result.no_heuristic:
            say("evaluate", f"no heuristic policy: {result.no_heuristic}")
        say("evaluate", f"95 % bootstrap intervals; resampled: {result.resampled}")
        return Outcome(metadata_of(experiment), finite("evaluate", _evaluation_metrics(result)))


def promote(
    config: str,
    run: str | Path,
    champions: str,
    decision: Path | None = None,
    *,
    gate: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> Outcome:
    """Put a run's checkpoint in the champion's place if it is better; write the gate's `Decision` as JSON.

    `champions` is where champions are kept: a directory, or a place in a store. `gate` has fields of `Gate`.

    Raises:
        StageFailed: a checkpoint cannot be read or does not fit the task, or the store failed.
    """
    label = _label(name, seed, str(run))
    with watched_stage("promote", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, _):
        asked = checked(Gate, gate or {})
        place = Champions(champions, task_name(experiment.environment))
        say("promote", f"{place.task}: {asked.num_seeds} fresh seeds x {asked.episodes_per_seed} episodes of each")
        result = promotion.promote(experiment, runs.load(run, checkpoint), place, asked, partial(say, "promote"))
        write_json(decision, result)
        for line in decision_lines(result):
            say("promote", line)
        return Outcome(metadata_of(experiment), _decision_metrics(result))


def compare(reports: Sequence[Path], output: Path | None = None) -> Outcome:
    """Compare the evaluations of several training seeds; write the `ComparisonReport` as JSON.

    Raises:
        StageFailed: a report cannot be read, or reports cannot be compared.
    """
    with readable_errors("compare"):
        result = comparison.compare([read_report(path) for path in reports])
        write_json(output, result)
        for line in comparison_table(result):
            say("compare", line)
        return Outcome(metadata_of(from_dict(result.config)), _comparison_metrics(result))


def report(runs_: Sequence[str], output: Path) -> None:
    """Write one HTML page of one run, or of several side by side.

    Raises:
        StageFailed: a run cannot be read.
    """
    with readable_errors("report"):
        write_page(output, records.of_runs(runs_))
        say("report", f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def write_page(path: Path, shown: Sequence[records.Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pages.build(shown))


def _keep_with_run(run: str | Path, result: EvaluationReport, seen: rollouts.Rollouts) -> None:
    """In its place; that a store cannot be written there is said, and fails nothing."""
    try:
        records.keep(run, result, seen)
    except (StoreError, OSError) as error:
        say("evaluate", f"warning: not kept with the run: {error}")
    else:
        say("evaluate", f"kept with the run; to look at it: mappo report {run}")


@contextmanager
def watched_stage(
    name: str,
    config: str,
    compiled_by: str,
    seed: str = "",
    label: str = "",
    *,
    study: str = "",
    gpu_count: str = "0",
) -> Iterator[tuple[ExperimentConfig, Monitor]]:
    """Read the configuration, set the process up, and watch over the stage."""
    if compiled_by not in ("", mappo.__version__):
        say(
            name,
            f"warning: mappo {compiled_by} compiled this pipeline, its image has mappo {mappo.__version__}: "
            "build the image again or compile with its version, or options may be missing or mean something else",
        )
    with readable_errors(name):
        settings = Settings.from_environment()
    if study:
        settings = replace(settings, study=study)
    with (
        _preemptible(),
        Monitor(name, label, settings, partial(say, name)) as monitor,
        readable_errors(name),
    ):
        experiment = from_json(config)
        if seed:
            experiment = override(experiment, {"seed": parse_json(seed)})
        require_gpu(gpu_count, experiment.device)
        _set_threads(name, experiment.threads)
        try:
            yield experiment, monitor
        except Preempted:
            say(name, f"preempted: this process was asked to end{_GOES_ON.get(name, '')}")
            raise
        except tuple(_NON_FINITE) as error:
            monitor.met_non_finite(_NON_FINITE[type(error)])
            raise


def _label(name: str, seed: str = "", location: str = "") -> str:
    """What metrics call a run: the same in all of its stages."""
    if given := name or os.environ.get("MAPPO_PIPELINE_RUN", ""):
        return f"{given}-{seed}" if seed else given
    return PurePosixPath(location).name or "none"


@contextmanager
def _event_files(
    directory: Path | None,
) -> Iterator[tuple[Callable[[Beginning], None], Callable[[IterationReport], None]]]:
    """What hears of the beginning and of each iteration for TensorBoard; without a directory, it does nothing."""
    if directory is None:
        yield (lambda _: None), (lambda _: None)
        return
    files = EventFiles(directory)
    try:
        yield files.begin, files.write
    finally:
        files.close()


def each(*listeners: Callable[[T], object]) -> Callable[[T], None]:
    """One that passes on what it hears to all."""

    def hear(event: T) -> None:
        for listener in listeners:
            listener(event)

    return hear


def _set_threads(name: str, threads: int) -> None:
    limit = cpu_limit()
    if threads > limit:
        say(name, f"threads = {threads}: the CPU limit of this process allows {limit}, which are used")
    torch.set_num_threads(min(threads or limit, limit))


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn the errors that people can mend into one line each, and show what the package logs.

    Raises:
        StageFailed: there was one.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    logger, handler = logging.getLogger("mappo"), WarningLines(name)
    logger.addHandler(handler)
    try:
        yield
    except StageFailed:  # printed already
        raise
    except _READABLE as error:
        reason = str(error) or "out of memory"
        for line in reason.splitlines():
            say(name, f"failed: {line}")
        may_pass = isinstance(error, _MAY_PASS) or isinstance(error.__cause__, _MAY_PASS)
        raise StageFailed(f"{name}: {reason}", is_final=not may_pass) from error
    except Exception as error:
        say(name, f"failed: {type(error).__name__}: {error}")
        raise
    finally:
        logger.removeHandler(handler)


def metadata_of(config: ExperimentConfig) -> dict[str, str]:
    """Return the labels of a stage's artifacts; few, since each step that reads an artifact repeats them."""
    metadata = {
        "config_hash": config_hash(config),
        "mappo_version": mappo.__version__,
        "seed": str(config.seed),  # Kubeflow would make a number of it a float
    }
    attempts = os.environ.get(COUNT_VARIABLE, "")
    return {**metadata, "attempts": attempts} if attempts else metadata


def finite(stage: str, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that Kubeflow accepts; those it would reject are named, not dropped in silence."""
    kept = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    if left_out := sorted(numbers.keys() - kept.keys()):
        say(stage, f"not finite, left out of the metrics: {', '.join(left_out)}")
    return kept


def _start(extend: str, warm_start: str) -> Start | None:
    if extend and warm_start:
        raise ConfigError("extend and warm start exclude each other: one goes on with a run, the other begins one")
    if extend:
        return Start("extend", runs.load(extend, "last"))
    return Start("warm-start", runs.load(warm_start, "best")) if warm_start else None


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM, which announces that a pod is evicted, ends the block by `Preempted`; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the rest is for saving
        raise Preempted

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_here(error: NotSaved, directory: Path) -> str:
    """Write what the store did not take into a directory, whose content can be copied there."""
    attempt = error.attempt.elsewhere(directory)
    for checkpoint in error.checkpoints:
        attempt.save(checkpoint)
    return f"{directory}: copy what is in it to {error.attempt.run.store.location} to go on from there"


def read_report(path: Path) -> EvaluationReport:
    try:
        return records.parse_evaluation(str(path), path.read_bytes())
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory; give the file that evaluate --output wrote") from None


def write_json(path: Path | None, record: Any) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def _listed(report: ValidationReport) -> str:
    return "\n".join(f"{check.name}: {check.detail}" for check in report.failures)


def _evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    metrics: dict[str, float] = {"training_frames": report.training_frames}
    for policy, returns in report.policies().items():
        for name, value in (("mean", returns.mean), ("interquartile_mean", returns.interquartile_mean)):
            metrics[f"{policy}_return_{name}"] = value.value
            if value.low is not None and value.high is not None:
                metrics[f"{policy}_return_{name}_low"] = value.low
                metrics[f"{policy}_return_{name}_high"] = value.high
    return metrics


def _decision_metrics(decision: Decision) -> dict[str, float]:
    return {
        "is_promoted": float(decision.action == "promoted"),
        "candidate_return_mean": decision.candidate_mean.value,
        "opponent_return_mean": decision.opponent_mean.value,
        "difference": decision.difference,
        "difference_lower_bound": decision.lower_bound,
    }


def _comparison_metrics(report: ComparisonReport) -> dict[str, float]:
    """Of the first configuration, which is the only one in a pipeline of several seeds."""
    mean = report.configurations[0].mean
    metrics = {
        "num_seeds": float(len(report.configurations[0].training_seeds)),
        "random_return_mean": report.random.mean.value,
        "trained_return_mean": mean.value,
    }
    if mean.low is not None and mean.high is not None:
        metrics |= {"trained_return_mean_low": mean.low, "trained_return_mean_high": mean.high}
    return metrics
