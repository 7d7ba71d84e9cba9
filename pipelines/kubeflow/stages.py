"""One stage of a run on Kubeflow, as far as it is known."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class StageAttempt:
    """One pod of a stage. pods: names under which the API may know it; state: as of a stage; reason: in words."""

    pods: tuple[str, ...]
    state: str
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        """True if its log grows no more."""
        return self.state in ("SUCCEEDED", "FAILED", "SKIPPED")


@dataclass(frozen=True)
class StageProgress:
    """One stage of a run.

    name: `train`, `train[0]` in a loop, `retrain-best/train[0]` where pipelines share a name. state: PENDING (not
    begun, or waiting, as reason says), RUNNING, SUCCEEDED, FAILED, SKIPPED, NOT REACHED. attempts: its pods,
    oldest first. num_attempts: how often it was tried so far, also within one pod. cause: the attempt, or the
    driver, that the reason is about.
    """

    name: str
    state: str
    began: datetime | None
    ended: datetime | None
    attempts: tuple[StageAttempt, ...]
    num_attempts: int
    reason: str
    cause: StageAttempt | None = None

    @property
    def task(self) -> str:
        """The name without nested pipeline and iteration."""
        return self.name.rpartition("/")[2].partition("[")[0]

    def seconds(self, now: datetime) -> float | None:
        """Return the seconds since it began, or that it took; None before it begins."""
        return ((self.ended or now) - self.began).total_seconds() if self.began else None
