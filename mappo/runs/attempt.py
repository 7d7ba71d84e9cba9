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
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first, superfluous
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import HINT, KEEP_CHECKPOINTS, Run, attempt_key
from mappo.runs.store import honours_conditions

_log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One process training a run: what saves its checkpoints, and tidies up behind itself."""

    run: Run
    number: int
    token: str
    conditional: bool
    keep: int = KEEP_CHECKPOINTS
    fenced: bool = True  # stops when a later attempt has begun
    _known: dict[CheckpointRef, Manifest | None] = field(default_factory=dict)  # None: cannot be read

    @property
    def id(self) -> str:
        """What its keys begin with; unique also where two attempts got one number."""
        return f"{self.number:04d}-{self.token}"

    def save(self, checkpoint: Checkpoint) -> CheckpointRef:
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
        saved = CheckpointRef.at(f"checkpoints/{self.id}/{checkpoint.iteration:010d}-{sha256}.json")
        assert saved
        store.create(saved.key, content)
        store.write(HINT, json.dumps({"checkpoint": saved.key}).encode())
        self._tidy(saved, manifest)
        return saved

    def size_bytes(self, saved: CheckpointRef) -> int:
        """That of a checkpoint which this attempt has saved and not deleted."""
        manifest = self._known.get(saved)
        return manifest.size_bytes if manifest else 0

    def elsewhere(self, directory: Path) -> "Attempt":
        """The same attempt in a directory, whose content can be copied into the run's store as it is."""
        return replace(self, run=Run(DirectoryStore(directory)), fenced=False, _known={})

    def _require_current(self) -> None:
        if not self.fenced:
            return
        latest = max(self.run.attempt_numbers(), default=0)
        if latest == self.number and self.conditional:
            return
        try:
            claim = json.loads(self.run.store.read(attempt_key(latest), 10_000))
        except (KeyMissing, ValueError) as error:
            raise Superseded(
                f"{self.run.store.location}: the note of attempt {latest} is gone: {error}"
            ) from error
        if latest != self.number or claim["token"] != self.token:
            raise Superseded(
                f"{self.run.store.location}: attempt {latest} of this run has begun on {claim['host']} (process "
                f"{claim['process']}); this one, attempt {self.number}, stops"
            )

    def _tidy(self, saved: CheckpointRef, manifest: Manifest) -> None:
        """Keep the last checkpoints and the best; what the others had goes with them."""
        if not self._known:  # from here on, this attempt is the only one to write
            self._known = {place: self.run.readable_manifest(place) for place in filter(None, self.run.listed())}
        self._known[saved] = manifest
        ordered = {ref: self._known[ref] for ref in newest_first(self._known)}
        readable = {place: known for place, known in ordered.items() if known}
        doomed = superfluous(readable, self.keep)
        needed = {key for place, known in readable.items() if place not in doomed for key in place.blobs(known)}
        for place in doomed:
            self.run.store.delete(place.key)
            for key in sorted(place.blobs(readable[place]) - needed):
                self.run.store.delete(key)
            del self._known[place]


def claim(run: Run, keep: int = KEEP_CHECKPOINTS) -> Attempt:
    """Begin the next attempt; those before it stop when they notice.

    Raises:
        StoreError: the store cannot be reached, written to, or does not give back what was written.
    """
    conditional = honours_conditions(run.store, "attempts/")
    if not conditional:
        _log.warning(
            "%s ignores conditional writes; two trainings that start under one name in the same moment notice "
            "each other only when they save",
            run.store.location,
        )
    token = secrets.token_hex(4)
    note = {"token": token, "host": socket.gethostname(), "process": os.getpid(), "started": time.time()}
    while True:
        number = max(run.attempt_numbers(), default=0) + 1
        try:
            run.store.create(attempt_key(number), json.dumps(note).encode())
        except KeyTaken:
            continue
        return Attempt(run, number, token, conditional, keep)
