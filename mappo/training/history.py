"""The report of each iteration, and the CSV file that keeps the reports."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

from tensordict import TensorDictBase

from mappo.environment.keys import DONE, EPISODE_RETURN
from mappo.environment.reductions import MAX_MEASUREMENTS, is_measurement_name
from mappo.errors import CheckpointError, one_line
from mappo.learning.learner import Losses
from mappo.runs.owned_file import OwnedFile
from mappo.runs.saver import SaveCounts
from mappo.runs.segments import SEGMENT_ROWS, Segment, SharedFile


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
    measurements: means of what the scenario's `info()` measured in the evaluation after this iteration, by name.
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
    measurements: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Return all numbers by name in a fixed order, with nested records flattened; measurements come last."""
        row: dict[str, float] = {}
        for name, value in asdict(replace(self, measurements={})).items():
            row.update(value if isinstance(value, dict) else {name: value})
        return row | {f"{MEASURED}{name}": mean for name, mean in self.measurements.items()}


def finished_episodes(batch: TensorDictBase) -> Episodes:
    """Return statistics of the episodes that ended in a batch [envs, time]; earlier batches count, too."""
    done = batch["next", DONE].squeeze(-1)
    returns = batch[("next", *EPISODE_RETURN)].squeeze(-1).mean(-1)[done]
    if not len(returns):
        return Episodes(0, *[float("nan")] * 3)
    return Episodes(len(returns), returns.mean().item(), returns.min().item(), returns.max().item())


COLUMNS = tuple(
    name
    for column in fields(IterationReport)
    if column.name != "measurements"  # whose names depend on the scenario
    for name in (
        [inner.name for inner in fields(column.type)]
        if isinstance(column.type, type) and hasattr(column.type, "__dataclass_fields__")
        else [column.name]
    )
)
MEASURED = "measured_"  # the columns of measurements begin with it, and follow all others


class HistoryFile:
    """A CSV file with one row per iteration, written row by row; NaN is an empty cell.

    The columns are `COLUMNS`, and one for each measurement that `measure` names.
    The last rows stay in memory, for the next checkpoint. The rows before them are in segments, which checkpoints
    share; see `mappo.runs.segments`. If the disk is full, training continues, and the rows are written later.
    """

    def __init__(self, path: Path):
        """Set the path; `begin`, or else the first row, replaces a file that already exists there."""
        self._file = OwnedFile(path)
        self._columns = COLUMNS
        self._lines: list[str] = []  # the rows after all segments
        self._segments: tuple[Segment, ...] = ()  # of this process
        self._earlier: SharedFile | None = None  # the rows before the first of these segments
        self._read_earlier: Callable[[], Iterable[str]] = tuple
        self._has_begun = False

    @property
    def text(self) -> str:
        """The header and the last rows, which the next checkpoint holds itself."""
        return _csv_line(self._columns) + "".join(self._lines)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The rows before those in `text`, and after those of `earlier`."""
        return self._segments

    @property
    def earlier(self) -> SharedFile | None:
        """The index of the rows that earlier processes have saved in segments."""
        return self._earlier

    @property
    def elapsed_seconds(self) -> float:
        """The training time of the last row, in seconds; 0 before the first row."""
        return self.last_row().get("elapsed_seconds", 0.0)

    def restore(
        self,
        text: str,
        earlier: SharedFile | None = None,
        read_earlier: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """Continue after the rows that a checkpoint holds, in its `text` and below its index `earlier`.

        read_earlier: returns the rows below the index, as CSV without a header.

        Raises:
            CheckpointError: the rows have other columns than this version writes.
        """
        self._columns = _columns_of(text)
        self._lines = text.splitlines(keepends=True)[1:]
        self._segments, self._earlier, self._read_earlier = (), earlier, read_earlier

    def measure(self, names: Iterable[str]) -> None:
        """Add a column for each of these measurements. Call this before `begin`.

        Cells of rows so far are empty; rows in segments end before them.
        """
        columns = [column for name in names if (column := f"{MEASURED}{name}") not in self._columns]
        columns = columns[: len(COLUMNS) + MAX_MEASUREMENTS - len(self._columns)]
        self._columns = (*self._columns, *columns)
        self._lines = [line.rstrip("\n") + "," * len(columns) + "\n" for line in self._lines]

    def begin(self, owned_since: Callable[[], float] = time.monotonic) -> None:
        """Write a new file with all rows so far. See `OwnedFile.begin`.

        Raises:
            OSError: the file cannot be written, for another reason than a full or read-only disk.
        """
        header, lines = _csv_line(self._columns), tuple(self._lines)
        self._file.begin(lambda: chain([header], self._read_earlier(), lines), owned_since)
        self._has_begun = True
        self._seal()

    def append(self, report: IterationReport) -> None:
        """Add the report's row. A measurement without a column is left out."""
        if not self._has_begun:
            self.begin()
        row = report.row()
        values = (row.get(column, math.nan) for column in self._columns)
        line = _csv_line("" if math.isnan(value) else value for value in values)
        self._lines.append(line)
        self._file.append(line)
        self._seal()

    def settle(self, is_owner: Callable[[], bool]) -> None:
        """Write what is missing after the last row. See `OwnedFile.settle`."""
        self._file.settle(is_owner)

    def close(self) -> None:
        """Close the file, which gets no more rows."""
        self._file.close()

    def last_row(self) -> dict[str, float]:
        """Return the numbers of the last row, with NaN for empty cells; empty before the first row."""
        (row,) = parse_history(_csv_line(self._columns) + self._lines[-1]) if self._lines else [{}]
        return row

    def _seal(self) -> None:
        """Move rows into segments, all but the last ones; at least one row stays."""
        num_full = max(0, len(self._lines) - 1) // SEGMENT_ROWS
        for _ in range(num_full):
            rows, self._lines = self._lines[:SEGMENT_ROWS], self._lines[SEGMENT_ROWS:]
            self._segments = (*self._segments, Segment("".join(rows), len(rows)))


def require_history(text: str, start: Progress, end: Progress) -> None:
    """Check that a text is the history of the iterations after `start` up to `end`, as this version writes it.

    Raises:
        CheckpointError: a column, a row or a number is missing or is another one.
    """
    columns = _columns_of(text)
    rows, iteration, frames = text.splitlines()[1:], start.iteration, start.frames
    for number, row in enumerate(rows, 1):
        try:
            cells = [float(cell) if cell else math.nan for cell in row.split(",")]
        except ValueError:
            cells = []
        iteration += 1
        if len(cells) != len(columns) or cells[0] != iteration or not frames < cells[1] <= end.frames:
            raise CheckpointError(
                f"row {number} of the history is not a row of iteration {iteration}: {one_line(row, 80)}"
            )
        frames = int(cells[1])
    if (iteration, frames) != (end.iteration, end.frames) or not text.endswith("\n"):
        raise CheckpointError(
            f"the history ends after iteration {iteration} and {frames} frames, and the checkpoint is that of "
            f"iteration {end.iteration} and {end.frames} frames"
        )


def _columns_of(text: str) -> tuple[str, ...]:
    """Return the columns of a history.

    Raises:
        CheckpointError: this version does not write such columns.
    """
    header = text.partition("\n")[0]
    try:
        columns = tuple(next(csv.reader([header]), ()))
    except csv.Error:
        columns = ()
    measured = columns[len(COLUMNS) :]
    is_possible = len(set(measured)) == len(measured) <= MAX_MEASUREMENTS and all(map(_is_measured, measured))
    if columns[: len(COLUMNS)] != COLUMNS or not is_possible:
        raise CheckpointError(f"the history has other columns: {one_line(header, 200)}")
    return columns


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


def _is_measured(column: str) -> bool:
    return column.startswith(MEASURED) and is_measurement_name(column.removeprefix(MEASURED))


def _number(value: str | list[str] | None) -> float:
    try:
        return float(value) if isinstance(value, str) and value else math.nan
    except ValueError:
        return math.nan


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
