"""A claim: one worker's exclusive hold of a trial, kept by heartbeats and ended by a time limit."""

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import optuna

from mappo.errors import TrialLost, TrialOverdue
from mappo.tuning.trial import TrialOutcome

if TYPE_CHECKING:
    from mappo.tuning.study import Study

_STDERR = 2
_log = logging.getLogger(__name__)
# Share of the grace period. A worker that could not send a heartbeat for so long gives its trial up. The share is
# below 1, so that this worker stops before another worker may claim the trial.
_LOST_SHARE = 0.6


class Claim:
    """A trial that one worker holds. As a context manager, the claim sends heartbeats from a thread.

    The block must end the trial with `finish` or `release`. Otherwise the heartbeats stop with the block, and the
    study requeues the trial after the grace period.

    A block that takes longer than `tuning.trial_hours` is interrupted by `TrialOverdue`. If it has not ended a
    grace period later, because it hangs where Python cannot interrupt it, the thread fails the trial and ends the
    process.
    """

    def __init__(self, study: "Study", trial: optuna.Trial, worker: str, values: dict[str, Any]):
        self.number, self.worker, self.values = trial.number, worker, values
        self.trial, self.trial_id = trial, trial._trial_id
        self._study = study
        self._reported = set(study._storage.get_trial(self.trial_id).intermediate_values)
        self._grace_seconds = study.plan.tuning.grace_seconds
        # Python handles signals in the main thread only.
        self._is_interruptible = threading.current_thread() is threading.main_thread()
        self._limit_seconds = 3600 * study.plan.tuning.trial_hours
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._overdue = threading.Event()
        self._began = self._last_heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._send_heartbeats, name=f"trial {self.number}", daemon=True)

    def __enter__(self) -> "Claim":
        """Start the heartbeats."""
        if self._is_interruptible:
            signal.signal(signal.SIGALRM, self._interrupt)
        # Code that hangs and holds Python's lock stops the thread, too. This timer needs no Python.
        faulthandler.dump_traceback_later(self._limit_seconds + 2 * self._grace_seconds, exit=True, file=_STDERR)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeats. The handler of the signal stays, so that a late signal is harmless."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5)

    @property
    def is_lost(self) -> bool:
        """Return whether another worker may hold the trial, because this worker sent no heartbeat in time."""
        silent_seconds = time.monotonic() - self._last_heartbeat
        return self._lost.is_set() or silent_seconds > _LOST_SHARE * self._grace_seconds

    @property
    def is_overdue(self) -> bool:
        """Return whether the trial has taken longer than its time limit."""
        return self._overdue.is_set()

    @property
    def overdue_reason(self) -> str:
        """The reason for which a trial fails that takes too long."""
        hours = self._study.plan.tuning.trial_hours
        return f"took longer than tuning.trial_hours = {hours:g}, or hung"

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

    def finish(
        self,
        outcome: TrialOutcome,
        value: float | None = None,
        reason: str = "",
        measured: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """End the trial with this outcome; `value` and `measured` belong to a complete trial.

        measured: the means of the measurements that have constraints, by name; None for one that not every episode
        has.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: another worker holds the trial, or the study has requeued it.
        """
        self._study._retry(partial(self._study._end, self, outcome, value, reason, measured))

    def release(self, is_patient: bool = True) -> None:
        """Release the trial, so that any worker can continue it; `is_patient` retries if the database is away.

        Raises:
            DatabaseError: the database does not answer.
            TrialLost: another worker holds the trial, or the study has requeued it.
        """
        self._study._retry(partial(self._study._end, self, "released", None, ""), is_patient)

    def _report(self, step: int, value: float) -> bool:
        if self.is_lost:
            raise TrialLost(f"trial {self.number}: this worker sent no heartbeat in time")
        if step in self._reported:  # an earlier turn reported this step
            return False
        self._study._retry(lambda: self._study._storage.set_trial_intermediate_value(self.trial_id, step, value))
        self._reported.add(step)
        return self._study._retry(partial(self._study._should_prune, self.trial_id))

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(self._grace_seconds / 6):
            overdue_seconds = time.monotonic() - self._began - self._limit_seconds
            if overdue_seconds > 0 and not self.is_overdue:
                self._overdue.set()
                if self._is_interruptible:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            if overdue_seconds > self._grace_seconds:
                self._end_process()
            if not self._lost.is_set():
                self._send_heartbeat()
        self._study._storage.remove_session()

    def _send_heartbeat(self) -> None:
        started = time.monotonic()  # before the request: a slow request must not make the heartbeat look newer
        try:
            self._study._heartbeat(self)
        except TrialLost:
            self._lost.set()
        except Exception as error:  # the database is away; if it stays away, `is_lost` becomes true
            _log.debug("trial %d: no heartbeat: %s", self.number, error)
        else:
            self._last_heartbeat = started

    def _interrupt(self, *_: object) -> None:
        """Raise `TrialOverdue` in the block. Python calls this method in the main thread."""
        if not self._stop.is_set():
            raise TrialOverdue(self.overdue_reason)

    def _end_process(self) -> None:
        """Fail the trial and end this process, whose main thread hangs."""
        _log.error(
            "trial %d: %s; it cannot be interrupted, so this worker ends; the same command continues the study",
            *(self.number, self.overdue_reason),
        )
        try:
            self._study._end(self, "failed", None, self.overdue_reason)
        except Exception as error:  # without heartbeats, the study takes the trial from this worker
            _log.warning("trial %d: cannot be ended: %s", self.number, error)
        os._exit(1)
