"""A durable tuning study: trials in Optuna's storage, which any number of workers take, leave and finish.

A trial is Optuna's: one number, whatever becomes of its workers. A worker *claims* it and keeps saying that it is
alive; where it falls silent, the trial goes back to those that wait, with its parameters and what it has reported,
and another worker goes on with it. Deciding who gets what happens one process at a time, so no trial is worked on
twice, and none is started beyond what was asked for. (Optuna's own heartbeats end such a trial and queue a copy,
and miss one whose worker died before its first beat.)
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from mappo.errors import ConfigError, TrialLost
from mappo.runs.locations import joined
from mappo.strict_json import json_hash
from mappo.tuning.catalogue import SERIES, study_names
from mappo.tuning.claim import Claim
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan, changed_fields, distribution_of, encoded, make_pruner, sampler_seed_of
from mappo.tuning.search_space import Choices, value_of
from mappo.tuning.trial import STATE_NAMES, STATES, TrialRecord, Turn

_PLAN, _PLACE, _SESSIONS = "plan", "place", "sessions"  # attributes of a study
_ORIGIN, _ATTEMPTS, _SEEN, _REASON = "origin", "attempts", "seen", "reason"  # attributes of a trial
TERMINAL = "terminal"  # who asks for trials, where that is a person
_log = logging.getLogger(__name__)


class Study:
    """A study by its name. Methods wait for a database that is away, and may be called from any thread."""

    def __init__(self, database: Database, name: str, plan: Plan):
        self.name, self.plan = name, plan
        self._database, self._storage = database, database.storage
        self._study = optuna.load_study(study_name=name, storage=self._storage, pruner=make_pruner(plan))
        self._distributions = {path: distribution_of(dimension) for path, dimension in plan.space.items()}

    @classmethod
    def load(cls, database: Database, name: str) -> "Study":
        """A study that is there.

        Raises:
            ConfigError: it is not, or was not made by this package.
            DatabaseError: the database does not answer.
        """
        return database.patiently(lambda: cls(database, name, _stored_plan(database, name)))

    @classmethod
    def prepare(
        cls,
        database: Database,
        name: str,
        plan: Plan,
        num_trials: int,
        *,
        store: str = "runs",
        series: str = "",
        session: str = TERMINAL,
        timeout_seconds: float = 0.0,
        warm_start: Mapping[str, Any] | None = None,
    ) -> "Study":
        """Make a study, or go on with the one of that name; doing it again is harmless.

        `store` is where the runs of its trials are kept, in a place of their own; that of the first time stays.
        `session` is who asks for `num_trials`, none of them started later than `timeout_seconds` from now; 0 for
        no such limit. Asking again replaces what it asked for before, and does not put off a deadline that is
        still to come, unless the time is another. Another session adds its trials, and its time is the one that
        holds. `series` is what this is an edition of. The first trial is the plan's own configuration, the second
        `warm_start`, if these values are given.

        Raises:
            ConfigError: there is a study of that name with another plan.
            DatabaseError: the database does not answer.
        """

        def prepared() -> Study:
            with database.exclusively(name):
                _create(database, name, plan)
                study = cls(database, name, plan)
                if _PLACE not in study._attributes():  # not that of a study of this name that was deleted
                    study._study.set_user_attr(_PLACE, joined(store, f"{name}-{secrets.token_hex(4)}"))
                    study._study.set_user_attr(SERIES, series)
                study._ask(session, num_trials, timeout_seconds)
                own = {path: value_of(plan.config, path) for path in plan.space}
                study._enqueue("default", own)
                if warm_start:
                    study._enqueue("warm start", warm_start)
                return study

        return database.patiently(prepared)

    @property
    def place(self) -> str:
        """Where the runs of its trials are kept."""
        return str(self._database.patiently(self._attributes)[_PLACE])

    @property
    def optuna_study(self) -> optuna.Study:
        """The same as Optuna's own tools take it, to read."""
        return self._study

    @property
    def num_trials(self) -> int:
        """How many trials were asked for, by all sessions together."""
        return sum(session["trials"] for session in self._database.patiently(self._sessions).values())

    def go_on(self, num_trials: int | None = None, timeout_seconds: float | None = None) -> None:
        """Ask for so many trials, as somebody at a terminal, and for time; what is None stays what was asked for.

        But a deadline that has passed does not stay.

        Raises:
            DatabaseError: the database does not answer.
        """

        def asked() -> None:
            with self._database.exclusively(self.name):
                if num_trials is timeout_seconds is None and not self._is_over():
                    return
                before = self._sessions().get(TERMINAL, {"trials": 0})
                self._ask(TERMINAL, num_trials or before["trials"], timeout_seconds or 0.0)

        self._database.patiently(asked)

    def busy_workers(self) -> list[str]:
        """Who is at work on a trial, as far as they have said so in time."""
        return self._database.patiently(self._busy)

    def trials(self) -> list[TrialRecord]:
        """All trials, in the order of their numbers."""
        frozen = self._database.patiently(lambda: self._study.get_trials(deepcopy=False))
        return [self._record(trial) for trial in frozen]

    def best(self) -> TrialRecord | None:
        """The completed trial with the highest value, the earliest of equals; None before the first."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return max(complete, key=lambda trial: (trial.value, -trial.number)) if complete else None

    def is_settled(self) -> bool:
        """Whether nothing may be started any more, not even if a worker that is busy now should fall silent."""
        trials = self.trials()
        if any(trial.state == "running" for trial in trials):
            return False
        left = len(trials) < self.num_trials or any(trial.state == "waiting" for trial in trials)
        return not left or self._database.patiently(self._is_over)

    def claim(self, worker: str) -> "Claim | None":
        """The next trial, which is this worker's from now on; None where there is none to be had, now or ever.

        Raises:
            ConfigError: the study was deleted.
            DatabaseError: the database does not answer.
        """
        try:
            return self._database.patiently(partial(self._claim, worker))
        except KeyError:
            raise ConfigError(f"study {self.name}: it was deleted") from None

    def _claim(self, worker: str) -> "Claim | None":
        with self._database.exclusively(self.name):
            self._take_back(worker)
            trials = self._all_trials()
            waiting = [trial.number for trial in trials if trial.state is TrialState.WAITING]
            if self._is_over() or not (waiting or len(trials) < self.num_trials):
                return None
            number = min(waiting, default=len(trials))
            self._study.sampler = TPESampler(seed=sampler_seed_of(self.plan.tuning.sampler_seed, number))
            trial = self._study.ask(self._distributions)
            attempts = _attempts(trial.user_attrs)
            now = self._database.now()
            self._keep_attempts(trial._trial_id, [*attempts, Turn(worker, now)])
            values = {path: self._decoded(path, value) for path, value in trial.params.items()}
            return Claim(self, trial, worker, values)

    def abandon(self, worker: str) -> None:
        """Give back what a worker claimed without learning of it.

        Raises:
            DatabaseError: the database does not answer.
        """

        def taken_back() -> None:
            with self._database.exclusively(self.name):
                self._take_back(worker)

        self._database.patiently(taken_back)

    def _take_back(self, worker: str) -> None:
        """Trials whose workers fell silent wait again, those that nobody came to work on, and a worker's own.

        Its own are those whose claim's answer was lost: it has one at a time, and asks when it has none.
        """
        now, tuning = self._database.now(), self.plan.tuning
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            attempts = _attempts(trial.user_attrs)
            if attempts and not attempts[-1].outcome:
                seen = _seen(trial, attempts[-1])
                is_own = attempts[-1].worker == worker
                if now - seen <= tuning.grace_seconds and not is_own:
                    continue
                attempts[-1] = replace(attempts[-1], ended=seen, outcome="released" if is_own else "lost")
                self._keep_attempts(trial._trial_id, attempts)
                if not is_own:
                    _log.warning("trial %d: its worker %s fell silent", trial.number, attempts[-1].worker)
            self._put_back(trial._trial_id, attempts)

    def _all_trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _put_back(self, trial_id: int, attempts: list[Turn]) -> None:
        losses = sum(attempt.outcome == "lost" for attempt in attempts)
        if losses <= self.plan.tuning.max_losses:
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return
        self._storage.set_trial_user_attr(trial_id, _REASON, f"{losses} workers fell silent over it")
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _end(self, claim: "Claim", outcome: str, value: float | None, reason: str) -> None:
        """Finish a trial, or release it; again, if the database went away before it said that it is done."""
        with self._database.exclusively(self.name):
            trial_id = claim.trial_id
            trial = self._storage.get_trial(trial_id)
            attempts = _attempts(trial.user_attrs)
            if not attempts or attempts[-1].worker != claim.worker:
                raise TrialLost(f"trial {claim.number}: another worker has it")
            if trial.state is not TrialState.RUNNING:
                if attempts[-1].outcome == outcome:
                    return
                raise TrialLost(f"trial {claim.number}: it was taken back, as this worker had fallen silent")
            attempts[-1] = replace(attempts[-1], ended=self._database.now(), outcome=outcome)
            self._keep_attempts(trial_id, attempts)
            if reason:
                self._storage.set_trial_user_attr(trial_id, _REASON, reason)
            if outcome == "released":
                self._put_back(trial_id, attempts)
            else:
                self._study.tell(trial.number, value, STATES[outcome])  # type: ignore[index]

    def _should_prune(self, trial_id: int) -> bool:
        return self._study.pruner.prune(self._study, self._storage.get_trial(trial_id))

    def _beat(self, claim: "Claim") -> None:
        trial = self._storage.get_trial(claim.trial_id)
        attempts = _attempts(trial.user_attrs)
        if trial.state is not TrialState.RUNNING or not attempts or attempts[-1].worker != claim.worker:
            raise TrialLost(f"trial {claim.number}: another worker has it")
        self._storage.set_trial_user_attr(claim.trial_id, _SEEN, self._database.now())

    def _is_over(self) -> bool:
        """Whether the time for starting trials is."""
        *_, last = self._sessions().values()
        return last["deadline"] is not None and self._database.now() >= last["deadline"]

    def _attributes(self) -> dict[str, Any]:
        return dict(self._study.user_attrs)

    def _busy(self) -> list[str]:
        now, grace = self._database.now(), self.plan.tuning.grace_seconds
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        lasting = [(trial, attempt) for trial in running for attempt in _attempts(trial.user_attrs)[-1:]]
        return [attempt.worker for trial, attempt in lasting if now - _seen(trial, attempt) <= grace]

    def _sessions(self) -> dict[str, dict[str, Any]]:
        """Who asked for what, the latest last."""
        return {session["name"]: session for session in self._attributes().get(_SESSIONS, [])}

    def _ask(self, session: str, num_trials: int, timeout_seconds: float) -> None:
        sessions, now = self._sessions(), self._database.now()
        before = sessions.pop(session, None)
        deadline = now + timeout_seconds if timeout_seconds else None
        if before and before["seconds"] == timeout_seconds and before["deadline"] and now < before["deadline"]:
            deadline = before["deadline"]
        asked = {"name": session, "trials": num_trials, "seconds": timeout_seconds, "deadline": deadline}
        self._study.set_user_attr(_SESSIONS, [*sessions.values(), asked])

    def _enqueue(self, origin: str, values: Mapping[str, Any]) -> None:
        trials = self._all_trials()
        if len(trials) < self.num_trials and all(trial.user_attrs.get(_ORIGIN) != origin for trial in trials):
            encoded = {path: encoded(self.plan.space[path], value) for path, value in values.items()}
            self._study.enqueue_trial(encoded, user_attrs={_ORIGIN: origin}, skip_if_exists=True)

    def _keep_attempts(self, trial_id: int, attempts: list[Turn]) -> None:
        self._storage.set_trial_user_attr(trial_id, _ATTEMPTS, [asdict(attempt) for attempt in attempts])

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        given = trial.params or trial.system_attrs.get("fixed_params", {})
        return TrialRecord(
            number=trial.number,
            state=STATE_NAMES[trial.state],
            value=trial.value if trial.state is TrialState.COMPLETE else None,
            values={path: self._decoded(path, value) for path, value in given.items()},
            origin=trial.user_attrs.get(_ORIGIN, "sampled"),
            reason=trial.user_attrs.get(_REASON, ""),
            attempts=_attempts(trial.user_attrs),
            curve=dict(sorted(trial.intermediate_values.items())),
        )

    def _decoded(self, path: str, value: Any) -> Any:
        dimension = self.plan.space[path]
        if not isinstance(dimension, Choices):
            return value
        return next(choice for choice in dimension.choices if encoded(dimension, choice) == value)


def delete_study(database: Database, name: str) -> None:
    """Delete a study with its trials; not the runs of its trials.

    Raises:
        ConfigError: there is none of that name, or workers are busy with it.
        DatabaseError: the database does not answer.
    """
    study = Study.load(database, name)

    def deleted() -> None:
        with database.exclusively(name):
            if busy := study._busy():
                wait = f"{study.plan.tuning.grace_seconds:g} s after they have ended"
                raise ConfigError(f"study {name}: busy with its trials: {', '.join(busy)}; delete it {wait}")
            optuna.delete_study(study_name=name, storage=database.storage)

    database.patiently(deleted)


def _create(database: Database, name: str, plan: Plan) -> None:
    try:
        study = optuna.create_study(storage=database.storage, study_name=name, direction="maximize")
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=database.storage)
    stored = study.user_attrs.get(_PLAN)
    if stored is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_PLAN, plan.to_dict())
        return
    if stored is None:
        raise ConfigError(f"study {name}: was not made by mappo")
    if json_hash(stored) != json_hash(plan.to_dict()):
        changed = ", ".join(changed_fields(stored, plan.to_dict()))
        raise ConfigError(
            f"study {name}: is there with another plan: {changed}; give another name, or the same plan to go on"
        )


def _stored_plan(database: Database, name: str) -> Plan:
    try:
        study = optuna.load_study(study_name=name, storage=database.storage)
    except KeyError:
        raise ConfigError(_no_study(database, name)) from None
    stored = study.user_attrs.get(_PLAN)
    if stored is None:
        raise ConfigError(f"study {name}: was not made by mappo")
    return Plan.from_dict(stored)


def _no_study(database: Database, name: str) -> str:
    there = ", ".join(study_names(database)) or "none"
    return f"there is no study {name!r} in {database.place}; there: {there}"


def _attempts(attributes: Mapping[str, Any]) -> list[Turn]:
    return [Turn(**attempt) for attempt in attributes.get(_ATTEMPTS, [])]


def _seen(trial: FrozenTrial, attempt: Turn) -> float:
    """When the worker whose attempt lasts last said that it is alive."""
    return max(attempt.began, float(trial.user_attrs.get(_SEEN, 0.0)))
