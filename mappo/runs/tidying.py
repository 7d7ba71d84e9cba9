"""The deletion of checkpoints that a run no longer needs. It never decides whether a checkpoint is saved."""

import logging
import time

from mappo.errors import StoreError
from mappo.runs.checkpoint import Manifest
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first, select_prunable
from mappo.runs.run import Run
from mappo.runs.store import Store

_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 60.0  # after the store refused a deletion; twice as long after each further refusal
_LONGEST_PAUSE_SECONDS = 3600.0
_MAX_WAITING = 1000
_SWEEP_AGE_SECONDS = 24 * 3600.0


class Tidier:
    """The part of an attempt that deletes checkpoints: all but the newest `keep` and the best.

    It deletes the manifests of all attempts, but parts of its own attempt only. It alone knows all
    checkpoints that name these: the listing of another attempt's checkpoints may lack one. Parts that other
    attempts left are deleted when they are a day old. Segments of the history are never deleted while a
    checkpoint needs them.
    """

    def __init__(self, run: Run, attempt_id: str, keep: int):
        self._run, self._attempt_id, self._keep = run, attempt_id, keep
        self._known: dict[CheckpointRef, Manifest | None] = {}  # None: it cannot be read
        self._knows_others = self._has_swept = False
        self._knows_all_own = True
        self.newest: CheckpointRef | None = None
        self._pause_seconds, self._next_seconds = _PAUSE_SECONDS, 0.0

    def add(self, ref: CheckpointRef, manifest: Manifest) -> None:
        """Take note of a checkpoint that the attempt has saved."""
        self._known[ref], self.newest = manifest, ref

    def size_bytes(self, ref: CheckpointRef) -> int:
        """Return the size of a checkpoint; 0 if it is not known, or was deleted."""
        manifest = self._known.get(ref)
        return manifest.size_bytes if manifest else 0

    def tidy(self) -> None:
        """Delete what can be deleted, unless the store has refused that a short time ago."""
        if time.monotonic() < self._next_seconds:
            return
        try:
            self._learn_of_others()
            store = self._run.store.impatient()
            for ref in self._prunable():
                self._delete(store, ref)
            self._sweep(store)
        except StoreError as error:
            self.postpone(error)
            return
        if self._next_seconds:
            _log.warning("deleting works again in %s", self._run.store.location)
        self._pause_seconds, self._next_seconds = _PAUSE_SECONDS, 0.0

    def postpone(self, error: StoreError) -> None:
        """Delay the next try; log the reason if it is the first failure since the last success."""
        if not self._next_seconds:
            _log.warning("old checkpoints are not deleted; training and saving continue: %s", error)
        self._next_seconds = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        self._forget_the_oldest()

    def _learn_of_others(self) -> None:
        """List the checkpoints of earlier attempts, once: from now on, only this attempt writes to the run."""
        if not self._knows_others:
            refs = [ref for ref in self._run.listed_refs() if ref and ref not in self._known]
            self._known |= {ref: self._run.readable_manifest(ref) for ref in refs}
            self._knows_others = True

    def _readable(self) -> dict[CheckpointRef, Manifest]:
        return {ref: manifest for ref in newest_first(self._known) if (manifest := self._known[ref])}

    def _prunable(self) -> list[CheckpointRef]:
        return select_prunable(self._readable(), self._keep)

    def _delete(self, store: Store, ref: CheckpointRef) -> None:
        """Delete a checkpoint: first its manifest, so that no manifest ever names a part that is missing."""
        store.delete(ref.key)
        for key in self._parts_of(ref):
            store.delete(key)
        del self._known[ref]

    def _parts_of(self, ref: CheckpointRef) -> list[str]:
        """Return the keys of the parts that only this checkpoint needs; none if others may need them, too."""
        manifest = self._known[ref]
        if not manifest or ref.attempt_id != self._attempt_id or not self._knows_all_own:
            return []
        others = [(other, known) for other, known in self._known.items() if known and other != ref]
        return sorted(ref.blobs(manifest) - {key for other, known in others for key in other.blobs(known)})

    def _forget_the_oldest(self) -> None:
        """Drop the oldest checkpoints if too many wait: `mappo checkpoints prune` and `gc` delete them."""
        for ref in self._prunable()[_MAX_WAITING:]:
            del self._known[ref]
            self._knows_all_own = False

    def _sweep(self, store: Store) -> None:
        """Delete, once, what earlier attempts left a day ago or before."""
        if not self._has_swept:
            for key in self._run.garbage(_SWEEP_AGE_SECONDS, self._known):
                store.delete(key)
            self._has_swept = True
