"""The stage that trains a run."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mappo.config import ExperimentConfig
from mappo.errors import ConfigError, NotSaved, StoreError
from mappo.monitoring.tensorboard import EventFiles
from mappo.monitoring.tracking import tracked_run
from mappo.reporting.progress import training_progress
from mappo.reporting.tables import say_plan, say_trained
from mappo.runs.owned_file import write_whole
from mappo.runs.run import KEEP_CHECKPOINTS, POLICY_PARTS, Run, load_checkpoint
from mappo.stages.runtime import StageResult, fan_out, finite, metadata_of, run_label, watched_stage
from mappo.training import training
from mappo.training.history import MEASURED, HistoryFile, IterationReport, TrainingStarted
from mappo.training.training_state import StartingPoint

MLFLOW_LABEL = "mlflow_run"  # label of the best checkpoint: the MLflow run of its training
HISTORY = "history.csv"  # file of the whole training's history, beside the best checkpoint


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
    keep: int = KEEP_CHECKPOINTS,
    tensorboard: Path | None = None,
    is_shared: bool = False,
) -> StageResult:
    """Train a run, or resume it if it exists; write the history as CSV.

    `run` is a directory or a location in a store. `best` is a directory for the best checkpoint alone.
    `tensorboard` is a directory for event files. Training starts from the end of the run `extend`, or from the
    best networks of the run `warm_start`; if both are empty, training starts from scratch. `is_shared` tells
    whether other runs use what this run compiles, as in a study or a matrix.

    Raises:
        StageFailed: the configuration cannot be trained, training diverged, or the store failed.
    """
    label = run_label(name, seed, str(run))
    with watched_stage("train", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor):
        start = _starting_point(extend, warm_start)
        target = Run.at(run, on_request=monitor.requested)
        monitor.planned(experiment)
        say_plan(experiment, torch.get_num_threads(), start, target.store.location)
        final_report: deque[IterationReport] = deque(maxlen=1)
        history_file = HistoryFile(history)
        with (
            training_progress(experiment.collection) as progress,
            _event_files(tensorboard, experiment) as (begin_events, write_events),
            tracked_run(experiment, label, target.store.location) as tracked,
        ):
            try:
                final_checkpoint = training.train(
                    *(experiment, target, history_file),
                    fan_out(monitor.iterated, progress.show, write_events, tracked.iterated, final_report.append),
                    start,
                    on_begin=fan_out(monitor.began, progress.begin, begin_events, tracked.began),
                    on_save=monitor.saved,
                    keep=keep,
                    is_shared=is_shared,
                )
            except NotSaved as error:
                directory = history.parent / "unsaved"
                error.rescue(directory)
                raise StoreError(
                    f"{error}; kept in {directory}: copy its content to {target.store.location} to resume there"
                ) from error
        best_ref = target.choose("best")
        if best:
            target.export(best_ref, best)
            last = target.load(target.choose("last"), ["history"])
            write_whole(best / HISTORY, target.whole_history(last))
        report = final_report[0] if final_report else None  # None: the run had finished before
        say_trained(report, final_checkpoint, target.manifest(best_ref), target.store.location)
        row = history_file.last_row().items()
        # A measurement that the last evaluation does not have is no news.
        numbers = {name: value for name, value in row if not (name.startswith(MEASURED) and math.isnan(value))}
        labels = {MLFLOW_LABEL: tracked.run_id} if tracked.run_id else {}
        return StageResult(metadata_of(experiment) | labels, finite("train", numbers))


@contextmanager
def _event_files(
    directory: Path | None, config: ExperimentConfig
) -> Iterator[tuple[Callable[[TrainingStarted], None], Callable[[IterationReport], None]]]:
    """Open event files for TensorBoard; the context is their callbacks for the start and for every iteration.

    Without a directory, the callbacks do nothing.
    """
    if directory is None:
        yield (lambda _: None), (lambda _: None)
        return
    files = EventFiles(directory, config)
    yield files.begin, files.write


def _starting_point(extend: str, warm_start: str) -> StartingPoint | None:
    if extend and warm_start:
        raise ConfigError(
            "extend and warm start exclude each other: extend continues a run, warm start begins one"
        )
    if extend:
        return StartingPoint("extend", load_checkpoint(extend, "last", (*POLICY_PARTS, "optimiser")))
    return StartingPoint("warm-start", load_checkpoint(warm_start, "best", POLICY_PARTS)) if warm_start else None
