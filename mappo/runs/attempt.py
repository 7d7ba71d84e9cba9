"""An attempt: one process that trains a run and saves its checkpoints."""

import json
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from mappo.errors import KeyMissing, KeyTaken, Superseded
from mappo.runs.checkpoint import Checkpoint, Manifest, manifest_bytes, pack, sha256_of
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first, select_prunable
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import HINT, KEEP_CHECKPOINTS, Run, attempt_key
from mappo.runs.store import honours_conditions

_log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """A process that trains a run: it saves checkpoints and deletes those that are no longer needed.

    `conditional` is true if the store supports conditional writes: two attempts then never have the same number.
    `keep` is the number of newest checkpoints that stay in the store.
    """

    run: Run
    number: int
    token: str
    conditional: bool
    keep: int = KEEP_CHECKPOINTS
    fenced: bool = True  # refuse to save once a later attempt has started
    _manifests: dict[CheckpointRef, Manifest | None] = field(default_factory=dict)  # None: it cannot be read

    @property
    def id(self) -> str:
        """The folder of this attempt's keys. The token makes it unique even if two attempts have one number."""
        return f"{self.number:04d}-{self.token}"

    def save(self, checkpoint: Checkpoint) -> CheckpointRef:
        """Write a checkpoint and return its reference. Saving the same checkpoint again is harmless.

        The checkpoint exists for readers as soon as its manifest is written.

        Raises:
            Superseded: a later attempt has started.
            StoreError: the store failed, before or after the manifest was written.
        """
        store = self.run.store
        manifest, parts = pack(checkpoint)
        content = manifest_bytes(manifest)
        for name, part in parts.items():
            store.write(f"blobs/{self.id}/{name}", part)
        self._require_current()
        sha256 = sha256_of(content)
        ref = CheckpointRef.from_key(f"checkpoints/{self.id}/{checkpoint.iteration:010d}-{sha256}.json")
        assert ref
        store.create(ref.key, content)
        store.write(HINT, json.dumps({"checkpoint": ref.key}).encode())
        self._prune(ref, manifest)
        return ref

    def size_bytes(self, ref: CheckpointRef) -> int:
        """Return the size of a checkpoint that this attempt has saved; 0 if it has pruned the checkpoint since."""
        manifest = self._manifests.get(ref)
        return manifest.size_bytes if manifest else 0

    def in_directory(self, directory: Path) -> "Attempt":
        """Return the same attempt with a directory as its store.

        The keys are the same, so that the directory's content can be copied into the run's store.
        """
        return replace(self, run=Run(DirectoryStore(directory)), fenced=False, _manifests={})

    def _require_current(self) -> None:
        if not self.fenced:
            return
        latest = max(self.run.attempt_numbers(), default=0)
        if latest == self.number and self.conditional:
            return
        try:
            owner = json.loads(self.run.store.read(attempt_key(latest), 10_000))
        except (KeyMissing, ValueError) as error:
            raise Superseded(
                f"{self.run.store.location}: the file of attempt {latest} is missing or damaged: {error}"
            ) from error
        if latest != self.number or owner["token"] != self.token:
            raise Superseded(
                f"{self.run.store.location}: attempt {latest} of this run has begun on {owner['host']} (process "
                f"{owner['process']}); this one, attempt {self.number}, stops"
            )

    def _prune(self, new_ref: CheckpointRef, new_manifest: Manifest) -> None:
        """Delete all checkpoints but the newest `keep` and the best, with the parts that no other one needs."""
        if not self._manifests:  # one listing is enough: from now on, only this attempt writes to the run
            refs = filter(None, self.run.listed_refs())
            self._manifests = {ref: self.run.readable_manifest(ref) for ref in refs}
        self._manifests[new_ref] = new_manifest
        ordered = {ref: self._manifests[ref] for ref in newest_first(self._manifests)}
        readable = {ref: manifest for ref, manifest in ordered.items() if manifest}
        prunable = select_prunable(readable, self.keep)
        needed = {key for ref, manifest in readable.items() if ref not in prunable for key in ref.blobs(manifest)}
        for ref in prunable:
            self.run.store.delete(ref.key)  # before its parts, so that no manifest ever names a missing part
            for key in sorted(ref.blobs(readable[ref]) - needed):
                self.run.store.delete(key)
            del self._manifests[ref]


def claim(run: Run, keep: int = KEEP_CHECKPOINTS) -> Attempt:
    """Start the next attempt of a run. Earlier attempts stop at their next save.

    Raises:
        StoreError: the store cannot be reached, refuses writes, or returns other bytes than were written.
    """
    conditional = honours_conditions(run.store, "attempts/")
    if not conditional:
        _log.warning(
            "%s ignores conditional writes; two trainings that start under one name at the same time detect each "
            "other only when they save",
            run.store.location,
        )
    token = secrets.token_hex(4)
    owner = {"token": token, "host": socket.gethostname(), "process": os.getpid(), "started": time.time()}
    while True:
        number = max(run.attempt_numbers(), default=0) + 1
        try:
            run.store.create(attempt_key(number), json.dumps(owner).encode())
        except KeyTaken:
            continue
        return Attempt(run, number, token, conditional, keep)
