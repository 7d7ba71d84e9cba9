"""The names of the curves of a training, the same in TensorBoard and in MLflow."""

import math

from mappo.training.history import MEASURED, IterationReport

_GROUPS = {  # group of plots: prefixes of the names of its columns
    "return": ("episode_return_", "evaluation_return_"),
    "measurement": (MEASURED,),
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


def curves(report: IterationReport) -> dict[str, float]:
    """Return the finite numbers of an iteration by `group/column`, such as `loss/loss_critic`."""
    return {
        f"{_group(name)}/{name}": value
        for name, value in report.row().items()
        if name not in _SKIPPED and math.isfinite(value)
    }


def _group(name: str) -> str:
    return next((group for group, prefixes in _GROUPS.items() if name.startswith(prefixes)), "speed")
