"""A trial as the database keeps it."""

from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import TrialState

TrialOutcome = Literal["complete", "pruned", "failed"]
STATES: dict[TrialOutcome, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
STATE_NAMES = {state: name for name, state in STATES.items()} | {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Turn:
    """One worker's time with a trial, in seconds since 1970.

    outcome: complete, pruned or failed ended the trial; released: the worker ended and gave it back; lost: it fell
    silent; empty while it lasts.
    """

    worker: str
    began: float
    ended: float | None = None
    outcome: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial. values: by dotted path. curve: what it reported, by frames of training.

    origin: default, warm start or sampled. reason: why it failed or was pruned.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    origin: str
    reason: str
    attempts: list[Turn]
    curve: dict[int, float]

    @property
    def seconds(self) -> float:
        """What workers spent on it, as far as they said so."""
        return sum(attempt.ended - attempt.began for attempt in self.attempts if attempt.ended is not None)
