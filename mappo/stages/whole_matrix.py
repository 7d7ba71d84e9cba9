"""A whole matrix, on one machine or on several: workers take its cells one by one; then its tables are written."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from mappo.config import to_json
from mappo.environment.measured_names import find_measurements
from mappo.errors import ConfigError, StageFailed, Superseded
from mappo.evaluation.measurements import TERMINATED
from mappo.matrix.cell_result import CellResult, State, read_failure, read_results, run_of
from mappo.matrix.failure import FAILURE
from mappo.matrix.matrix import Cell, Matrix, read_matrix
from mappo.matrix.results_file import Foreign, read_foreign, with_foreign
from mappo.reporting.matrix_files import matrix_directory, write_files
from mappo.reporting.terminal import say
from mappo.runs.run import Run
from mappo.stages.readable_errors import readable_errors
from mappo.stages.report import page_address
from mappo.stages.run_cell import run_cell
from mappo.stages.runtime import StageResult, preemptible
from mappo.stages.worker_processes import worker_processes
from mappo.tuning.database import Database, open_database

_OVER = ("done", "failed")  # states of cells that no worker takes
_POLL_SECONDS = 2.0  # between two looks at cells that other workers train


def run_matrix(
    file: Path, store: str, num_workers: int, results: Sequence[Path] = (), *, retry_failed: bool = False
) -> StageResult:
    """Train and evaluate the cells of a matrix with several processes; then write its tables and its page.

    A second call continues where the first stopped. Of two calls at the same time, both work on cells. Failures
    that may pass, such as those of a store, are tried again; with `retry_failed`, all are.

    Raises:
        StageFailed: a cell failed, or the file, the store or the database cannot be used.
    """
    with preemptible():
        with readable_errors("matrix"):
            matrix = read_matrix(file)
            _require_possible(matrix, store, read_foreign(results, matrix))
            _forget_failures(matrix, store, retry_failed)
        directory = matrix_directory(store, matrix.name)
        command = ["matrix", "work", str(file), "--store", store]
        command += [word for path in results for word in ("--results", str(path))]
        others = num_workers - 1
        with worker_processes("matrix", command, others, directory, good=(0, 1), ending="ended early"):
            result = work_on_cells(file, store, results)
        with readable_errors("matrix"):
            rows, notes = with_foreign(
                matrix, read_results(matrix, store, matrix.cells), read_foreign(results, matrix)
            )
            page = write_files(matrix, rows, notes, store, directory)
            say("matrix", f"{directory}/: cells.csv, table.csv, table.md")
            say("matrix", f"page: {page_address(page)}")
            _require_done(matrix, rows)
        return result


def work_on_cells(file: Path, store: str, results: Sequence[Path] = ()) -> StageResult:
    """Work on the cells of a matrix until none is left, beside any number of other workers anywhere.

    A cell that another worker trains is watched: if that worker dies, this one resumes its run. Cells that have
    failed are left alone.

    Raises:
        StageFailed: the file, the store or the database cannot be used.
    """
    with preemptible():
        with readable_errors("matrix"):
            matrix = read_matrix(file)
            worker = _Worker(matrix, store, _require_possible(matrix, store, read_foreign(results, matrix)))
        with ExitStack() as stack:
            with readable_errors("matrix"):
                database = stack.enter_context(open_database(is_new=True))
            worker.work(database)
        return StageResult({}, {f"cells_{state}": float(count) for state, count in worker.counts().items()})


class _Worker:
    """The cells of a matrix as one worker sees them: what each has come to, and those that are left to fill."""

    def __init__(self, matrix: Matrix, store: str, rows: Sequence[CellResult]):
        self._matrix, self._store = matrix, store
        self._results = {cell.name: row for cell, row in zip(matrix.cells, rows, strict=False)}
        self._left = {cell.name: cell for cell in matrix.cells if self._results[cell.name].state not in _OVER}
        self._started, self._frames_at_start = time.monotonic(), self._frames()

    def counts(self) -> Mapping[State, int]:
        """Return the number of cells in each state."""
        return Counter(result.state for result in self._results.values())

    def work(self, database: Database) -> None:
        """Fill cells until none is left that this worker could fill."""
        say("matrix", f"{self._matrix.name}: {_described(self.counts(), len(self._matrix.cells))}")
        is_waiting = False
        while self._left:
            if self._fill_free_cells(database):
                is_waiting = False
            elif self._left:
                if not is_waiting:
                    say("matrix", f"other workers train what is left: {', '.join(self._left)}; waiting for them")
                is_waiting = True
                time.sleep(_POLL_SECONDS)

    def _fill_free_cells(self, database: Database) -> bool:
        """Fill each cell that is left and free; return whether there was one."""
        has_filled = False
        for cell in list(self._left.values()):
            location = run_of(self._store, self._matrix, cell)
            with ExitStack() as stack:
                with readable_errors("matrix"):
                    is_free = stack.enter_context(database.free_lock(_lock_name(location)))
                    if is_free:
                        self._update(cell)
                if not is_free:
                    continue
                if self._results[cell.name].state in _OVER:  # another worker was faster
                    self._end(cell, "by another worker")
                    continue
                has_filled = True
                self._fill(cell, location)
        return has_filled

    def _fill(self, cell: Cell, location: str) -> None:
        frames = self._results[cell.name].frames
        say("matrix", f"{cell.name}: {f'resumed after {frames:,} frames' if frames else 'begins'}")
        directory = matrix_directory(self._store, self._matrix.name) / cell.name
        try:
            run_cell(to_json(cell.config), location, directory / "history.csv", name=cell.name)
        except StageFailed as error:
            if isinstance(error.__cause__, Superseded):
                say("matrix", f"{cell.name}: a process without the lock trains this run; it is left to that one")
        with readable_errors("matrix"):
            self._update(*self._left.values())  # also what other workers have done meanwhile
        self._end(cell, "")

    def _update(self, *cells: Cell) -> None:
        for result, cell in zip(read_results(self._matrix, self._store, cells), cells, strict=True):
            self._results[cell.name] = result

    def _end(self, cell: Cell, by_whom: str) -> None:
        """Print how a cell ended and what is left; this worker looks at the cell no more."""
        del self._left[cell.name]
        result = self._results[cell.name]
        outcome = f"return {result.return_mean:.3g}" if result.return_mean is not None else result.reason
        words = ", ".join([result.state, by_whom or outcome])
        described = _described(self.counts(), len(self._matrix.cells))
        say("matrix", f"{cell.name}: {words}; {described}{self._time_left()}")

    def _frames(self) -> int:
        return sum(result.frames or 0 for result in self._results.values())

    def _time_left(self) -> str:
        """Return the time until the rest is done, at the rate of all workers since this one began."""
        waiting = [self._results[name] for name in self._left]
        left = sum((result.final_frames or 0) - (result.frames or 0) for result in waiting)
        gained, seconds = self._frames() - self._frames_at_start, time.monotonic() - self._started
        return f"; about {_duration(left / gained * seconds)} left at this rate" if left and gained > 0 else ""


def _require_possible(matrix: Matrix, store: str, foreign: Foreign) -> list[CellResult]:
    """Check what can be known before anything is trained; return what the cells have come to, and further rows.

    Raises:
        ConfigError: a run has another configuration, or a task names a measurement that there is not.
    """
    rows, notes = with_foreign(matrix, read_results(matrix, store, matrix.cells), foreign)
    for note in notes:
        say("matrix", f"warning: {note}")
    pairs = list(zip(matrix.cells, rows, strict=False))
    if conflicts := [f"{row.source}: {row.reason}" for _, row in pairs if row.state == "conflict"]:
        advice = "delete these runs, take the change back, or give the matrix another name"
        raise ConfigError("\n".join([*conflicts, advice]))
    for task in matrix.tasks:
        names = {key: name for key in ("success", "collisions") if (name := getattr(task, key))}
        cell = next((cell for cell, row in pairs if cell.task == task.name and row.state not in _OVER), None)
        if names and cell:
            _require_measured(cell, names)
    return rows


def _forget_failures(matrix: Matrix, store: str, retry_failed: bool) -> None:
    """Delete the records of failures that may pass, or all: their cells are then tried again, by one worker."""
    for cell in matrix.cells:
        run = Run.at(run_of(store, matrix, cell))
        failure = read_failure(run, cell)
        if failure and (retry_failed or not failure.is_final):
            run.store.delete(FAILURE)


def _described(counts: Mapping[State, int], total: int) -> str:
    others = [f"{count} {state}" for state, count in counts.items() if state != "done"]
    return ", ".join([f"{counts.get('done', 0)} of {total} cells done", *others])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _require_measured(cell: Cell, names: Mapping[str, str]) -> None:
    """Check that a task measures what its columns name; a task that cannot be made fails as cells do."""
    try:
        measured = {TERMINATED: "last", **find_measurements(cell.config.environment)}
    except ConfigError:
        return
    for key, name in names.items():
        if name not in measured:
            listed = ", ".join(f"{known} ({reduction})" for known, reduction in sorted(measured.items()))
            raise ConfigError(
                f"task {cell.task}: {key}: {name!r} is not measured; it measures {listed or 'nothing'}"
            )


def _require_done(matrix: Matrix, rows: Sequence[CellResult]) -> None:
    """Check that every cell of the matrix is done.

    Raises:
        StageFailed: one failed or is not done; a line for each has been printed.
    """
    missing = [row for row in rows[: len(matrix.cells)] if row.state != "done"]
    for row in missing:
        say("matrix", f"{row.task}-{row.algorithm}-{row.seed}: {row.state}: {row.reason or 'not done'}")
    if missing:
        message = f"{len(missing)} of {len(matrix.cells)} cells are not done"
        say("matrix", f"failed: {message}")
        raise StageFailed(f"matrix: {message}")


def _lock_name(location: str) -> str:
    """Return the name of the lock of a run, which is the same wherever the same location is trained."""
    place = location if "://" in location else str(Path(location).resolve())
    return f"cell-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
