"""A trial as the database stores it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar

from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from mappo.errors import ConfigError, StudyUnreadable, one_line
from mappo.strict_json import STRICT, parse_report
from mappo.tuning.database import MAX_REASON
from mappo.tuning.plan import decode
from mappo.tuning.search_space import Space

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


T = TypeVar("T")
_FIXED = "fixed_params"  # Optuna's attribute of a trial that was requested with these values


@checked_dataclass(frozen=True, config=STRICT)
class Turn:
    """The time that one worker held a trial. `began` and `ended` are seconds since 1970.

    `outcome` is complete, pruned or failed if the turn ended the trial; released if the worker gave the trial
    back; lost if the worker sent no heartbeat in time; empty while the turn lasts.
    """

    worker: str
    began: float
    ended: float | None = None
    outcome: Literal["", "complete", "pruned", "failed", "released", "lost"] = ""


@checked_dataclass(frozen=True, config=STRICT)
class TrialNotes:
    """The attributes that this package stores with a trial.

    `attempts`: the turns of its workers. `seen`: the last heartbeat of the worker that holds the trial, in seconds
    since 1970; 0 before the first turn. `measured`: the means of the measurements that have constraints, by name;
    None for one that not every episode has.
    """

    origin: str = "sampled"
    reason: str = ""
    attempts: tuple[Turn, ...] = ()
    seen: float = 0.0
    measured: dict[str, float | None] = field(default_factory=dict)


@checked_dataclass(frozen=True, config=STRICT)
class Request:
    """The trials that one session requests. `deadline`: seconds since 1970 after which no trial starts."""

    name: str
    trials: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    deadline: float | None

    def is_late(self, current_time: float, tolerance_seconds: float) -> bool:
        """Return whether the deadline has passed, or lies further ahead than the request set it.

        The latter happens if the clock was ahead when the request was stored, and was corrected since.
        """
        if self.deadline is None:
            return False
        return not 0 < self.deadline - current_time <= self.seconds + tolerance_seconds


@dataclass(frozen=True)
class TrialRecord:
    """A trial's values, results and turns.

    `values`: the tuned values by dotted path. `curve`: the reported values by frames of training, or by index of
    the training seed for the wilcoxon pruner. `origin`: default, warm start or sampled. `reason`: why the trial
    failed, was pruned or was not trained. `attempts`: the turns of its workers, the earliest first. `measured`:
    the means of the measurements that have constraints, by name; None for one that not every episode has.
    `broken`: the names of the constraints that the trial breaks.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    origin: str
    reason: str
    attempts: list[Turn]
    curve: dict[int, float]
    measured: dict[str, float | None]
    broken: list[str]

    @property
    def is_feasible(self) -> bool:
        """Return whether the trial is complete and breaks no constraint."""
        return self.state == "complete" and not self.broken

    @property
    def seconds(self) -> float:
        """The seconds that workers held the trial. A lost turn ends with its last heartbeat."""
        ended = [turn for turn in self.attempts if turn.ended is not None]
        # A turn ends before it began if the clock was corrected meanwhile.
        return sum(max(0.0, (turn.ended or 0.0) - turn.began) for turn in ended)


def read_stored(adapter: TypeAdapter[T], value: Any, where: str) -> T:
    """Return a value that the database stores as JSON, checked against a type.

    Raises:
        StudyUnreadable: the value is of another form; the message is one line.
    """
    try:
        return parse_report(adapter, where, json.dumps(value).encode(), "as mappo writes it")
    except (ConfigError, RecursionError, ValueError) as error:
        raise StudyUnreadable(one_line(error, MAX_REASON)) from None


_NOTES = TypeAdapter(TrialNotes)
_NOTE_NAMES = {note.name for note in fields(TrialNotes)}


def read_notes(trial: FrozenTrial, where: str) -> TrialNotes:
    """Return the attributes that this package stores with a trial.

    Raises:
        StudyUnreadable: an attribute is not as this package writes it.
    """
    own = {name: value for name, value in trial.user_attrs.items() if name in _NOTE_NAMES}
    return read_stored(_NOTES, own, where)


def read_trial(trial: FrozenTrial, space: Space, constraints: Iterable[str], where: str) -> TrialRecord:
    """Return the record of a trial. `constraints`: the names of the study's. Error messages begin with `where`.

    Raises:
        StudyUnreadable: the database holds something about the trial that this package did not write.
    """
    notes, value = read_notes(trial, where), None
    if trial.state is TrialState.COMPLETE:
        value = trial.value
        if value is None or not math.isfinite(value):
            raise StudyUnreadable(f"{where}: is complete, but its value is {value}")
        if missing := [name for name in constraints if name not in trial.constraints]:
            raise StudyUnreadable(f"{where}: is complete, but has no number for its constraint on {missing[0]}")
    # Optuna fills `params` when a worker claims the trial; before, an enqueued trial has the fixed ones only.
    parameters = trial.params or trial.system_attrs.get(_FIXED, {})
    if not isinstance(parameters, dict):
        raise StudyUnreadable(f"{where}: {_FIXED}: must be an object, not {type(parameters).__name__}")
    return TrialRecord(
        number=trial.number,
        state=STATE_NAMES[trial.state],
        value=value,
        values={path: _read_value(path, encoded, space, where) for path, encoded in parameters.items()},
        origin=notes.origin,
        reason=notes.reason,
        attempts=list(notes.attempts),
        curve={step: value for step, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)},
        measured=notes.measured,
        broken=[name for name, excess in trial.constraints.items() if excess > 0],
    )


def _read_value(path: str, encoded: Any, space: Space, where: str) -> Any:
    try:
        return decode(space[path], encoded)
    except KeyError:
        raise StudyUnreadable(f"{where}: {one_line(path, MAX_REASON)}: not in the search space") from None
    except ValueError as error:
        raise StudyUnreadable(f"{where}: {path}: {error}") from None
