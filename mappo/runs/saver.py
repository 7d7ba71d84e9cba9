"""Saving off the training thread: a checkpoint is handed over, and training goes on.

At most two checkpoints wait: the newest, and the best if that is another. When training is faster than the store,
or the store fails, a newer one takes the place of the older: that is counted and said, memory stays bounded, and
training is not held up. What could not be saved is tried again until there is something newer.
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
    """What became of the checkpoints that this attempt handed over to be saved."""

    num_saves: int = 0
    num_failed_saves: int = 0
    num_skipped_saves: int = 0


@dataclass(frozen=True)
class SaveResult:
    """What became of one checkpoint: saved, a try that failed, or given up for a newer one.

    seconds is what that took beside training; size_bytes that of all its parts.
    """

    outcome: Literal["saved", "failed", "skipped"]
    seconds: float = 0.0
    size_bytes: int = 0


_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_WARNINGS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0


class Saver:
    """A thread that saves an attempt's checkpoints, the newest and the best first of all."""

    def __init__(self, attempt: Attempt, on_save: Callable[[SaveResult], object] = lambda _: None):
        """`on_save` hears what became of each checkpoint, in the thread that saves or the one that hands over."""
        self._attempt, self._on_save = attempt, on_save
        self._changed = threading.Condition()
        self._waiting: list[Checkpoint] = []  # oldest first
        self._current: Checkpoint | None = None  # is being saved
        self._counts = SaveCounts()
        self._closing = False
        self._error: StoreError | None = None  # of the latest try; None when that went well
        self._ended: BaseException | None = None  # why the thread saves no more
        self._warned = -_SECONDS_BETWEEN_WARNINGS
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    @property
    def counts(self) -> SaveCounts:
        """What became of the checkpoints so far."""
        return self._counts

    def save(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint over; it must not change any more.

        Raises:
            Superseded: a later attempt trains this run.
        """
        with self._changed:
            if self._ended:
                raise self._ended
            self._wait([*self._waiting, checkpoint])

    def close(self, patience_seconds: float) -> None:
        """Wait until everything is saved.

        Raises:
            Superseded: a later attempt trains this run.
            NotSaved: something is still not saved after `patience_seconds`; the message gives the cause.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self._unsaved(), patience_seconds)
            if unsaved := self._unsaved():
                iterations = ", ".join(str(checkpoint.iteration) for checkpoint in unsaved)
                place = self._attempt.run.store.location
                cause = self._error or f"{place}: no answer within {patience_seconds:.0f} s"
                self._ended = self._ended or NotSaved(
                    f"iteration {iterations} is not saved: {cause}", partial(self._rescue, unsaved)
                )
            if self._ended:
                raise self._ended

    def _rescue(self, checkpoints: list[Checkpoint], directory: Path) -> None:
        attempt = self._attempt.elsewhere(directory)
        for checkpoint in checkpoints:
            attempt.save(checkpoint)

    def _unsaved(self) -> list[Checkpoint]:
        return [*([self._current] if self._current else []), *self._waiting]

    def _wait(self, candidates: list[Checkpoint]) -> None:
        """Of checkpoints, oldest first, the newest and the best go on to wait; the others are skipped."""
        best = [checkpoint for checkpoint in candidates[:-1] if checkpoint.is_best][-1:]
        kept = candidates[-1:] if candidates[-1].is_best else [*best, candidates[-1]]
        skipped = len(candidates) - len(kept)
        self._counts = replace(self._counts, num_skipped_saves=self._counts.num_skipped_saves + skipped)
        for _ in range(skipped):
            self._on_save(SaveResult("skipped"))
        self._waiting = kept
        self._changed.notify_all()

    def _work(self) -> None:
        pause = 1.0
        while checkpoint := self._next():
            began = time.monotonic()
            try:
                saved = self._attempt.save(checkpoint)
            except Superseded as error:
                return self._end(error)
            except StoreError as error:
                self._on_save(SaveResult("failed", time.monotonic() - began))
                self._failed(checkpoint, error, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except BaseException as error:  # a defect: training must not go on without saving
                return self._end(error)
            else:
                pause = 1.0
                self._on_save(SaveResult("saved", time.monotonic() - began, self._attempt.size_bytes(saved)))
                self._saved()
        return None

    def _next(self) -> Checkpoint | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._current = self._waiting.pop(0) if self._waiting and not self._ended else None
            return self._current

    def _saved(self) -> None:
        with self._changed:
            if self._error:
                _log.warning("saving works again, after %d failures", self._counts.num_failed_saves)
            self._error = None
            self._counts = replace(self._counts, num_saves=self._counts.num_saves + 1)
            self._current = None
            self._changed.notify_all()

    def _failed(self, checkpoint: Checkpoint, error: StoreError, pause: float) -> None:
        """Let it wait again, unless a newer one does, and pause: until something changes, or is to be closed."""
        with self._changed:
            self._error = error
            self._counts = replace(self._counts, num_failed_saves=self._counts.num_failed_saves + 1)
            if time.monotonic() - self._warned >= _SECONDS_BETWEEN_WARNINGS:
                self._warned = time.monotonic()
                _log.warning("a checkpoint could not be saved, training goes on: %s", error)
            newest, closing = self._waiting[-1:], self._closing
            self._wait([checkpoint, *self._waiting])
            self._current = None
            self._changed.wait_for(
                lambda: self._waiting[-1:] != (newest or [checkpoint]) or self._closing != closing,
                min(pause, 1.0) if closing else pause,
            )

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._ended = error
            self._changed.notify_all()
