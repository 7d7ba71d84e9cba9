"""The saver: it saves checkpoints in a thread of its own, while training continues.

At most two checkpoints wait in its queue: the newest, and the best if that is another one. When training is
faster than the store, or when the store fails, a newer checkpoint replaces an older one in the queue. So memory
stays bounded and training never waits for the store. The replaced checkpoint counts as skipped. A checkpoint
that could not be saved is retried until a newer one replaces it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mappo.errors import NotSaved, StoreError, Superseded
from mappo.runs.attempt import Attempt
from mappo.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class SaveCounts:
    """The numbers of saved and skipped checkpoints of this attempt, and of its tries that failed."""

    num_saves: int = 0
    num_failed_saves: int = 0
    num_skipped_saves: int = 0


@dataclass(frozen=True)
class SaveResult:
    """The result of one try to save a checkpoint: saved, failed, or skipped since a newer one replaced it.

    seconds: the duration of the try, in the saver's thread. size_bytes: the size of all parts.
    """

    outcome: Literal["saved", "failed", "skipped"]
    seconds: float = 0.0
    size_bytes: int = 0


_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_WARNINGS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0
_TIDYING_SECONDS = 10.0  # to wait at the end for the deletion of old checkpoints


class Saver:
    """The thread that saves an attempt's checkpoints. The newest and the best go first."""

    def __init__(self, attempt: Attempt, on_save: Callable[[SaveResult], object] = lambda _: None):
        """Start the thread. `on_save` is called with the result of every try and of every skipped checkpoint.

        The saver's thread calls `on_save`; for a skipped checkpoint, the thread that calls `save` may call it.
        """
        self._attempt, self._on_save = attempt, on_save
        self._changed = threading.Condition()
        self._queue: list[Checkpoint] = []  # oldest first
        self._current: Checkpoint | None = None  # the checkpoint that the thread is saving
        self._counts = SaveCounts()
        self._closing = self._is_tidying = False
        self._error: StoreError | None = None  # the error of the latest try; None if it succeeded
        self._fatal_error: BaseException | None = None  # the reason why the thread has stopped saving
        self._warning_seconds = -_SECONDS_BETWEEN_WARNINGS  # the time of the latest warning
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    @property
    def counts(self) -> SaveCounts:
        """The counts so far."""
        return self._counts

    def save(self, checkpoint: Checkpoint) -> None:
        """Queue a checkpoint and return at once. The caller must not change the checkpoint afterwards.

        Raises:
            Superseded: a later attempt trains this run.
        """
        with self._changed:
            if self._fatal_error:
                raise self._fatal_error
            self._enqueue([*self._queue, checkpoint])

    def close(self, patience_seconds: float) -> None:
        """Wait until all checkpoints of the queue are saved, and then a short time until old ones are deleted.

        Raises:
            Superseded: a later attempt trains this run.
            NotSaved: a checkpoint is still not saved after `patience_seconds`; the message names the cause.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fatal_error or not self._unsaved(), patience_seconds)
            if unsaved := self._unsaved():
                iterations = ", ".join(str(checkpoint.iteration) for checkpoint in unsaved)
                location = self._attempt.run.store.location
                cause = self._error or f"{location}: no answer within {patience_seconds:.0f} s"
                self._fatal_error = self._fatal_error or NotSaved(
                    f"iteration {iterations} is not saved: {cause}", partial(self._rescue, unsaved)
                )
            if self._fatal_error:
                raise self._fatal_error
            self._changed.wait_for(lambda: not self._is_tidying, min(patience_seconds, _TIDYING_SECONDS))

    def _rescue(self, checkpoints: list[Checkpoint], directory: Path) -> None:
        attempt = self._attempt.in_directory(directory)
        for checkpoint in checkpoints:
            attempt.save(checkpoint)

    def _unsaved(self) -> list[Checkpoint]:
        return [*([self._current] if self._current else []), *self._queue]

    def _enqueue(self, candidates: list[Checkpoint]) -> None:
        """Replace the queue by the newest and the best of the candidates, which are ordered from the oldest.

        The other candidates are skipped.
        """
        best = [checkpoint for checkpoint in candidates[:-1] if checkpoint.is_best][-1:]
        queue = candidates[-1:] if candidates[-1].is_best else [*best, candidates[-1]]
        num_skipped = len(candidates) - len(queue)
        self._counts = replace(self._counts, num_skipped_saves=self._counts.num_skipped_saves + num_skipped)
        for _ in range(num_skipped):
            self._on_save(SaveResult("skipped"))
        self._queue = queue
        self._changed.notify_all()

    def _work(self) -> None:
        pause = 1.0
        while checkpoint := self._take():
            start = time.monotonic()
            try:
                ref = self._attempt.save(checkpoint)
                self._on_save(SaveResult("saved", time.monotonic() - start, self._attempt.size_bytes(ref)))
                self._count_save()
                self._attempt.tidy()
                self._end_tidying()
                pause = 1.0
            except Superseded as error:
                return self._stop(error)
            except StoreError as error:
                self._on_save(SaveResult("failed", time.monotonic() - start))
                self._requeue(checkpoint, error, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except BaseException as error:  # a defect: it must end training, which would continue without saving
                return self._stop(error)
        return None

    def _take(self) -> Checkpoint | None:
        """Wait for a checkpoint and take it from the queue; return None when the thread has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._current = self._queue.pop(0) if self._queue and not self._fatal_error else None
            return self._current

    def _count_save(self) -> None:
        with self._changed:
            if self._error:
                _log.warning("saving works again, after %d failures", self._counts.num_failed_saves)
            self._error = None
            self._counts = replace(self._counts, num_saves=self._counts.num_saves + 1)
            self._current, self._is_tidying = None, True
            self._changed.notify_all()

    def _end_tidying(self) -> None:
        with self._changed:
            self._is_tidying = False
            self._changed.notify_all()

    def _requeue(self, checkpoint: Checkpoint, error: StoreError, pause: float) -> None:
        """Requeue a checkpoint unless a newer one waits. Pause until the queue changes or the saver closes."""
        with self._changed:
            self._error = error
            self._counts = replace(self._counts, num_failed_saves=self._counts.num_failed_saves + 1)
            if time.monotonic() - self._warning_seconds >= _SECONDS_BETWEEN_WARNINGS:
                self._warning_seconds = time.monotonic()
                _log.warning("a checkpoint could not be saved; training continues: %s", error)
            newest, closing = self._queue[-1:], self._closing
            self._enqueue([checkpoint, *self._queue])
            self._current = None
            self._changed.wait_for(
                lambda: self._queue[-1:] != (newest or [checkpoint]) or self._closing != closing,
                min(pause, 1.0) if closing else pause,
            )

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._fatal_error, self._is_tidying = error, False
            self._changed.notify_all()
