"""The stage that fills one cell of a matrix in a pod of its own. A cell that is done is left as it is."""

from pathlib import Path

from mappo.config import to_json
from mappo.errors import ConfigError, StageFailed, StoreError
from mappo.matrix.cell_result import EVALUATION, MAX_EVALUATION_BYTES, CellResult, read_result, run_of
from mappo.matrix.matrix import matrix_from_json
from mappo.reporting.terminal import say
from mappo.runs.locations import open_store
from mappo.runs.owned_file import write_whole
from mappo.stages.readable_errors import readable_errors
from mappo.stages.run_cell import run_cell
from mappo.stages.runtime import StageResult, finite, metadata_of

_NUMBERS = (
    *("return_mean", "random", "heuristic", "success", "collisions"),
    *("frames", "judged_frames", "seconds"),
)


def fill_cell(
    matrix: str, name: str, store: str, report: Path, *, compiled_by: str = "", gpu_count: str = "0"
) -> StageResult:
    """Train and evaluate the cell called `name`, unless its run in the store is done; write its evaluation.

    `matrix` is the JSON of a matrix. A run that has begun is resumed. If the cell fails, the reason is kept with
    its run.

    Raises:
        StageFailed: the matrix has no such cell, its run has another configuration, or training or evaluation
            failed.
    """
    with readable_errors("cell"):
        whole = matrix_from_json(matrix)
        cell = whole.cell(name)
        location = run_of(store, whole, cell)
        result = read_result(whole, store, cell)
        if result.state == "conflict":
            advice = "delete the run, take the change back, or give the matrix another name"
            raise ConfigError(f"{location}: {result.reason}; {advice}")
    if result.state == "done":
        say("cell", f"{name}: done before, with return {result.return_mean:.3g}; its run is left as it is")
    else:
        config, history = to_json(cell.config), report.with_name("history.csv")
        try:
            run_cell(config, location, history, name=name, compiled_by=compiled_by, gpu_count=gpu_count)
        except StageFailed as error:
            for line in str(error).splitlines():  # the lines so far name the stages train and evaluate
                say("cell", f"failed: {name}: {line}")
            raise
    with readable_errors("cell"):
        result = read_result(whole, store, cell)
        if result.state != "done":
            raise StoreError(f"{location}: {result.state} after its evaluation: {result.reason}")
        write_whole(report, open_store(location).read(EVALUATION, MAX_EVALUATION_BYTES).decode())
    labels = {"cell": name, "location": location}
    return StageResult(metadata_of(cell.config) | labels, finite("cell", _numbers(result)))


def _numbers(result: CellResult) -> dict[str, float]:
    return {name: value for name in _NUMBERS if (value := getattr(result, name)) is not None}
