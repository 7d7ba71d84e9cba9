"""The stage that fills one cell of a matrix: it trains the cell's run and evaluates its best checkpoint."""

import time
import traceback
from pathlib import Path

import mappo
from mappo.config import config_hash, from_json
from mappo.errors import KeyMissing, MappoError, Preempted, StageFailed, StoreError, Superseded, reason_of
from mappo.matrix.cell_result import EVALUATION, MAX_EVALUATION_BYTES
from mappo.matrix.failure import FAILURE, Failure, failure_json
from mappo.reporting.terminal import say
from mappo.runs.locations import open_store
from mappo.stages.evaluate import evaluate
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult
from mappo.stages.train import train


def run_cell(
    config: str,
    run: str | Path,
    history: Path,
    report: Path | None = None,
    *,
    name: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Train a cell's run, or resume it, evaluate it, and keep the evaluation with the run.

    `config` is the cell's whole configuration, its seed included. `run` is a directory or a location in a store.
    `history` and `report` are files to write: the history as CSV, the evaluation as JSON. A failure is kept as
    failure.json with the run, until the cell is tried again; a run that another process has taken over, or that
    is preempted, has not failed.

    Raises:
        StageFailed: training or evaluation failed, or the evaluation could not be kept.
    """
    location = str(run)
    try:
        with readable_errors("matrix"):
            open_store(location).delete(FAILURE)
        train(config, location, history, name=name, compiled_by=compiled_by, gpu_count=gpu_count, is_shared=True)
        result = evaluate(
            config, location, report, keep_at=location, name=name, compiled_by=compiled_by, gpu_count=gpu_count
        )
        with readable_errors("matrix"):
            _require_kept(location)
        return result
    except StageFailed as error:
        if not isinstance(error.__cause__, Superseded):
            _keep_failure(location, config, str(error), error.is_final)
        raise
    except Preempted:
        raise
    except (Exception, SystemExit) as error:  # a scenario is foreign code, and one cell must not stop the others
        traceback.print_exc()
        reason = f"{type(error).__name__}: {reason_of(error)}"
        _keep_failure(location, config, reason, is_final=True)
        raise StageFailed(f"matrix: {reason}", is_final=True) from error


def _require_kept(location: str) -> None:
    """Check that the evaluation is with the run: `evaluate` only warns if the store refuses it."""
    try:
        open_store(location).read(EVALUATION, MAX_EVALUATION_BYTES)
    except KeyMissing:
        raise StoreError(f"{location}: the evaluation could not be saved with the run") from None


def _keep_failure(location: str, config: str, reason: str, is_final: bool) -> None:
    failure = Failure(
        reason or "no reason given", is_final, config_hash(from_json(config)), time.time(), mappo.__version__
    )
    try:
        open_store(location).write(FAILURE, failure_json(failure))
    except (MappoError, OSError) as error:
        say("matrix", f"warning: the reason of the failure could not be kept with the run: {error}")
