"""The stage that trains a run."""

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mappo.errors import ConfigError, NotSaved, StoreError
from mappo.monitoring.tensorboard import EventFiles
from mappo.reporting.progress import training_progress
from mappo.reporting.tables import say_plan, say_trained
from mappo.runs.run import KEEP_CHECKPOINTS, Run, load_checkpoint
from mappo.stages.runtime import StageResult, fan_out, finite, metadata_of, run_label, watched_stage
from mappo.training import training
from mappo.training.history import HistoryFile, IterationReport, TrainingStarted
from mappo.training.training_state import StartingPoint

HISTORY = "history.csv"  # of the whole training, beside the best checkpoint


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
) -> StageResult:
    """Train a run, which is a directory or a place in a store, or go on with it; write the history as CSV.

    `best` is a directory for the best checkpoint alone. A run starts not from scratch, but on from the end of the
    run `extend`, or from the networks of the run `warm_start`, if one is given. `tensorboard` is a directory for
    event files.

    Raises:
        StageFailed: the configuration cannot be trained, training diverged, or the store failed.
    """
    label = run_label(name, seed, str(run))
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
                    fan_out(monitor.iterated, progress.show, write, final.append),
                    start,
                    on_begin=fan_out(monitor.began, progress.begin, begin),
                    on_save=monitor.saved,
                    keep=keep,
                )
            except NotSaved as error:
                directory = history.parent / "unsaved"
                error.rescue(directory)
                raise StoreError(
                    f"{error}; kept in {directory}: copy its content to {place.store.location} to resume there"
                ) from error
        chosen = place.choose("best")
        if best:
            place.export(chosen, best)
            shutil.copyfile(history, best / HISTORY)
        say_trained(final[0] if final else None, trained, place.manifest(chosen), place.store.location)
        return StageResult(metadata_of(experiment), finite("train", file.last_row()))


@contextmanager
def _event_files(
    directory: Path | None,
) -> Iterator[tuple[Callable[[TrainingStarted], None], Callable[[IterationReport], None]]]:
    """What hears of the beginning and of each iteration for TensorBoard; without a directory, it does nothing."""
    if directory is None:
        yield (lambda _: None), (lambda _: None)
        return
    files = EventFiles(directory)
    try:
        yield files.begin, files.write
    finally:
        files.close()


def _start(extend: str, warm_start: str) -> StartingPoint | None:
    if extend and warm_start:
        raise ConfigError("extend and warm start exclude each other: one goes on with a run, the other begins one")
    if extend:
        return StartingPoint("extend", load_checkpoint(extend, "last"))
    return StartingPoint("warm-start", load_checkpoint(warm_start, "best")) if warm_start else None
