"""A durable tuning study: trials in Optuna's storage, which any number of workers claim, release and finish.

A trial is a trial of Optuna's and keeps its number, whatever happens to its workers. A worker *claims* a trial
and sends heartbeats. If the heartbeats stop, the study requeues the trial with its parameters and reported values,
and another worker continues it. One process at a time decides about the trials of a study, under a lock. So two
workers never train the same trial, and no more trials start than were requested. (Optuna's own heartbeats fail a
trial without heartbeats and queue a copy of it. They miss a trial whose worker died before the first heartbeat.)

This file is long because every change of a study's records happens here, under one lock.
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
from mappo.tuning.plan import Plan, changed_fields, distribution_of, encode, make_pruner, sampler_seed_of
from mappo.tuning.search_space import Choices, value_of
from mappo.tuning.trial import STATE_NAMES, STATES, TrialRecord, Turn

_PLAN, _STORE, _SESSIONS = "plan", "place", "sessions"  # attributes of a study
_ORIGIN, _TURNS, _HEARTBEAT, _REASON = "origin", "attempts", "seen", "reason"  # attributes of a trial
TERMINAL = "terminal"  # the session of a person, who requests trials outside pipelines
_log = logging.getLogger(__name__)


class Study:
    """A study in a database. Public methods retry while the database is away; any thread may call them."""

    def __init__(self, database: Database, name: str, plan: Plan):
        self.name, self.plan = name, plan
        self._database, self._storage = database, database.storage
        self._study = optuna.load_study(study_name=name, storage=self._storage, pruner=make_pruner(plan))
        self._distributions = {path: distribution_of(dimension) for path, dimension in plan.space.items()}

    @classmethod
    def load(cls, database: Database, name: str) -> "Study":
        """Load an existing study.

        Raises:
            ConfigError: the study does not exist, or mappo did not make it.
            DatabaseError: the database does not answer.
        """
        return database.retry(lambda: cls(database, name, _stored_plan(database, name)))

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
        """Create a study, or continue the one of that name, and request trials. A repeated call is harmless.

        `store`: the runs of the trials are kept in a new directory of this store. A study keeps its first one.
        `series`: the series that the study is an edition of; empty for none.
        `session`: the one who requests `num_trials`. A second request of the same session replaces its first;
        other sessions add their trials.
        `timeout_seconds`: no trial starts later than this from now; 0 sets no deadline. The deadline of the latest
        request holds for the whole study. A session that repeats its request before the deadline, with the same
        timeout, does not postpone the deadline.
        `warm_start`: the values of the second trial. The first trial is the plan's own configuration.

        Raises:
            ConfigError: a study of that name exists with another plan, or mappo did not make it.
            DatabaseError: the database does not answer.
        """

        def create_and_request() -> Study:
            with database.lock(name):
                _create(database, name, plan)
                study = cls(database, name, plan)
                if _STORE not in study._attributes():
                    # The random suffix keeps the runs apart from those of a deleted study of the same name.
                    study._study.set_user_attr(_STORE, joined(store, f"{name}-{secrets.token_hex(4)}"))
                    study._study.set_user_attr(SERIES, series)
                study._request(session, num_trials, timeout_seconds)
                default = {path: value_of(plan.config, path) for path in plan.space}
                study._enqueue("default", default)
                if warm_start:
                    study._enqueue("warm start", warm_start)
                return study

        return database.retry(create_and_request)

    @property
    def store(self) -> str:
        """The location of the runs of the study's trials."""
        return str(self._database.retry(self._attributes)[_STORE])

    @property
    def optuna_study(self) -> optuna.Study:
        """The study as an object of Optuna's, for Optuna's own tools to read."""
        return self._study

    @property
    def num_trials(self) -> int:
        """The number of trials that all sessions have requested together."""
        return sum(session["trials"] for session in self._database.retry(self._sessions).values())

    def request_trials(self, num_trials: int | None = None, timeout_seconds: float | None = None) -> None:
        """Request trials for the terminal's session, so that workers can continue the study.

        Without `num_trials`, the session's previous number stays. Without `timeout_seconds`, a deadline that has
        not passed stays, and one that has passed ends.

        Raises:
            DatabaseError: the database does not answer.
        """

        def request() -> None:
            with self._database.lock(self.name):
                is_late = self._deadline_has_passed()
                if num_trials is timeout_seconds is None and not is_late:
                    return
                previous = self._sessions().get(TERMINAL, {"trials": 0, "seconds": 0.0})
                kept_seconds = 0.0 if is_late else previous["seconds"]
                seconds = kept_seconds if timeout_seconds is None else timeout_seconds
                self._request(TERMINAL, num_trials or previous["trials"], seconds)

        self._database.retry(request)

    def trials(self) -> list[TrialRecord]:
        """Return all trials, in the order of their numbers."""
        frozen = self._database.retry(lambda: self._study.get_trials(deepcopy=False))
        return [self._record(trial) for trial in frozen]

    def best(self) -> TrialRecord | None:
        """Return the complete trial with the highest value, the earliest of equals; None if none is complete."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return max(complete, key=lambda trial: (trial.value, -trial.number)) if complete else None

    def is_settled(self) -> bool:
        """Return whether no worker can start a trial any more, not even after another worker loses its trial."""
        trials = self.trials()
        if any(trial.state == "running" for trial in trials):
            return False
        has_more = len(trials) < self.num_trials or any(trial.state == "waiting" for trial in trials)
        return not has_more or self._database.retry(self._deadline_has_passed)

    def claim(self, worker: str) -> "Claim | None":
        """Claim the next trial for a worker; return None if no trial can start now.

        `is_settled` tells whether a trial may still become free later.

        Raises:
            ConfigError: the study was deleted.
            DatabaseError: the database does not answer.
        """
        try:
            return self._database.retry(partial(self._claim, worker))
        except KeyError:
            raise ConfigError(f"study {self.name}: the study was deleted") from None

    def _claim(self, worker: str) -> "Claim | None":
        with self._database.lock(self.name):
            self._requeue_lost(worker)
            trials = self._all_trials()
            waiting = [trial.number for trial in trials if trial.state is TrialState.WAITING]
            if self._deadline_has_passed() or not (waiting or len(trials) < self.num_trials):
                return None
            number = min(waiting, default=len(trials))
            # A new sampler for each trial, seeded by the trial's number, has no state that must survive a restart.
            self._study.sampler = TPESampler(seed=sampler_seed_of(self.plan.tuning.sampler_seed, number))
            trial = self._study.ask(self._distributions)
            turns = _turns(trial.user_attrs)
            began = self._database.now()
            self._store_turns(trial._trial_id, [*turns, Turn(worker, began)])
            values = {path: self._decode(path, value) for path, value in trial.params.items()}
            return Claim(self, trial, worker, values)

    def abandon(self, worker: str) -> None:
        """Requeue the trial of a worker that was interrupted in `claim` and may hold a trial without knowing.

        Raises:
            DatabaseError: the database does not answer.
        """

        def requeue() -> None:
            with self._database.lock(self.name):
                self._requeue_lost(worker)

        self._database.retry(requeue)

    def _requeue_lost(self, worker: str) -> None:
        """Requeue the running trials that nobody trains.

        These are trials whose worker sent no heartbeat for the grace period, trials without a turn (the process
        died between Optuna's `ask` and the note of the turn), and a trial of `worker` itself. A worker claims only
        when it holds no trial, so it never received the answer to the claim of such a trial.
        """
        current_time, tuning = self._database.now(), self.plan.tuning
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            turns = _turns(trial.user_attrs)
            if turns and not turns[-1].outcome:
                last_heartbeat = _last_heartbeat(trial, turns[-1])
                is_own = turns[-1].worker == worker
                if current_time - last_heartbeat <= tuning.grace_seconds and not is_own:
                    continue
                turns[-1] = replace(turns[-1], ended=last_heartbeat, outcome="released" if is_own else "lost")
                self._store_turns(trial._trial_id, turns)
                if not is_own:
                    silent_seconds = current_time - last_heartbeat
                    message = "trial %d: lost: worker %s sent no heartbeat for %.0f s"
                    _log.warning(message, trial.number, turns[-1].worker, silent_seconds)
            self._requeue(trial._trial_id, turns)

    def _all_trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _requeue(self, trial_id: int, turns: list[Turn]) -> None:
        """Let a trial wait for the next worker; fail it if more workers lost it than the settings allow."""
        losses, max_losses = sum(turn.outcome == "lost" for turn in turns), self.plan.tuning.max_losses
        if losses <= max_losses:
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return
        reason = f"lost workers (no heartbeat in time): {losses}; tuning.max_losses = {max_losses}"
        self._storage.set_trial_user_attr(trial_id, _REASON, reason)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _end(self, claim: "Claim", outcome: str, value: float | None, reason: str) -> None:
        """Finish or release a trial. A retry is harmless: it recognises an end whose answer was lost."""
        with self._database.lock(self.name):
            trial_id = claim.trial_id
            trial = self._storage.get_trial(trial_id)
            turns = _turns(trial.user_attrs)
            if not turns or turns[-1].worker != claim.worker:
                raise TrialLost(f"trial {claim.number}: another worker holds the trial")
            if trial.state is not TrialState.RUNNING:
                if turns[-1].outcome == outcome:
                    return
                raise TrialLost(f"trial {claim.number}: taken from this worker, which sent no heartbeat in time")
            turns[-1] = replace(turns[-1], ended=self._database.now(), outcome=outcome)
            self._store_turns(trial_id, turns)
            if reason:
                self._storage.set_trial_user_attr(trial_id, _REASON, reason)
            if outcome == "released":
                self._requeue(trial_id, turns)
            else:
                self._study.tell(trial.number, value, STATES[outcome])  # type: ignore[index]

    def _should_prune(self, trial_id: int) -> bool:
        return self._study.pruner.prune(self._study, self._storage.get_trial(trial_id))

    def _heartbeat(self, claim: "Claim") -> None:
        trial = self._storage.get_trial(claim.trial_id)
        turns = _turns(trial.user_attrs)
        if trial.state is not TrialState.RUNNING or not turns or turns[-1].worker != claim.worker:
            raise TrialLost(f"trial {claim.number}: another worker holds the trial")
        self._storage.set_trial_user_attr(claim.trial_id, _HEARTBEAT, self._database.now())

    def _deadline_has_passed(self) -> bool:
        """Return whether the deadline for starting trials has passed."""
        *_, latest = self._sessions().values()
        return latest["deadline"] is not None and self._database.now() >= latest["deadline"]

    def _attributes(self) -> dict[str, Any]:
        return dict(self._study.user_attrs)

    def _busy_workers(self) -> list[str]:
        """Return the workers that hold a trial and sent a heartbeat within the grace period."""
        current_time, grace = self._database.now(), self.plan.tuning.grace_seconds
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        held = [(trial, turn) for trial in running for turn in _turns(trial.user_attrs)[-1:]]
        return [turn.worker for trial, turn in held if current_time - _last_heartbeat(trial, turn) <= grace]

    def _sessions(self) -> dict[str, dict[str, Any]]:
        """Return the requests of all sessions by session name, the latest request last."""
        return {session["name"]: session for session in self._attributes().get(_SESSIONS, [])}

    def _request(self, session: str, num_trials: int, timeout_seconds: float) -> None:
        """Store a session's request as the latest. Call it under the study's lock."""
        sessions, current_time = self._sessions(), self._database.now()
        previous = sessions.pop(session, None)
        deadline = current_time + timeout_seconds if timeout_seconds else None
        if (
            previous
            and previous["seconds"] == timeout_seconds
            and previous["deadline"]
            and current_time < previous["deadline"]
        ):
            deadline = previous["deadline"]
        request = {"name": session, "trials": num_trials, "seconds": timeout_seconds, "deadline": deadline}
        self._study.set_user_attr(_SESSIONS, [*sessions.values(), request])

    def _enqueue(self, origin: str, values: Mapping[str, Any]) -> None:
        trials = self._all_trials()
        if len(trials) < self.num_trials and all(trial.user_attrs.get(_ORIGIN) != origin for trial in trials):
            parameters = {path: encode(self.plan.space[path], value) for path, value in values.items()}
            self._study.enqueue_trial(parameters, user_attrs={_ORIGIN: origin}, skip_if_exists=True)

    def _store_turns(self, trial_id: int, turns: list[Turn]) -> None:
        self._storage.set_trial_user_attr(trial_id, _TURNS, [asdict(turn) for turn in turns])

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        # Optuna fills `params` when a worker claims the trial; before, an enqueued trial has `fixed_params` only.
        parameters = trial.params or trial.system_attrs.get("fixed_params", {})
        return TrialRecord(
            number=trial.number,
            state=STATE_NAMES[trial.state],
            value=trial.value if trial.state is TrialState.COMPLETE else None,
            values={path: self._decode(path, value) for path, value in parameters.items()},
            origin=trial.user_attrs.get(_ORIGIN, "sampled"),
            reason=trial.user_attrs.get(_REASON, ""),
            attempts=_turns(trial.user_attrs),
            curve=dict(sorted(trial.intermediate_values.items())),
        )

    def _decode(self, path: str, value: Any) -> Any:
        dimension = self.plan.space[path]
        if not isinstance(dimension, Choices):
            return value
        return next(choice for choice in dimension.choices if encode(dimension, choice) == value)


def delete_study(database: Database, name: str) -> None:
    """Delete a study with its trials, but keep the runs of the trials.

    Raises:
        ConfigError: no study has that name, or workers hold trials of the study.
        DatabaseError: the database does not answer.
    """
    study = Study.load(database, name)

    def delete() -> None:
        with database.lock(name):
            if workers := study._busy_workers():
                wait = f"{study.plan.tuning.grace_seconds:g} s after they have ended"
                raise ConfigError(
                    f"study {name}: workers hold its trials: {', '.join(workers)}; delete the study {wait}"
                )
            optuna.delete_study(study_name=name, storage=database.storage)

    database.retry(delete)


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
        raise ConfigError(f"study {name}: was not made by mappo; give another name")
    stored = Plan.from_dict(stored).to_dict()  # fields that an older version did not have get their defaults
    if json_hash(stored) != json_hash(plan.to_dict()):
        changed = ", ".join(changed_fields(stored, plan.to_dict()))
        raise ConfigError(
            f"study {name}: exists with another plan: {changed}; give another name, or the same plan to continue"
        )


def _stored_plan(database: Database, name: str) -> Plan:
    try:
        study = optuna.load_study(study_name=name, storage=database.storage)
    except KeyError:
        raise ConfigError(_no_study(database, name)) from None
    stored = study.user_attrs.get(_PLAN)
    if stored is None:
        raise ConfigError(f"study {name}: was not made by mappo; give another name")
    return Plan.from_dict(stored)


def _no_study(database: Database, name: str) -> str:
    names = ", ".join(study_names(database)) or "none"
    return f"there is no study {name!r} in {database.location}; its studies: {names}"


def _turns(attributes: Mapping[str, Any]) -> list[Turn]:
    return [Turn(**fields) for fields in attributes.get(_TURNS, [])]


def _last_heartbeat(trial: FrozenTrial, turn: Turn) -> float:
    """Return the time of the last heartbeat of the worker whose turn lasts; the claim counts as the first."""
    return max(turn.began, float(trial.user_attrs.get(_HEARTBEAT, 0.0)))
