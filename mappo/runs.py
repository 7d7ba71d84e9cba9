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
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mappo.checkpoint import (
    MAX_MANIFEST_BYTES,
    Checkpoint,
    CheckpointError,
    Manifest,
    manifest_bytes,
    pack,
    parse_manifest,
    sha256_of,
    unpack,
    verify,
)
from mappo.storage import (
    DirectoryStore,
    KeyMissing,
    KeyTaken,
    OnRequest,
    Store,
    StoreError,
    TooLarge,
    honours_conditions,
    ignore_request,
    open_store,
)

_log = logging.getLogger(__name__)
KEEP_CHECKPOINTS = 3
_CHECKPOINT = re.compile(r"checkpoints/((\d{4,9})-[0-9a-f]{8})/(\d{10})-([0-9a-f]{64})\.json")
_ATTEMPT = re.compile(r"attempts/(\d{4,9})\.json")
_HINT = "latest.json"
_OLD_MANIFEST = "checkpoint.json"  # of format 2
_DOWNLOADS = 3


class Superseded(StoreError):
    """A later attempt trains this run; what this one does no longer counts."""


@dataclass(frozen=True)
class Saved:
    """The place of a checkpoint in its run."""

    key: str
    attempt_id: str
    attempt: int
    iteration: int
    sha256: str

    @classmethod
    def at(cls, key: str) -> "Saved | None":
        """What a key names, if it is that of a checkpoint."""
        match = _CHECKPOINT.fullmatch(key)
        return cls(key, match[1], int(match[2]), int(match[3]), match[4]) if match else None

    def blob(self, file_name: str) -> str:
        """The key of one of its parts."""
        return f"blobs/{self.attempt_id}/{file_name}"

    def blobs(self, manifest: Manifest) -> set[str]:
        """The keys of all its parts."""
        return {self.blob(manifest.file_name(part)) for part in manifest.parts}

    def __str__(self) -> str:
        return f"iteration {self.iteration} of attempt {self.attempt}"


def load(location: str | Path, which: str = "best") -> Checkpoint:
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

    def saved(self) -> list[Saved]:
        """All checkpoints, the newest first.

        Raises:
            StoreError: the store does not answer.
        """
        return _newest_first([*self._listed(), self._hinted()])

    def manifest(self, saved: Saved) -> Manifest:
        """What a checkpoint says of itself.

        Raises:
            CheckpointError: damaged or not to be understood.
        """
        return parse_manifest(self._verified(saved.key, MAX_MANIFEST_BYTES, saved.sha256), self._place(saved))

    def load(self, saved: Saved) -> Checkpoint:
        """All of a checkpoint, verified.

        Raises:
            CheckpointError: damaged, too large, or not to be understood.
        """
        return unpack(
            self.manifest(saved),
            lambda name, limit, sha256: self._verified(saved.blob(name), limit, sha256),
            self._place(saved),
        )

    def choose(self, which: str = "best") -> Saved:
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

    def claim(self, keep: int = KEEP_CHECKPOINTS) -> "Attempt":
        """Begin the next attempt; those before it stop when they notice.

        Raises:
            StoreError: the store cannot be reached, written to, or does not give back what was written.
        """
        conditional = honours_conditions(self.store, "attempts/")
        if not conditional:
            _log.warning(
                "%s ignores conditional writes; two trainings that start under one name in the same moment notice "
                "each other only when they save",
                self.store.location,
            )
        token = secrets.token_hex(4)
        claim = {"token": token, "host": socket.gethostname(), "process": os.getpid(), "started": time.time()}
        while True:
            number = max(self._attempts(), default=0) + 1
            try:
                self.store.create(_attempt_key(number), json.dumps(claim).encode())
            except KeyTaken:
                continue
            return Attempt(self, number, token, conditional, keep)

    def export(self, saved: Saved, directory: Path) -> None:
        """Copy one checkpoint into a directory of its own, which is then a run with one checkpoint."""
        if directory.exists():
            shutil.rmtree(directory)
        target = DirectoryStore(directory)
        manifest = self.manifest(saved)
        for name, part in manifest.parts.items():
            key = saved.blob(manifest.file_name(name))
            target.write(key, self._verified(key, part.size_bytes, part.sha256))
        target.write(saved.key, manifest_bytes(manifest))

    def readable(self, saved: Iterable[Saved]) -> dict[Saved, Manifest]:
        """The manifests of those that can be read; of the others it is logged why not."""
        return {place: manifest for place in saved if (manifest := self._manifest_or_none(place))}

    def prunable(self, keep: int = KEEP_CHECKPOINTS) -> list[Saved]:
        """The checkpoints that are neither among the last `keep` nor the best."""
        return _superfluous(self.readable(self.saved()), keep)

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

    def _listed(self) -> list[Saved | None]:
        return [Saved.at(entry.key) for entry in self.store.entries("checkpoints/")]

    def _attempts(self) -> list[int]:
        matches = (_ATTEMPT.fullmatch(entry.key) for entry in self.store.entries("attempts/"))
        return [int(match[1]) for match in matches if match]

    def _hinted(self) -> Saved | None:
        """What the last save left a note of, in case a listing does not show it yet."""
        try:
            hint = json.loads(self.store.read(_HINT, 1000))
            saved = Saved.at(str(hint["checkpoint"]))
            if saved:
                self.store.read(saved.key, MAX_MANIFEST_BYTES)
            return saved
        except (KeyMissing, ValueError, TypeError, KeyError):
            return None

    def _manifest_or_none(self, saved: Saved) -> Manifest | None:
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

    def _place(self, saved: Saved) -> str:
        return f"{self.store.location}/{saved.key}"

    def _why_empty(self) -> str:
        try:
            self.store.read(_OLD_MANIFEST, MAX_MANIFEST_BYTES)
        except StoreError:
            return f"{self.store.location}: there is no checkpoint of a run here"
        return (
            f"{self.store.location}: a checkpoint of format 2, this version reads 3; train again, or use mappo 0.2"
        )


@dataclass
class Attempt:
    """One process training a run: what saves its checkpoints, and tidies up behind itself."""

    run: Run
    number: int
    token: str
    conditional: bool
    keep: int = KEEP_CHECKPOINTS
    fenced: bool = True  # stops when a later attempt has begun
    _known: dict[Saved, Manifest | None] = field(default_factory=dict)  # None: cannot be read

    @property
    def id(self) -> str:
        """What its keys begin with; unique also where two attempts got one number."""
        return f"{self.number:04d}-{self.token}"

    def save(self, checkpoint: Checkpoint) -> Saved:
        """Write a checkpoint; it counts once its manifest is there. Doing it again is harmless.

        Raises:
            Superseded: a later attempt has begun.
            StoreError: the store failed, before or after the checkpoint counted.
        """
        store = self.run.store
        manifest, parts = pack(checkpoint)
        content = manifest_bytes(manifest)
        for name, part in parts.items():
            store.write(f"blobs/{self.id}/{name}", part)
        self._require_current()
        sha256 = sha256_of(content)
        saved = Saved.at(f"checkpoints/{self.id}/{checkpoint.iteration:010d}-{sha256}.json")
        assert saved
        store.create(saved.key, content)
        store.write(_HINT, json.dumps({"checkpoint": saved.key}).encode())
        self._tidy(saved, manifest)
        return saved

    def size_bytes(self, saved: Saved) -> int:
        """That of a checkpoint which this attempt has saved and not deleted."""
        manifest = self._known.get(saved)
        return manifest.size_bytes if manifest else 0

    def elsewhere(self, directory: Path) -> "Attempt":
        """The same attempt in a directory, whose content can be copied into the run's store as it is."""
        return replace(self, run=Run(DirectoryStore(directory)), fenced=False, _known={})

    def _require_current(self) -> None:
        if not self.fenced:
            return
        latest = max(self.run._attempts(), default=0)
        if latest == self.number and self.conditional:
            return
        try:
            claim = json.loads(self.run.store.read(_attempt_key(latest), 10_000))
        except (KeyMissing, ValueError) as error:
            raise Superseded(
                f"{self.run.store.location}: the note of attempt {latest} is gone: {error}"
            ) from error
        if latest != self.number or claim["token"] != self.token:
            raise Superseded(
                f"{self.run.store.location}: attempt {latest} of this run has begun on {claim['host']} (process "
                f"{claim['process']}); this one, attempt {self.number}, stops"
            )

    def _tidy(self, saved: Saved, manifest: Manifest) -> None:
        """Keep the last checkpoints and the best; what the others had goes with them."""
        if not self._known:  # from here on, this attempt is the only one to write
            self._known = {place: self.run._manifest_or_none(place) for place in filter(None, self.run._listed())}
        self._known[saved] = manifest
        newest_first = {place: self._known[place] for place in _newest_first(self._known)}
        readable = {place: known for place, known in newest_first.items() if known}
        superfluous = _superfluous(readable, self.keep)
        needed = {
            key for place, known in readable.items() if place not in superfluous for key in place.blobs(known)
        }
        for place in superfluous:
            self.run.store.delete(place.key)
            for key in sorted(place.blobs(readable[place]) - needed):
                self.run.store.delete(key)
            del self._known[place]


def best_of(manifests: dict[Saved, Manifest]) -> Saved:
    """The checkpoint with the highest return in evaluation, the earliest of equals; without any, the last."""
    evaluated = {
        place: manifest.selection_return
        for place, manifest in manifests.items()
        if manifest.selection_return is not None
    }
    if not evaluated:
        return next(iter(manifests))
    return max(evaluated, key=lambda place: (evaluated[place], -place.iteration, place.attempt))


def _superfluous(readable: dict[Saved, Manifest], keep: int) -> list[Saved]:
    """Of checkpoints, the newest first: all but the first `keep` and the best."""
    best = best_of(readable) if readable else None
    return [place for place in list(readable)[max(keep, 1) :] if place != best]


def _newest_first(found: Iterable[Saved | None]) -> list[Saved]:
    distinct = {saved for saved in found if saved}
    return sorted(distinct, key=lambda saved: (saved.attempt, saved.iteration, saved.key), reverse=True)


def _is_disposable(key: str) -> bool:
    """Parts, probes and files that were never finished; not attempts, manifests, hints, nor what is not ours."""
    folder, _, name = key.rpartition("/")
    ours = folder.partition("/")[0] in ("attempts", "blobs", "checkpoints")
    return key.startswith("blobs/") or (ours and (".partial-" in name or name.startswith("probe-")))


def _attempt_key(number: int) -> str:
    return f"attempts/{number:04d}.json"
