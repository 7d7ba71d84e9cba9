"""The result of one cell: read from its run in a store, without torch. A row of cells.csv holds one."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as strict_dataclass

from mappo.config import ExperimentConfig, differences, from_dict
from mappo.environment.reductions import MeasurementName
from mappo.errors import ConfigError, KeyMissing, MappoError, StoreUnavailable, one_line
from mappo.matrix.failure import FAILURE, Failure, parse_failure
from mappo.matrix.matrix import Cell, Matrix, Task, episodes_hash
from mappo.runs.checkpoint import Manifest
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first
from mappo.runs.locations import joined, open_store
from mappo.runs.run import Run
from mappo.strict_json import parse_report

State = Literal["done", "failed", "begun", "waiting", "conflict"]
EVALUATION = "evaluation.json"  # the key of a run's own evaluation
MAX_EVALUATION_BYTES = 100_000_000
_ATTEMPT = re.compile(r"attempts/([0-9]{4,9})\.json")
_THREADS = 10  # that read runs of a bucket
_PARTIAL = ConfigDict(strict=True, extra="ignore")
_Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class CellResult:
    """The state of one cell and, if it is done, its results.

    state: done; failed, with the reason; begun, with the frames so far; waiting; or conflict: its run has another
    configuration. return_mean, random, heuristic: mean returns over the evaluation's episodes, of the trained and
    the untrained policies. success, collisions: the measurements that the task names for these columns.
    measurements: means of all measurements by name. frames: of training; judged_frames: those of the judged
    checkpoint. seconds: of training, all attempts together. evaluation_hash: equal for results on the same
    episodes. source: where it comes from: the location of the run, or a file of results.
    """

    task: str
    algorithm: str
    seed: int
    state: State
    reason: str = ""
    return_mean: float | None = None
    random: float | None = None
    heuristic: float | None = None
    success: float | None = None
    collisions: float | None = None
    frames: int | None = None
    final_frames: int | None = None
    judged_frames: int | None = None
    seconds: float | None = None
    hardware: str = ""
    threads: int | None = None
    versions: str = ""
    config_hash: str = ""
    evaluation_hash: str = ""
    source: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """The cell: task, algorithm and seed."""
        return self.task, self.algorithm, self.seed


@strict_dataclass(frozen=True, config=_PARTIAL)
class _Mean:
    value: _Number


@strict_dataclass(frozen=True, config=_PARTIAL)
class _Measured:
    mean: _Mean | None


@strict_dataclass(frozen=True, config=_PARTIAL)
class _Policy:
    mean: _Mean
    measurements: dict[MeasurementName, _Measured] = Field(default_factory=dict)


@strict_dataclass(frozen=True, config=_PARTIAL)
class _Evaluation:
    """The part of an `EvaluationReport` that a result needs; to read the whole report takes torch."""

    config: dict[str, Any]
    training_config: dict[str, Any]
    training_frames: int
    trained: _Policy
    random: _Policy
    heuristic: _Policy | None
    run_frames: int | None = None


_EVALUATION = TypeAdapter(_Evaluation)


def run_of(store: str, matrix: Matrix, cell: Cell) -> str:
    """Return the location of a cell's run."""
    return joined(joined(store, matrix.name), cell.name)


def read_results(matrix: Matrix, store: str, cells: Sequence[Cell]) -> list[CellResult]:
    """Return what the store holds of these cells, in their order.

    Raises:
        StoreError: the store does not answer, or the text is not a location.
    """
    open_store(store)
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda cell: read_result(matrix, store, cell), cells))


def read_result(matrix: Matrix, store: str, cell: Cell) -> CellResult:
    """Return what the store holds of one cell. What cannot be read counts as not there, with the reason.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    run = Run.at(run_of(store, matrix, cell))
    result = CellResult(
        *(cell.task, cell.algorithm, cell.seed, "waiting"),
        final_frames=cell.config.collection.final_frames,
        config_hash=cell.config_hash,
        evaluation_hash=episodes_hash(cell.config),
        source=run.store.location,
    )
    try:
        return _read(run, cell, result, matrix.task(cell.task))
    except StoreUnavailable:
        raise
    except MappoError as error:
        return replace(result, reason=one_line(error))


def _read(run: Run, cell: Cell, result: CellResult, task: Task) -> CellResult:
    keys = {entry.key for entry in run.store.entries_outside("blobs")}
    refs = newest_first(CheckpointRef.from_key(key) for key in keys)
    result = replace(result, reason=_fruitless(keys, refs[0].attempt if refs else 0))
    if refs:
        manifest = run.manifest(refs[0])
        if conflict := _conflict(manifest.config, cell.config):
            return replace(result, state="conflict", reason=conflict)
        result = _begun(run, refs[0], manifest, result)
        if EVALUATION in keys:
            result = _evaluated(run, cell, result, task)
    if result.state != "done" and FAILURE in keys and (failure := read_failure(run, cell)):
        return replace(result, state="failed", reason=failure.reason)
    return result


def read_failure(run: Run, cell: Cell) -> Failure | None:
    """Return why the last try of a cell failed; None if it did not, or had another configuration."""
    try:
        failure = parse_failure(run.store.location, run.store.read(FAILURE, 1 << 20))
    except (KeyMissing, ConfigError):  # a damaged one says nothing
        return None
    return failure if failure.config_hash == cell.config_hash else None


def _begun(run: Run, ref: CheckpointRef, manifest: Manifest, result: CellResult) -> CellResult:
    platform = manifest.platform
    is_trained = manifest.frames >= (result.final_frames or 0)
    rows = list(csv.DictReader(io.StringIO(run.history_text(ref, manifest))))
    return replace(
        result,
        state="begun",
        reason="trained, not evaluated yet" if is_trained else result.reason,
        frames=manifest.frames,
        seconds=_seconds(rows),
        hardware=f"{platform.device} ({platform.cpu})" if platform.device == "cpu" else platform.device,
        threads=platform.threads,
        versions=" ".join(f"{package}={version}" for package, version in sorted(platform.versions.items())),
    )


def _fruitless(keys: Iterable[str], last_attempt: int) -> str:
    """Return how many attempts have saved nothing since the last checkpoint; empty for one, which may be at work.

    A cell that needs too much memory kills each of its workers, which leave no other trace.
    """
    attempts = [int(match[1]) for key in keys if (match := _ATTEMPT.fullmatch(key))]
    num_fruitless = sum(attempt > last_attempt for attempt in attempts)
    return f"{num_fruitless} attempts have saved no checkpoint; were they killed?" if num_fruitless > 1 else ""


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    try:
        seconds = float(rows[-1]["elapsed_seconds"]) if rows else math.nan
    except (KeyError, TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


def _evaluated(run: Run, cell: Cell, result: CellResult, task: Task) -> CellResult:
    """Return the result with the run's own evaluation, if it judges this whole training under its own settings."""
    location = f"{run.store.location}/{EVALUATION}"
    try:
        content = run.store.read(EVALUATION, MAX_EVALUATION_BYTES)
        evaluation: _Evaluation = parse_report(_EVALUATION, location, content, "an evaluation report")
        judged, trained = from_dict(evaluation.config), from_dict(evaluation.training_config)
    except ConfigError as error:  # evaluating again mends it
        return replace(result, reason=one_line(error))
    settings = (judged.environment, judged.evaluation)
    if trained != cell.config or settings != (cell.config.environment, cell.config.evaluation):
        return replace(result, reason="the evaluation is that of another configuration")
    if evaluation.run_frames is None or evaluation.run_frames < cell.config.collection.final_frames:
        return replace(result, reason="evaluated before the end of training")
    measured = {name: each.mean.value for name, each in evaluation.trained.measurements.items() if each.mean}
    lacking = [name for name in (task.success, task.collisions) if name and name not in measured]
    return replace(
        result,
        state="done",
        reason=f"the evaluation measured no {', '.join(lacking)}" if lacking else "",
        return_mean=evaluation.trained.mean.value,
        random=evaluation.random.mean.value,
        heuristic=evaluation.heuristic.mean.value if evaluation.heuristic else None,
        success=measured.get(task.success),
        collisions=measured.get(task.collisions),
        judged_frames=evaluation.training_frames,
        measurements=measured,
    )


def _conflict(stored: Mapping[str, Any], config: ExperimentConfig) -> str:
    """Return how the configuration of a run differs from its cell's; empty if it is the same."""
    try:
        changes = differences(from_dict(stored), config)
    except ConfigError:
        return "its run has a configuration that this version cannot read"
    listed = ", ".join(f"{field} = {change}" for field, change in changes.items())
    return f"its run was trained with another configuration: {one_line(listed)}" if changes else ""


def learning_curve(matrix: Matrix, store: str, cell: Cell) -> list[tuple[int, float]]:
    """Return the frames and the returns of the evaluations during training; empty if they cannot be read."""
    run = Run.at(run_of(store, matrix, cell))
    try:
        ref = run.choose("last")
        manifest = run.manifest(ref)
        header, _, last_rows = run.history_text(ref, manifest).partition("\n")
        lines = [header, *run.earlier_rows(manifest.earlier_rows), last_rows]
        rows: Iterable[Mapping[str, Any]] = csv.DictReader(io.StringIO("\n".join(lines)))
        return [
            (int(float(row["frames"])), float(row["evaluation_return_mean"]))
            for row in rows
            if row.get("evaluation_return_mean")
        ]
    except StoreUnavailable:
        raise
    except (MappoError, ValueError, KeyError, TypeError, csv.Error):
        return []


def learning_curves(matrix: Matrix, store: str, cells: Sequence[Cell]) -> list[list[tuple[int, float]]]:
    """Return `learning_curve` of each cell, in their order."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda cell: learning_curve(matrix, store, cell), cells))
