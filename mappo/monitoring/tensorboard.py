"""Training as TensorBoard event files, for those who watch it there; the history has the same numbers."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mappo.errors import ConfigError
from mappo.training.history import IterationReport, TrainingStarted

if TYPE_CHECKING:
    pass

_GROUPS = {  # of plots, by what the names of columns begin with
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
_LEFT_OUT = ("iteration", "frames")  # the axis


class EventFiles:
    """A directory of event files; each column of the history is a scalar over frames, NaN left out.

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
        self._make, self._directory = SummaryWriter, directory
        self._writer: SummaryWriter | None = None

    def begin(self, beginning: TrainingStarted) -> None:
        """Start where training does: what an earlier process wrote of later frames does not count."""
        self._writer = self._make(str(self._directory), purge_step=beginning.progress.frames + 1)

    def write(self, report: IterationReport) -> None:
        """Write an iteration."""
        assert self._writer
        row = report.row()
        for name, value in row.items():
            if name not in _LEFT_OUT and math.isfinite(value):
                self._writer.add_scalar(f"{_group(name)}/{name}", value, int(row["frames"]))
        self._writer.flush()

    def close(self) -> None:
        """Write the rest."""
        if self._writer:
            self._writer.close()


def _group(name: str) -> str:
    return next((group for group, starts in _GROUPS.items() if name.startswith(starts)), "speed")
