"""A claim: one worker's exclusive hold of a trial, kept by heartbeats."""

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
# Share of the grace period. A worker that could not send a heartbeat for so long gives its trial up. The share is
# below 1, so that this worker stops before another worker may claim the trial.
_LOST_SHARE = 0.6


class Claim:
    """A trial that one worker holds. As a context manager, the claim sends heartbeats from a thread.

    The block must end the trial with `finish` or `release`. Otherwise the heartbeats stop with the block, and the
    study requeues the trial after the grace period.
    """

    def __init__(self, study: "Study", trial: optuna.Trial, worker: str, values: dict[str, Any]):
        self.number, self.worker, self.values = trial.number, worker, values
        self.trial_id = trial._trial_id
        self._study = study
        self._reported = set(study._storage.get_trial(self.trial_id).intermediate_values)
        self._grace_seconds = study.plan.tuning.grace_seconds
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._last_heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._send_heartbeats, name=f"trial {self.number}", daemon=True)

    def __enter__(self) -> "Claim":
        """Start the heartbeats."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeats."""
        self._stop.set()
        self._thread.join(timeout=5)

    @property
    def is_lost(self) -> bool:
        """Return whether another worker may hold the trial, because this worker sent no heartbeat in time."""
        silent_seconds = time.monotonic() - self._last_heartbeat
        return self._lost.is_set() or silent_seconds > _LOST_SHARE * self._grace_seconds

    def report_frames(self, frames: int, value: float) -> bool:
        """Report the trial's value after `frames` frames of training, summed over its training seeds so far.

        Return whether the pruner ends the trial. If an earlier turn reported these frames, its value stays.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: this worker sent no heartbeat in time.
        """
        return self._report(frames, value)

    def report_seed(self, index: int, value: float) -> bool:
        """Report the value of one training seed, by its `index` counted from 0. Only the wilcoxon pruner uses it.

        Return whether the pruner ends the trial. If an earlier turn reported this seed, its value stays.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: this worker sent no heartbeat in time.
        """
        return self._report(index, value)

    def finish(self, outcome: TrialOutcome, value: float | None = None, reason: str = "") -> None:
        """End the trial with this outcome; `value` belongs to a complete trial.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: another worker holds the trial, or the study has requeued it.
        """
        self._study._database.retry(partial(self._study._end, self, outcome, value, reason))

    def release(self) -> None:
        """Release the trial, so that any worker can continue it.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: another worker holds the trial, or the study has requeued it.
        """
        self._study._database.retry(partial(self._study._end, self, "released", None, ""))

    def _report(self, step: int, value: float) -> bool:
        if self.is_lost:
            raise TrialLost(f"trial {self.number}: this worker sent no heartbeat in time")
        if step in self._reported:  # an earlier turn reported this step
            return False
        self._study._database.retry(
            lambda: self._study._storage.set_trial_intermediate_value(self.trial_id, step, value)
        )
        self._reported.add(step)
        return self._study._database.retry(partial(self._study._should_prune, self.trial_id))

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(self._grace_seconds / 6):
            started = time.monotonic()  # before the request: a slow request must not make the heartbeat look newer
            try:
                self._study._heartbeat(self)
            except TrialLost:
                self._lost.set()
                return
            except Exception as error:  # the database is away; if it stays away, `is_lost` becomes true
                _log.debug("trial %d: no heartbeat: %s", self.number, error)
            else:
                self._last_heartbeat = started
        self._study._storage.remove_session()
