"""A trial as the database stores it."""

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
    """The time that one worker held a trial. `began` and `ended` are seconds since 1970.

    `outcome` is complete, pruned or failed if the turn ended the trial; released if the worker gave the trial
    back; lost if the worker sent no heartbeat in time; empty while the turn lasts.
    """

    worker: str
    began: float
    ended: float | None = None
    outcome: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """A trial's values, results and turns.

    `values`: the tuned values by dotted path. `curve`: the reported values by frames of training, or by index of
    the training seed for the wilcoxon pruner. `origin`: default, warm start or sampled. `reason`: why the trial
    failed or was pruned. `attempts`: the turns of its workers, the earliest first.
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
        """The seconds that workers held the trial. A lost turn ends with its last heartbeat."""
        return sum(turn.ended - turn.began for turn in self.attempts if turn.ended is not None)
