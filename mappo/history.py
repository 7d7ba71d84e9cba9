"""What each iteration reports, and the tidy file that keeps it."""

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tensordict import TensorDictBase

from mappo.environment import DONE, EPISODE_RETURN
from mappo.learner import Losses


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
class IterationReport:
    """One iteration of training: one row of the history.

    collect_seconds, learn_seconds and evaluate_seconds are the iteration's wall-clock by phase;
    frames_per_second counts the first two. elapsed_seconds runs since training began, in this process.
    evaluation_return_mean is that of the evaluation after this iteration; NaN when there was none.
    peak_memory_bytes is the most that the process held at once so far; peak_gpu_memory_bytes the same of torch's
    tensors on the GPU, 0 without one.
    """

    progress: Progress
    elapsed_seconds: float
    collect_seconds: float
    learn_seconds: float
    evaluate_seconds: float
    frames_per_second: float
    evaluation_return_mean: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
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
    """A CSV file with one row an iteration, flushed as it grows; NaN is an empty cell."""

    def __init__(self, path: Path):
        self._path, self._rows = path, 0
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

    def append(self, report: IterationReport) -> None:
        row = report.row()
        self._writer.writerow({name: "" if math.isnan(value) else value for name, value in row.items()})
        self._file.flush()
        self._rows += 1

    def close(self) -> None:
        """Close the file, and leave none behind where training did not get as far as one row."""
        self._file.close()
        if not self._rows:
            self._path.unlink()
