"""A run: its attempts and its checkpoints, under one name in a store.

    attempts/0002.json                                           the process that trains, and its start time
    blobs/0002-5f3a9c01/<sha256>.safetensors|json|csv            parts of checkpoints
    checkpoints/0002-5f3a9c01/0000000014-<sha256>.json           manifests, by iteration
    latest.json                                                  the key of the last manifest that was saved

Every start of training under the run's name is an attempt with the next number. An attempt writes the parts of a
checkpoint first and then the manifest that names them, so that a checkpoint exists as a whole or not at all. An
attempt writes only under its own number, and stops when it finds a later attempt. The newest checkpoint is the
last iteration of the last attempt that has one.
"""

import logging
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from mappo.errors import CheckpointError, KeyMissing, NoCheckpoint, StoreError, TooLarge
from mappo.runs.attempt_notes import AttemptNotes
from mappo.runs.checkpoint import (
    MAX_MANIFEST_BYTES,
    MAX_PART_BYTES,
    PARTS,
    Checkpoint,
    Manifest,
    PartName,
    manifest_bytes,
    parse_manifest,
    unpack,
    verify,
)
from mappo.runs.checkpoint_ref import CheckpointRef, best_of, newest_first, select_prunable
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.locations import open_store
from mappo.runs.segments import SharedFile, read_rows, walk
from mappo.runs.store import OnRequest, Store, ignore_request

_log = logging.getLogger(__name__)
KEEP_CHECKPOINTS = 3
HINT = "latest.json"
_HINT = TypeAdapter(dict[str, str])
_OLD_MANIFEST = "checkpoint.json"  # the key in format 2
_DOWNLOADS = 3
_UNFINISHED = re.compile(r"((attempts|blobs|checkpoints)/.*)?[^/]+\.partial-[0-9a-f]+|attempts/probe-[0-9a-f]+")
POLICY_PARTS: tuple[PartName, ...] = ("networks",)


def load_checkpoint(location: str | Path, which: str = "best", parts: Collection[PartName] = PARTS) -> Checkpoint:
    """Load a checkpoint of a run: `best`, `last` or the number of an iteration; of its parts, only those named.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        StoreError: the store does not answer.
    """
    run = Run.at(location)
    return run.load(run.choose(which), parts)


class Run:
    """The checkpoints of a run: read them, choose one, and find those to delete. Only an `Attempt` writes any."""

    def __init__(self, store: Store):
        self.store = store
        self.attempts = AttemptNotes(store)

    @classmethod
    def at(
        cls, location: str | Path, patience_seconds: float = 60.0, on_request: OnRequest = ignore_request
    ) -> "Run":
        """Return the run in a directory or below `s3://bucket/prefix`; it need not exist yet."""
        return cls(open_store(str(location), patience_seconds, on_request))

    def refs(self) -> list[CheckpointRef]:
        """Return the references to all checkpoints, the newest first.

        Raises:
            StoreError: the store does not answer.
        """
        return newest_first([*self.listed_refs(), self._hinted_ref()])

    def manifest(self, ref: CheckpointRef) -> Manifest:
        """Read and verify the manifest of a checkpoint.

        Raises:
            CheckpointError: the manifest is missing, damaged, or cannot be parsed by this version.
        """
        return parse_manifest(self._verified(ref.key, MAX_MANIFEST_BYTES, ref.sha256), self._location(ref))

    def load(self, ref: CheckpointRef, parts: Collection[PartName] = PARTS) -> Checkpoint:
        """Read and verify a checkpoint, or only the named parts of it, so that damage to others does not matter.

        Raises:
            CheckpointError: a part is missing, damaged or too large, or cannot be parsed by this version.
        """
        return unpack(
            self.manifest(ref),
            lambda name, limit, sha256: self._verified(ref.blob(name), limit, sha256),
            self._location(ref),
            parts,
        )

    def choose(self, which: str = "best") -> CheckpointRef:
        """Return the checkpoint that `which` names: `best`, `last` or the number of an iteration.

        The best has the highest return in the evaluations during training. If no checkpoint was evaluated, the
        best is the last.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        refs = self.refs()
        if not refs:
            raise NoCheckpoint(self._why_empty())
        if which == "last":
            return refs[0]
        if which == "best":
            readable = self.readable(refs)
            return best_of(readable) if readable else refs[0]  # loading this one raises the cause
        for ref in refs:
            if str(ref.iteration) == which:
                return ref
        iterations = ", ".join(str(ref.iteration) for ref in sorted(refs, key=lambda ref: ref.iteration))
        raise NoCheckpoint(
            f"{self.store.location}: no checkpoint {which!r}: give best, last, or one of iterations {iterations}"
        )

    def export(self, ref: CheckpointRef, directory: Path) -> None:
        """Copy one checkpoint into a directory, which is then a run with this checkpoint alone.

        Content that the directory already has is deleted. A damaged part that no policy needs, or a damaged file
        of the history, is left out with a warning.
        """
        if directory.exists():
            shutil.rmtree(directory)
        target = DirectoryStore(directory)
        manifest = self.manifest(ref)
        for name, part in manifest.parts.items():
            key = ref.blob(manifest.file_name(name))
            try:
                target.write(key, self._verified(key, part.size_bytes, part.sha256))
            except CheckpointError as error:
                if name in POLICY_PARTS:
                    raise
                _log.warning("the copy of %s has no %s: %s", ref, name, error)
        for file in walk(manifest.earlier_rows, self._verified, _warn_of_lost_rows):
            try:
                target.write(file.key, self._verified(file.key, file.size_bytes, file.sha256))
            except CheckpointError as error:
                _warn_of_lost_rows(error)
        target.write(ref.key, manifest_bytes(manifest))

    def earlier_rows(self, index: SharedFile | None, is_strict: bool = False) -> Iterator[str]:
        """Yield the rows of a history below an index, as CSV without a header, the oldest first.

        For each file that cannot be read, log a warning and leave its rows out.

        Raises:
            CheckpointError: a file cannot be read, and `is_strict`.
        """
        return read_rows(index, self._verified, _refuse_lost_rows if is_strict else _warn_of_lost_rows)

    def whole_history(self, checkpoint: Checkpoint) -> str:
        """Return all rows of a checkpoint's history as CSV, but those that cannot be read."""
        if not checkpoint.earlier_rows:
            return checkpoint.history
        header, _, rows = checkpoint.history.partition("\n")
        return "".join([f"{header}\n", *self.earlier_rows(checkpoint.earlier_rows), rows])

    def history_text(self, ref: CheckpointRef, manifest: Manifest) -> str:
        """Return the history of a checkpoint as CSV: its last rows. No other part is read, and no torch is needed.

        Raises:
            CheckpointError: the part is missing, damaged or too large.
        """
        part = manifest.parts["history"]
        if part.size_bytes > MAX_PART_BYTES["history"]:
            raise CheckpointError(
                f"{self._location(ref)}: the history has {part.size_bytes} bytes, too many to read"
            )
        content = self._verified(ref.blob(manifest.file_name("history")), part.size_bytes, part.sha256)
        return content.decode(errors="replace")

    def readable(self, refs: Iterable[CheckpointRef]) -> dict[CheckpointRef, Manifest]:
        """Return the manifests that can be read, by reference. For each other manifest, log the reason."""
        return {ref: manifest for ref in refs if (manifest := self.readable_manifest(ref))}

    def prunable(self, keep: int = KEEP_CHECKPOINTS) -> list[CheckpointRef]:
        """Return all checkpoints that can be read, but the newest `keep` and the best."""
        return select_prunable(self.readable(self.refs()), keep)

    def garbage(
        self, grace_seconds: float, known: Mapping[CheckpointRef, Manifest | None] = MappingProxyType({})
    ) -> list[str]:
        """Return the keys that no checkpoint needs, such as parts of a save that a crash interrupted.

        Keys that were written within the last `grace_seconds` are not garbage, since a save may be in progress.
        If a manifest cannot be read, no part of its attempt is garbage; if an index of earlier rows cannot be
        read, no part of any attempt is. known: manifests that were read before; None for one that cannot be
        read.
        """
        entries = self.store.entries()  # one listing shows parts and manifests, so that no part lacks its manifest
        listed = newest_first([*(CheckpointRef.from_key(entry.key) for entry in entries), self._hinted_ref()])
        manifests = {**known, **{ref: self.readable_manifest(ref) for ref in listed if ref not in known}}
        readable = {ref: manifest for ref, manifest in manifests.items() if manifest}
        needed = {key for ref, manifest in readable.items() for key in ref.blobs(manifest)}
        damage: list[CheckpointError] = []
        for index in {manifest.earlier_rows for manifest in readable.values()}:
            needed |= {file.key for file in walk(index, self._verified, damage.append)}
        unreadable_attempts = {ref.attempt_id for ref in manifests if ref not in readable}
        newest_seconds = time.time() - grace_seconds
        return [
            entry.key
            for entry in entries
            if entry.modified < newest_seconds
            and entry.key not in needed
            and (_UNFINISHED.fullmatch(entry.key) or (entry.key.startswith("blobs/") and not damage))
            and not any(f"/{attempt_id}/" in entry.key for attempt_id in unreadable_attempts)
        ]

    def listed_refs(self) -> list[CheckpointRef | None]:
        return [CheckpointRef.from_key(entry.key) for entry in self.store.entries("checkpoints/")]

    def last_attempt(self) -> int:
        """Return the highest number of an attempt with a readable note or checkpoint; 0 if there is none."""
        noted = next((number for number, _ in self.attempts.from_number(1)), 0)
        saved = (ref.attempt for ref in self.refs() if ref.attempt > noted and self.readable_manifest(ref))
        return max(noted, next(saved, 0))

    def _hinted_ref(self) -> CheckpointRef | None:
        """Return the checkpoint that latest.json names, which a listing may not show yet."""
        try:
            hint = _HINT.validate_json(self.store.read(HINT, 1000))
            ref = CheckpointRef.from_key(hint.get("checkpoint", ""))
            if ref:
                self.store.read(ref.key, MAX_MANIFEST_BYTES)  # the checkpoint may have been pruned since
            return ref
        except (StoreError, ValidationError):  # a hint is no more than that
            return None

    def readable_manifest(self, ref: CheckpointRef) -> Manifest | None:
        """Return the manifest of a checkpoint; log a warning and return None if it cannot be read."""
        try:
            return self.manifest(ref)
        except CheckpointError as error:
            _log.warning("%s", error)
            return None

    def _verified(self, key: str, max_bytes: int, sha256: str) -> bytes:
        """Read an entry and verify its hash; repeat the download if it was damaged on the way."""
        for download in range(1, _DOWNLOADS + 1):
            try:
                return verify(self.store.read(key, max_bytes), sha256, f"{self.store.location}/{key}")
            except (KeyMissing, TooLarge) as error:
                raise CheckpointError(str(error)) from error
            except CheckpointError:
                if download == _DOWNLOADS:
                    raise
        raise AssertionError

    def _location(self, ref: CheckpointRef) -> str:
        return f"{self.store.location}/{ref.key}"

    def _why_empty(self) -> str:
        try:
            self.store.read(_OLD_MANIFEST, MAX_MANIFEST_BYTES)
        except StoreError:
            return f"{self.store.location}: there is no checkpoint of a run here"
        return f"{self.store.location}: a checkpoint of format 2, this version reads 3; train again"


def _warn_of_lost_rows(error: CheckpointError) -> None:
    _log.warning("rows of the history are lost: %s", error)


def _refuse_lost_rows(error: CheckpointError) -> None:
    raise error
