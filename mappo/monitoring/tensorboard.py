"""The event files for TensorBoard. They have the same numbers as the history."""

import math
from pathlib import Path

from mappo.errors import ConfigError
from mappo.training.history import IterationReport, TrainingStarted

_GROUPS = {  # group of plots: prefixes of the names of its columns
    "return": ("episode_return_", "evaluation_return_"),
    "loss": ("loss_",),
    "learning": (
        "kl",
        "clip_fraction",
        "entropy",
        "explained_variance",
        "gradient_norm_",
        "learning_rate",
        "epochs",
    ),
}
_SKIPPED = ("iteration", "frames")  # the columns of the horizontal axis


class EventFiles:
    """A directory of event files. Every column of the history becomes a scalar over frames; NaN is left out.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--tensorboard: the package tensorboard is missing: pip install 'mappo[tensorboard]'"
            ) from None
        self._writer_class, self._directory = SummaryWriter, directory
        self._writer: SummaryWriter | None = None

    def begin(self, start: TrainingStarted) -> None:
        """Open the files at the frame where training starts, and discard later frames of an earlier process."""
        self._writer = self._writer_class(str(self._directory), purge_step=start.progress.frames + 1)

    def write(self, report: IterationReport) -> None:
        """Write the numbers of an iteration."""
        assert self._writer
        row = report.row()
        for name, value in row.items():
            if name not in _SKIPPED and math.isfinite(value):
                self._writer.add_scalar(f"{_group(name)}/{name}", value, int(row["frames"]))
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory, and close the files."""
        if self._writer:
            self._writer.close()


def _group(name: str) -> str:
    return next((group for group, prefixes in _GROUPS.items() if name.startswith(prefixes)), "speed")
