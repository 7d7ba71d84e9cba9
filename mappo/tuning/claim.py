"""A claim: the trial that one worker holds."""

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna

from mappo.errors import TrialLost
from mappo.tuning.trial import TrialOutcome

if TYPE_CHECKING:
    from mappo.tuning.study import Study

_log = logging.getLogger(__name__)
_LOSSES_SHARE = 0.6  # of the grace period: a worker that could not say so for so long holds its trial for lost


class Claim:
    """A trial that is one worker's. As a context manager it keeps saying that the worker is alive.

    The block must end the trial by `finish` or `release`, or leave it to be found silent.
    """

    def __init__(self, study: "Study", trial: optuna.Trial, worker: str, values: dict[str, Any]):
        self.number, self.worker, self.values = trial.number, worker, values
        self.trial_id = trial._trial_id
        self._study = study
        self._reported = set(study._storage.get_trial(self.trial_id).intermediate_values)
        self._grace_seconds = study.plan.tuning.grace_seconds
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._keep_alive, name=f"trial {self.number}", daemon=True)

    def __enter__(self) -> "Claim":
        """Begin to beat."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop beating."""
        self._ended.set()
        self._thread.join(timeout=5)

    @property
    def is_lost(self) -> bool:
        """Whether another worker may have it: this one could not say for too long that it is alive."""
        return self._lost.is_set() or time.monotonic() - self._seen > _LOSSES_SHARE * self._grace_seconds

    def report(self, step: int, value: float) -> bool:
        """Tell how good the trial is after so many frames; whether it should be pruned.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: this worker has fallen silent.
        """
        if self.is_lost:
            raise TrialLost(f"trial {self.number}: this worker could not say in time that it is alive")
        if step in self._reported:  # by the attempt before
            return False
        self._study._database.patiently(
            lambda: self._study._storage.set_trial_intermediate_value(self.trial_id, step, value)
        )
        self._reported.add(step)
        return self._study._database.patiently(partial(self._study._should_prune, self.trial_id))

    def finish(self, outcome: TrialOutcome, value: float | None = None, reason: str = "") -> None:
        """The trial is done.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: it is another worker's, or was taken back.
        """
        self._study._database.patiently(partial(self._study._end, self, outcome, value, reason))

    def release(self) -> None:
        """Give the trial back, to be gone on with.

        Raises:
            DatabaseError, TrialLost: as `finish`.
        """
        self._study._database.patiently(partial(self._study._end, self, "released", None, ""))

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._grace_seconds / 6):
            began = time.monotonic()
            try:
                self._study._beat(self)
            except TrialLost:
                self._lost.set()
                return
            except Exception as error:  # the database is away; should it stay so, the trial counts as lost
                _log.debug("trial %d: no heartbeat: %s", self.number, error)
            else:
                self._seen = began
        self._study._storage.remove_session()
