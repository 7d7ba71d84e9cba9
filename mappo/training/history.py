"""What each iteration reports, and the tidy file that keeps it."""

import csv
import errno
import io
import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tensordict import TensorDictBase

from mappo.environment.keys import DONE, EPISODE_RETURN
from mappo.errors import CheckpointError
from mappo.learning.learner import Losses
from mappo.runs.saver import SaveCounts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episodes:
    """Undiscounted returns of the episodes that ended in a batch, mean over agents; NaN when none ended."""

    num_episodes: int
    episode_return_mean: float
    episode_return_min: float
    episode_return_max: float


@dataclass(frozen=True)
class Progress:
    """How far training is: iterations and frames done since the start."""

    iteration: int = 0
    frames: int = 0

    def after(self, batch: TensorDictBase) -> "Progress":
        """The progress once a batch [envs, time] is learned from."""
        return Progress(self.iteration + 1, self.frames + batch.numel())


@dataclass(frozen=True)
class TrainingStarted:
    """How a process begins to train a run: how far it had come, and how many processes have begun so far."""

    progress: Progress
    attempt: int
    is_resumed: bool


@dataclass(frozen=True)
class IterationReport:
    """One iteration of training: one row of the history.

    collect_seconds, learn_seconds and evaluate_seconds are the iteration's wall-clock by phase;
    frames_per_second counts the first two. elapsed_seconds is the time spent training so far, in all attempts.
    save_seconds is what saving the checkpoint before this one took of the training's time; num_saves,
    num_failed_saves and num_skipped_saves count what became of checkpoints in this attempt.
    evaluation_return_mean is that of the evaluation after this iteration; NaN when there was none.
    peak_memory_bytes is the most that the process held at once so far; peak_gpu_memory_bytes the same of torch's
    tensors on the GPU, 0 without one.
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
        """All numbers by name, nested records flattened, in a fixed order."""
        row: dict[str, float] = {}
        for name, value in asdict(self).items():
            row.update(value if isinstance(value, dict) else {name: value})
        return row


def finished_episodes(batch: TensorDictBase) -> Episodes:
    """The episodes that ended in a batch [envs, time], however long ago they began."""
    ended = batch["next", DONE].squeeze(-1)
    returns = batch[("next", *EPISODE_RETURN)].squeeze(-1).mean(-1)[ended]
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
    """A CSV file with one row an iteration, written as it grows; NaN is an empty cell.

    A full disk is said and does not end training: the history is in the checkpoints, too, and the file is written
    as a whole when there is room.
    """

    def __init__(self, path: Path):
        """The file is written with the first row, in the place of one that may be there."""
        self._path = path
        self._text = _csv_line(COLUMNS)
        self._is_complete = False  # as far as the text goes

    @property
    def text(self) -> str:
        """The whole content."""
        return self._text

    @property
    def elapsed_seconds(self) -> float:
        """That of the last row; 0 before the first."""
        return self.last_row().get("elapsed_seconds", 0.0)

    def restore(self, text: str) -> None:
        """Go on after the rows that a checkpoint holds; rows of this version's columns.

        Raises:
            CheckpointError: other columns.
        """
        if not text.startswith(self._text):
            raise CheckpointError(f"the history has other columns: {text.partition(chr(10))[0].strip()[:200]}")
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
        """The last iteration's numbers, NaN for empty cells; empty before the first."""
        rows = deque(csv.DictReader(io.StringIO(self._text)), maxlen=1)
        return {name: float(value) if value else math.nan for row in rows for name, value in row.items()}

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
            _log.warning("%s: %s; training goes on, free some", self._path, error.strerror)


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
