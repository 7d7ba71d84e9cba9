"""The report of each iteration, and the CSV file that keeps the reports."""

import csv
import errno
import io
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tensordict import TensorDictBase

from mappo.environment.keys import DONE, EPISODE_RETURN
from mappo.errors import CheckpointError, one_line
from mappo.learning.learner import Losses
from mappo.runs.saver import SaveCounts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episodes:
    """The undiscounted returns of the episodes that ended in a batch, averaged over agents; NaN if none ended."""

    num_episodes: int
    episode_return_mean: float
    episode_return_min: float
    episode_return_max: float


@dataclass(frozen=True)
class Progress:
    """The progress of training: iterations and frames since the start of the run."""

    iteration: int = 0
    frames: int = 0

    def after(self, batch: TensorDictBase) -> "Progress":
        """Return the progress after an update on a batch [envs, time]."""
        return Progress(self.iteration + 1, self.frames + batch.numel())


@dataclass(frozen=True)
class TrainingStarted:
    """The state of a run when a process starts to train it.

    attempt: the number of this process among the processes that have trained the run, from 1.
    """

    progress: Progress
    attempt: int
    is_resumed: bool


@dataclass(frozen=True)
class IterationReport:
    """The report of one iteration of training: one row of the history.

    collect_seconds, learn_seconds, evaluate_seconds: wall-clock time of the iteration's phases.
    save_seconds: training time that saving the previous checkpoint took.
    frames_per_second: frames of the batch divided by the sum of the seconds above.
    elapsed_seconds: training time of all attempts so far.
    saves: counts of the checkpoints that this attempt saved, failed to save and skipped.
    evaluation_return_mean: mean return of the evaluation after this iteration; NaN if there was none.
    peak_memory_bytes: largest memory of the process so far.
    peak_gpu_memory_bytes: largest memory of torch's tensors on the GPU so far; 0 without a GPU.
    """

    progress: Progress
    elapsed_seconds: float
    collect_seconds: float
    learn_seconds: float
    evaluate_seconds: float
    save_seconds: float
    frames_per_second: float
    evaluation_return_mean: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    saves: SaveCounts
    episodes: Episodes
    losses: Losses

    def row(self) -> dict[str, float]:
        """Return all numbers by name in a fixed order, with nested records flattened."""
        row: dict[str, float] = {}
        for name, value in asdict(self).items():
            row.update(value if isinstance(value, dict) else {name: value})
        return row


def finished_episodes(batch: TensorDictBase) -> Episodes:
    """Return statistics of the episodes that ended in a batch [envs, time]; earlier batches count, too."""
    done = batch["next", DONE].squeeze(-1)
    returns = batch[("next", *EPISODE_RETURN)].squeeze(-1).mean(-1)[done]
    if not len(returns):
        return Episodes(0, *[float("nan")] * 3)
    return Episodes(len(returns), returns.mean().item(), returns.min().item(), returns.max().item())


COLUMNS = tuple(
    name
    for field in fields(IterationReport)
    for name in (
        [inner.name for inner in fields(field.type)]
        if isinstance(field.type, type) and hasattr(field.type, "__dataclass_fields__")
        else [field.name]
    )
)


class HistoryFile:
    """A CSV file with one row per iteration, written row by row; NaN is an empty cell.

    If the disk is full, the file logs a warning and training continues, because checkpoints also hold the
    history. The whole file is written again once the disk has space.
    """

    def __init__(self, path: Path):
        """Set the path; the first row replaces a file that already exists there."""
        self._path = path
        self._text = _csv_line(COLUMNS)
        self._is_complete = False  # whether the file on disk holds all rows so far

    @property
    def text(self) -> str:
        """The whole content of the file."""
        return self._text

    @property
    def elapsed_seconds(self) -> float:
        """The training time of the last row, in seconds; 0 before the first row."""
        return self.last_row().get("elapsed_seconds", 0.0)

    def restore(self, text: str) -> None:
        """Continue after the rows that a checkpoint holds.

        Raises:
            CheckpointError: the rows have other columns than this version writes.
        """
        _require_columns(text)
        self._text = text
        self._is_complete = False
        self._write("")

    def append(self, report: IterationReport) -> None:
        """Add the report's row."""
        row = report.row()
        line = _csv_line("" if math.isnan(value) else value for value in row.values())
        self._text += line
        self._write(line)

    def last_row(self) -> dict[str, float]:
        """Return the numbers of the last row, with NaN for empty cells; empty before the first row."""
        header, *lines = self._text.splitlines(keepends=True)
        (row,) = parse_history(header + lines[-1]) if lines else [{}]
        return row

    def _write(self, line: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a" if self._is_complete else "w", newline="") as file:
                file.write(line if self._is_complete else self._text)
            self._is_complete = True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._is_complete = False
            _log.warning("%s: %s; training continues, but free disk space", self._path, error.strerror)


def require_history(text: str, start: Progress, end: Progress) -> None:
    """Check that a text is the history of the iterations after `start` up to `end`, as this version writes it.

    Raises:
        CheckpointError: a column, a row or a number is missing or is another one.
    """
    _require_columns(text)
    rows, iteration, frames = text.splitlines()[1:], start.iteration, start.frames
    for number, row in enumerate(rows, 1):
        try:
            cells = [float(cell) if cell else math.nan for cell in row.split(",")]
        except ValueError:
            cells = []
        iteration += 1
        if len(cells) != len(COLUMNS) or cells[0] != iteration or not frames < cells[1] <= end.frames:
            raise CheckpointError(
                f"row {number} of the history is not a row of iteration {iteration}: {one_line(row, 80)}"
            )
        frames = int(cells[1])
    if (iteration, frames) != (end.iteration, end.frames) or not text.endswith("\n"):
        raise CheckpointError(
            f"the history ends after iteration {iteration} and {frames} frames, and the checkpoint is that of "
            f"iteration {end.iteration} and {end.frames} frames"
        )


def _require_columns(text: str) -> None:
    if not text.startswith(_csv_line(COLUMNS)):
        columns = one_line(text.partition(chr(10))[0], 200)
        raise CheckpointError(f"the history has other columns: {columns}")


def parse_history(text: str) -> list[dict[str, float]]:
    """Return the rows of a history in CSV. NaN stands for a missing cell and for a text that is not a number.

    Raises:
        CheckpointError: the text is not CSV.
    """
    try:
        return [
            dict.fromkeys(COLUMNS, math.nan) | {name: _number(value) for name, value in row.items() if name}
            for row in csv.DictReader(io.StringIO(text))
        ]
    except csv.Error as error:
        raise CheckpointError(f"the history is not CSV: {error}") from error


def _number(value: str | list[str] | None) -> float:
    try:
        return float(value) if isinstance(value, str) and value else math.nan
    except ValueError:
        return math.nan


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
