"""The state of one stage of a run on Kubeflow, as far as the API tells it."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class StageAttempt:
    """A pod that tries to run a stage.

    pods: names under which the API may know the pod, likeliest first. state: one of the states of a stage. reason:
    the cause of the state in plain words; empty if there is none.
    """

    pods: tuple[str, ...]
    state: str
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        """Return whether the pod has ended, so that its log is complete."""
        return self.state in ("SUCCEEDED", "FAILED", "SKIPPED")


@dataclass(frozen=True)
class StageProgress:
    """The progress of one stage of a run.

    name: `train`, `train[0]` in a loop, `retrain-best/train[0]` where pipelines share a name. state: PENDING (not
    started, or waiting for what `reason` names), RUNNING, SUCCEEDED, FAILED, SKIPPED, NOT REACHED. attempts: the
    stage's pods, oldest first. num_attempts: number of attempts so far; a pod may hold several. cause: the pod of
    the stage, or of its driver, that `reason` describes.
    """

    name: str
    state: str
    started_at: datetime | None
    ended_at: datetime | None
    attempts: tuple[StageAttempt, ...]
    num_attempts: int
    reason: str
    cause: StageAttempt | None = None

    @property
    def task(self) -> str:
        """The name of the stage without the nested pipeline and the iteration."""
        return self.name.rpartition("/")[2].partition("[")[0]

    def seconds(self, now: datetime) -> float | None:
        """Return how many seconds the stage has run until now, or until its end; None before its start."""
        return ((self.ended_at or now) - self.started_at).total_seconds() if self.started_at else None
