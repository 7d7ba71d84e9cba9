"""A run: its attempts and its checkpoints, under one name in a store.

    attempts/0002.json                                           who trains, and since when
    blobs/0002-5f3a9c01/<sha256>.safetensors|json|csv            parts of checkpoints
    checkpoints/0002-5f3a9c01/0000000014-<sha256>.json           manifests, by iteration
    latest.json                                                  a hint

Every start of training under the run's name is an attempt with the next number. Parts come first, then the
manifest that names them, so that a checkpoint is either there as a whole or not at all. An attempt writes only
under its own number; one that finds a later attempt stops. What is newest is decided by attempt first, then by
iteration.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from mappo.errors import CheckpointError, KeyMissing, StoreError, TooLarge
from mappo.runs.checkpoint import (
    MAX_MANIFEST_BYTES,
    Checkpoint,
    Manifest,
    manifest_bytes,
    parse_manifest,
    unpack,
    verify,
)
from mappo.runs.checkpoint_ref import CheckpointRef, best_of, newest_first, superfluous
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.locations import open_store
from mappo.runs.store import OnRequest, Store, ignore_request

_log = logging.getLogger(__name__)
KEEP_CHECKPOINTS = 3
_ATTEMPT = re.compile(r"attempts/(\d{4,9})\.json")
HINT = "latest.json"
_OLD_MANIFEST = "checkpoint.json"  # of format 2
_DOWNLOADS = 3


def load_checkpoint(location: str | Path, which: str = "best") -> Checkpoint:
    """A run's checkpoint: `best`, `last` or an iteration.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StoreError: the store does not answer.
    """
    run = Run.at(location)
    return run.load(run.choose(which))


class Run:
    """A run's checkpoints, to read and to tidy up. `claim` is what writes."""

    def __init__(self, store: Store):
        self.store = store

    @classmethod
    def at(
        cls, location: str | Path, patience_seconds: float = 60.0, on_request: OnRequest = ignore_request
    ) -> "Run":
        """The run in a directory or below `s3://bucket/prefix`; it need not be there yet."""
        return cls(open_store(str(location), patience_seconds, on_request))

    def saved(self) -> list[CheckpointRef]:
        """All checkpoints, the newest first.

        Raises:
            StoreError: the store does not answer.
        """
        return newest_first([*self.listed(), self._hinted()])

    def manifest(self, saved: CheckpointRef) -> Manifest:
        """What a checkpoint says of itself.

        Raises:
            CheckpointError: damaged or not to be understood.
        """
        return parse_manifest(self._verified(saved.key, MAX_MANIFEST_BYTES, saved.sha256), self._place(saved))

    def load(self, saved: CheckpointRef) -> Checkpoint:
        """All of a checkpoint, verified.

        Raises:
            CheckpointError: damaged, too large, or not to be understood.
        """
        return unpack(
            self.manifest(saved),
            lambda name, limit, sha256: self._verified(saved.blob(name), limit, sha256),
            self._place(saved),
        )

    def choose(self, which: str = "best") -> CheckpointRef:
        """The checkpoint meant by `best`, `last` or the number of an iteration.

        The best has the highest return in the evaluations during training; where there were none, it is the last.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        saved = self.saved()
        if not saved:
            raise CheckpointError(self._why_empty())
        if which == "last":
            return saved[0]
        if which == "best":
            readable = self.readable(saved)
            return best_of(readable) if readable else saved[0]  # loading that one says what is wrong
        for place in saved:
            if str(place.iteration) == which:
                return place
        there = ", ".join(str(place.iteration) for place in sorted(saved, key=lambda place: place.iteration))
        raise CheckpointError(
            f"{self.store.location}: no checkpoint {which!r}: give best, last, or one of iterations {there}"
        )

    def export(self, saved: CheckpointRef, directory: Path) -> None:
        """Copy one checkpoint into a directory of its own, which is then a run with one checkpoint."""
        if directory.exists():
            shutil.rmtree(directory)
        target = DirectoryStore(directory)
        manifest = self.manifest(saved)
        for name, part in manifest.parts.items():
            key = saved.blob(manifest.file_name(name))
            target.write(key, self._verified(key, part.size_bytes, part.sha256))
        target.write(saved.key, manifest_bytes(manifest))

    def readable(self, saved: Iterable[CheckpointRef]) -> dict[CheckpointRef, Manifest]:
        """The manifests of those that can be read; of the others it is logged why not."""
        return {place: manifest for place in saved if (manifest := self.readable_manifest(place))}

    def prunable(self, keep: int = KEEP_CHECKPOINTS) -> list[CheckpointRef]:
        """The checkpoints that are neither among the last `keep` nor the best."""
        return superfluous(self.readable(self.saved()), keep)

    def garbage(self, grace_seconds: float) -> list[str]:
        """Keys of what no checkpoint needs, such as parts of saves that a crash cut short; none that are younger.

        Parts of an attempt that has a manifest which cannot be read are not garbage.
        """
        saved = self.saved()
        readable = self.readable(saved)
        needed = {key for place, manifest in readable.items() for key in place.blobs(manifest)}
        unsure = {place.attempt_id for place in saved if place not in readable}
        oldest = time.time() - grace_seconds
        return [
            entry.key
            for entry in self.store.entries()
            if entry.modified < oldest
            and entry.key not in needed
            and _is_disposable(entry.key)
            and not any(f"/{attempt_id}/" in entry.key for attempt_id in unsure)
        ]

    def listed(self) -> list[CheckpointRef | None]:
        return [CheckpointRef.at(entry.key) for entry in self.store.entries("checkpoints/")]

    def attempt_numbers(self) -> list[int]:
        matches = (_ATTEMPT.fullmatch(entry.key) for entry in self.store.entries("attempts/"))
        return [int(match[1]) for match in matches if match]

    def _hinted(self) -> CheckpointRef | None:
        """What the last save left a note of, in case a listing does not show it yet."""
        try:
            hint = json.loads(self.store.read(HINT, 1000))
            saved = CheckpointRef.at(str(hint["checkpoint"]))
            if saved:
                self.store.read(saved.key, MAX_MANIFEST_BYTES)
            return saved
        except (KeyMissing, ValueError, TypeError, KeyError):
            return None

    def readable_manifest(self, saved: CheckpointRef) -> Manifest | None:
        try:
            return self.manifest(saved)
        except CheckpointError as error:
            _log.warning("%s", error)
            return None

    def _verified(self, key: str, max_bytes: int, sha256: str) -> bytes:
        """An entry with this hash; a download that has another is repeated, it may have been the way here."""
        for download in range(1, _DOWNLOADS + 1):
            try:
                return verify(self.store.read(key, max_bytes), sha256, f"{self.store.location}/{key}")
            except (KeyMissing, TooLarge) as error:
                raise CheckpointError(str(error)) from error
            except CheckpointError:
                if download == _DOWNLOADS:
                    raise
        raise AssertionError

    def _place(self, saved: CheckpointRef) -> str:
        return f"{self.store.location}/{saved.key}"

    def _why_empty(self) -> str:
        try:
            self.store.read(_OLD_MANIFEST, MAX_MANIFEST_BYTES)
        except StoreError:
            return f"{self.store.location}: there is no checkpoint of a run here"
        return (
            f"{self.store.location}: a checkpoint of format 2, this version reads 3; train again, or use mappo 0.2"
        )


def _is_disposable(key: str) -> bool:
    """Parts, probes and files that were never finished; not attempts, manifests, hints, nor what is not ours."""
    folder, _, name = key.rpartition("/")
    ours = folder.partition("/")[0] in ("attempts", "blobs", "checkpoints")
    return key.startswith("blobs/") or (ours and (".partial-" in name or name.startswith("probe-")))


def attempt_key(number: int) -> str:
    return f"attempts/{number:04d}.json"
