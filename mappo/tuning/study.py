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
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, TypeAdapter

from mappo.errors import ConfigError, StudyUnreadable, TrialLost, one_line
from mappo.runs.locations import joined
from mappo.strict_json import json_hash, to_dict
from mappo.tuning.catalogue import SERIES, study_names
from mappo.tuning.claim import Claim
from mappo.tuning.database import MAX_REASON, Database
from mappo.tuning.plan import Plan, changed_fields, distribution_of, encode, make_pruner, sampler_seed_of
from mappo.tuning.search_space import value_of
from mappo.tuning.study_config import Ending
from mappo.tuning.trial import (
    STATES,
    Request,
    TrialNotes,
    TrialRecord,
    Turn,
    read_notes,
    read_stored,
    read_trial,
)

T = TypeVar("T")
_PLAN, _STORE, _SESSIONS, _ENDING = "plan", "place", "sessions", "ending"  # attributes of a study
_ORIGIN, _TURNS, _HEARTBEAT = "origin", "attempts", "seen"  # attributes of a trial
_REASON, _MEASURED = "reason", "measured"  # and the others
_NOT_MEASURED = 1e30  # the excess of a measurement that an episode lacks; unlike infinity, JSON can hold it
_LOCATION: TypeAdapter[str] = TypeAdapter(Annotated[str, Field(min_length=1)])
_ENDINGS, _REQUESTS = TypeAdapter(Ending), TypeAdapter(list[Request])
_MAX_CHANGES = 600  # characters
_KNOWN = (TrialState.COMPLETE, TrialState.PRUNED)  # states whose result holds for other trials of equal values
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
        return _retry(database, name, lambda: cls(database, name, _stored_plan(database, name)))

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

        return _retry(database, name, create_and_request)

    @property
    def store(self) -> str:
        """The location of the runs of the study's trials."""
        return read_stored(_LOCATION, self._retry(self._attributes).get(_STORE), f"study {self.name}: {_STORE}")

    @property
    def ending(self) -> Ending:
        """The settings of what follows the trials, as they were given last."""
        return read_stored(
            _ENDINGS, self._retry(self._attributes).get(_ENDING, {}), f"study {self.name}: {_ENDING}"
        )

    def keep_ending(self, ending: Ending) -> None:
        """Store the settings of what follows the trials.

        Raises:
            DatabaseError: the database does not answer.
        """
        self._retry(lambda: self._study.set_user_attr(_ENDING, to_dict(ending)))

    def require_named(self, scenario: str) -> None:
        """Require that the user named the study's scenario if it is code outside VMAS.

        Importing the code that a database names would run the code of whoever can write there.

        Raises:
            ConfigError: the study's scenario is code, and `scenario` is another or none.
        """
        stored = self.plan.config.environment.scenario
        if stored == scenario:
            return
        if scenario and ":" not in stored:
            raise ConfigError(f"study {self.name}: its scenario is {stored!r}, not {scenario!r}")
        if ":" in stored:
            raise ConfigError(
                f"study {self.name}: its scenario {stored!r} is code outside VMAS, which runs only if you name "
                "it: if you trust this code, give it as --environment.scenario"
            )

    @property
    def optuna_study(self) -> optuna.Study:
        """The study as an object of Optuna's, for Optuna's own tools to read."""
        return self._study

    @property
    def num_trials(self) -> int:
        """The number of trials that all sessions have requested together."""
        return sum(request.trials for request in self._retry(self._requests).values())

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
                previous = self._requests().get(TERMINAL, Request(TERMINAL, 0, 0.0, None))
                kept_seconds = 0.0 if is_late else previous.seconds
                seconds = kept_seconds if timeout_seconds is None else timeout_seconds
                self._request(TERMINAL, num_trials or previous.trials, seconds)

        self._retry(request)

    def trials(self) -> list[TrialRecord]:
        """Return all trials, in the order of their numbers.

        Raises:
            DatabaseError: the database does not answer.
            StudyUnreadable: the database holds something about a trial that this package did not write.
        """
        return self._retry(lambda: [self._record(trial) for trial in self._all_trials()])

    def best(self) -> TrialRecord | None:
        """Return the feasible trial with the highest value, the earliest of equals; None if none is feasible."""
        feasible = [trial for trial in self.trials() if trial.is_feasible]
        return max(feasible, key=lambda trial: (trial.value, -trial.number)) if feasible else None

    def is_settled(self) -> bool:
        """Return whether no worker can start a trial any more, not even after another worker loses its trial."""
        trials = self.trials()
        if any(trial.state == "running" for trial in trials):
            return False
        has_more = len(trials) < self.num_trials or any(trial.state == "waiting" for trial in trials)
        return not has_more or self._retry(self._deadline_has_passed)

    def claim(self, worker: str) -> "Claim | None":
        """Claim the next trial for a worker; return None if no trial can start now.

        `is_settled` tells whether a trial may still become free later. A trial with the values of a finished one
        is not trained: it ends here with the same result.

        Raises:
            ConfigError: the study was deleted.
            DatabaseError: the database does not answer.
            StudyUnreadable: the database holds something about the study that this package did not write.
        """
        while (claim := self._retry(partial(self._claim, worker))) == "known":
            pass
        return claim

    def _claim(self, worker: str) -> 'Claim | Literal["known"] | None':
        with self._database.lock(self.name):
            trials = self._all_trials()
            for trial in trials:
                self._record(trial)  # refuse what this package did not write, before anything is decided
            self._requeue_lost(worker)
            trials = self._all_trials()
            waiting = [trial.number for trial in trials if trial.state is TrialState.WAITING]
            if self._deadline_has_passed() or not (waiting or len(trials) < self.num_trials):
                return None
            number = min(waiting, default=len(trials))
            # A new sampler for each trial, seeded by the trial's number, has no state that must survive a restart.
            self._study.sampler = TPESampler(seed=sampler_seed_of(self.plan.tuning.sampler_seed, number))
            asked = self._study.ask(self._distributions)
            if twin := _known_twin(asked, trials):
                self._end_alike(asked, twin)
                return "known"
            frozen, began = self._storage.get_trial(asked._trial_id), self._database.now()
            self._storage.set_trial_user_attr(asked._trial_id, _HEARTBEAT, began)
            self._store_turns(asked._trial_id, [*self._notes(frozen).attempts, Turn(worker, began)])
            return Claim(self, asked, worker, self._record(frozen).values)

    def _end_alike(self, trial: optuna.Trial, twin: FrozenTrial) -> None:
        """End a trial as a finished one with the same values ended: the same training would follow."""
        self._storage.set_trial_user_attr(trial._trial_id, _REASON, f"the same values as trial {twin.number}")
        for step, value in twin.intermediate_values.items():  # by which Optuna judges pruned and best trials
            self._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        self._store_measured(trial, self._notes(twin).measured)
        if twin.state is TrialState.COMPLETE:
            self._study.tell(trial.number, twin.value)
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED)
        _log.info(
            "trial %d: not trained: it has the same values as trial %d, which is %s",
            *(trial.number, twin.number, twin.state.name.lower()),
        )

    def abandon(self, worker: str) -> None:
        """Requeue the trial of a worker that was interrupted in `claim` and may hold a trial without knowing.

        Raises:
            DatabaseError: the database does not answer.
        """

        def requeue() -> None:
            with self._database.lock(self.name):
                self._requeue_lost(worker)

        self._retry(requeue)

    def _requeue_lost(self, worker: str) -> None:
        """Requeue the running trials that nobody trains.

        These are trials whose worker sent no heartbeat for the grace period, trials without a turn (the process
        died between Optuna's `ask` and the note of the turn), and a trial of `worker` itself. A worker claims only
        when it holds no trial, so it never received the answer to the claim of such a trial.
        """
        current_time = self._database.now()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            notes = self._notes(trial)
            turns = list(notes.attempts)
            if turns and not turns[-1].outcome:
                last_heartbeat = _last_heartbeat(notes)
                is_own = turns[-1].worker == worker
                if self._is_alive(notes, current_time) and not is_own:
                    continue
                turns[-1] = replace(turns[-1], ended=last_heartbeat, outcome="released" if is_own else "lost")
                self._store_turns(trial._trial_id, turns)
                if not is_own:
                    silent_seconds = abs(current_time - last_heartbeat)  # below 0 if the clock was corrected
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

    def _end(
        self,
        claim: "Claim",
        outcome: str,
        value: float | None,
        reason: str,
        measured: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """Finish or release a trial. A retry is harmless: it recognises an end whose answer was lost."""
        with self._database.lock(self.name):
            trial_id = claim.trial_id
            trial = self._storage.get_trial(trial_id)
            turns = list(self._notes(trial).attempts)
            if not turns or turns[-1].worker != claim.worker:
                raise TrialLost(f"trial {claim.number}: another worker holds the trial")
            if trial.state is not TrialState.RUNNING:
                if turns[-1].outcome == outcome:
                    return
                raise TrialLost(f"trial {claim.number}: taken from this worker, which sent no heartbeat in time")
            turns[-1] = Turn(claim.worker, turns[-1].began, self._database.now(), outcome)  # type: ignore[arg-type]
            self._store_turns(trial_id, turns)
            if reason:
                self._storage.set_trial_user_attr(trial_id, _REASON, reason)
            if outcome == "released":
                self._requeue(trial_id, turns)
            else:
                assert outcome != "complete" or measured.keys() == self.plan.tuning.constraints.keys()
                self._store_measured(claim.trial, measured)
                self._study.tell(trial.number, value, STATES[outcome])  # type: ignore[index]

    def _store_measured(self, trial: optuna.Trial, measured: Mapping[str, float | None]) -> None:
        """Store the measurements with constraints, and how far each exceeds its limit, as Optuna's constraint."""
        if not measured:
            return
        self._storage.set_trial_user_attr(trial._trial_id, _MEASURED, dict(measured))
        stored = self._storage.get_trial(trial._trial_id).constraints  # an earlier try may have stored some
        for name, mean in measured.items():
            if name not in stored:
                constraint = self.plan.tuning.constraints[name]
                trial.set_constraint(name, _NOT_MEASURED if mean is None else constraint.excess(mean))

    def _should_prune(self, trial_id: int) -> bool:
        return self._study.pruner.prune(self._study, self._storage.get_trial(trial_id))

    def _heartbeat(self, claim: "Claim") -> None:
        trial = self._storage.get_trial(claim.trial_id)
        turns = self._notes(trial).attempts
        if trial.state is not TrialState.RUNNING or not turns or turns[-1].worker != claim.worker:
            raise TrialLost(f"trial {claim.number}: another worker holds the trial")
        self._storage.set_trial_user_attr(claim.trial_id, _HEARTBEAT, self._database.now())

    def _deadline_has_passed(self) -> bool:
        """Return whether the deadline for starting trials has passed."""
        requests = list(self._requests().values())
        return bool(requests) and requests[-1].is_late(self._database.now(), self.plan.tuning.grace_seconds)

    def _attributes(self) -> dict[str, Any]:
        return dict(self._study.user_attrs)

    def _busy_workers(self) -> list[str]:
        """Return the workers that hold a trial and sent a heartbeat within the grace period."""
        current_time = self._database.now()
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        held = [notes for trial in running if (notes := self._notes(trial)).attempts]
        return [notes.attempts[-1].worker for notes in held if self._is_alive(notes, current_time)]

    def _is_alive(self, notes: TrialNotes, current_time: float) -> bool:
        """Return whether the worker that holds a trial sent a heartbeat within the grace period.

        A heartbeat from the future is none: the clock was ahead then, and a worker that lives has sent another.
        """
        return abs(current_time - _last_heartbeat(notes)) <= self.plan.tuning.grace_seconds

    def _requests(self) -> dict[str, Request]:
        """Return the requests of all sessions by session name, the latest request last."""
        stored = self._attributes().get(_SESSIONS, [])
        requests = read_stored(_REQUESTS, stored, f"study {self.name}: {_SESSIONS}")
        return {request.name: request for request in requests}

    def _request(self, session: str, num_trials: int, timeout_seconds: float) -> None:
        """Store a session's request as the latest. Call it under the study's lock."""
        requests, current_time = self._requests(), self._database.now()
        previous = requests.pop(session, None)
        deadline = current_time + timeout_seconds if timeout_seconds else None
        is_repeated = previous and previous.seconds == timeout_seconds
        if previous and is_repeated and not previous.is_late(current_time, self.plan.tuning.grace_seconds):
            deadline = previous.deadline
        latest = Request(session, num_trials, timeout_seconds, deadline)
        self._study.set_user_attr(_SESSIONS, [to_dict(request) for request in (*requests.values(), latest)])

    def _enqueue(self, origin: str, values: Mapping[str, Any]) -> None:
        trials = self._all_trials()
        if len(trials) < self.num_trials and all(trial.user_attrs.get(_ORIGIN) != origin for trial in trials):
            parameters = {path: encode(self.plan.space[path], value) for path, value in values.items()}
            self._study.enqueue_trial(parameters, user_attrs={_ORIGIN: origin}, skip_if_exists=True)

    def _store_turns(self, trial_id: int, turns: list[Turn]) -> None:
        self._storage.set_trial_user_attr(trial_id, _TURNS, [asdict(turn) for turn in turns])

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        return read_trial(trial, self.plan.space, self.plan.tuning.constraints, self._name_of(trial))

    def _notes(self, trial: FrozenTrial) -> TrialNotes:
        return read_notes(trial, self._name_of(trial))

    def _name_of(self, trial: FrozenTrial) -> str:
        return f"study {self.name}: trial {trial.number}"

    def _retry(self, call: Callable[[], T], is_patient: bool = True) -> T:
        return _retry(self._database, self.name, call, is_patient)


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

    _retry(database, name, delete)


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
    stored = _read_plan(name, stored).to_dict()  # with the defaults of fields that it was stored without
    if json_hash(stored) != json_hash(plan.to_dict()):
        changed = ", ".join(changed_fields(stored, plan.to_dict()))
        raise ConfigError(
            f"study {name}: exists with another plan: {changed[:_MAX_CHANGES]}; give another name, or the same "
            "plan to continue"
        )


def _stored_plan(database: Database, name: str) -> Plan:
    try:
        study = optuna.load_study(study_name=name, storage=database.storage)
    except KeyError as error:
        if name in study_names(database):
            raise StudyUnreadable(f"study {name}: cannot be read: {one_line(error, MAX_REASON)}") from error
        raise ConfigError(_no_study(database, name)) from None
    stored = study.user_attrs.get(_PLAN)
    if stored is None:
        raise ConfigError(f"study {name}: was not made by mappo; give another name")
    return _read_plan(name, stored)


def _read_plan(name: str, stored: Any) -> Plan:
    try:
        return Plan.from_dict(stored)
    except Exception as error:  # the JSON of the database can have any form
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        reason = one_line(f"{kind}{error}", MAX_REASON)
        raise StudyUnreadable(f"study {name}: its plan in the database cannot be read: {reason}") from error


def _no_study(database: Database, name: str) -> str:
    names = ", ".join(study_names(database)) or "none"
    return f"there is no study {name!r} in {database.location}; its studies: {names}"


def _last_heartbeat(notes: TrialNotes) -> float:
    """Return the time of the last heartbeat of the worker whose turn lasts; the claim counts as the first."""
    return notes.seen or notes.attempts[-1].began


def _known_twin(trial: optuna.Trial, trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return a finished trial with the same values, a complete one rather than a pruned one.

    All trials of a study are trained from the same seeds, so its result is that of `trial`. A failed trial has no
    result; the same values may have one, because its machine may have been the cause.
    """
    twins = [other for other in trials if other.state in _KNOWN and other.params == trial.params]
    return min(twins, key=lambda twin: _KNOWN.index(twin.state), default=None)


def _retry(database: Database, name: str, call: Callable[[], T], is_patient: bool = True) -> T:
    """Call `database.retry`; errors name the study."""
    try:
        return database.retry(call, is_patient)
    except StudyUnreadable as error:
        if error.__cause__ and name not in study_names(database):
            raise StudyUnreadable(f"study {name}: the study was deleted") from error
        text = str(error)
        raise StudyUnreadable(text if text.startswith("study ") else f"study {name}: {text}") from error
