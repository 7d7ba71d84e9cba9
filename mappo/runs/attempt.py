"""An attempt: one process that trains a run and saves its checkpoints.

docs/runs.md states what holds whatever happens to the process and to the store; tests/runs/test_protocol.py
tries it.
"""

import json
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from mappo.errors import StoreError, StoreUnavailable, Superseded
from mappo.runs.attempt_notes import AttemptNote, note_key
from mappo.runs.checkpoint import Checkpoint, manifest_bytes, pack, sha256_of
from mappo.runs.checkpoint_ref import MAX_ATTEMPT, CheckpointRef
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import HINT, KEEP_CHECKPOINTS, Run
from mappo.runs.segments import Segment, SharedFile, index_bytes
from mappo.runs.source_commit import source_commit
from mappo.runs.store import honours_conditions
from mappo.runs.tidying import Tidier

_log = logging.getLogger(__name__)
_CLAIM_TRIES = 30  # to find a free number, if the listing does not show the numbers that are taken
_LONGEST_PAUSE_SECONDS = 2.0


@dataclass
class Attempt:
    """A process that trains a run: it saves checkpoints and deletes those that are no longer needed.

    `conditional` is true if the store supports conditional writes: two attempts then never have the same number.
    `keep` is the number of newest checkpoints that stay in the store. `owned_since` is the latest time, by
    `time.monotonic`, at which no later attempt had started.
    """

    run: Run
    number: int
    token: str
    conditional: bool
    keep: int = KEEP_CHECKPOINTS
    fenced: bool = True  # refuse to save once a later attempt has started
    owned_since: float = field(default_factory=time.monotonic)
    _index: tuple[int, SharedFile | None] = (0, None)  # the number of segments in the index that was saved last

    def __post_init__(self) -> None:
        self._tidier = Tidier(self.run, self.id, self.keep)

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
        checkpoint = replace(checkpoint, earlier_rows=self._save_earlier_rows(checkpoint), segments=())
        manifest, parts = pack(checkpoint)
        content = manifest_bytes(manifest)
        for name, part in parts.items():
            store.write(f"blobs/{self.id}/{name}", part)
        self.require_current()
        sha256 = sha256_of(content)
        ref = CheckpointRef.from_key(f"checkpoints/{self.id}/{checkpoint.iteration:010d}-{sha256}.json")
        assert ref
        store.create(ref.key, content)
        self._tidier.add(ref, manifest)
        return ref

    def tidy(self) -> None:
        """Write the hint and delete checkpoints that are no longer needed, unless a later attempt has started.

        What the store refuses is logged once, and tried later.
        """
        try:
            self.require_current()
            if newest := self._tidier.newest:
                hint = json.dumps({"checkpoint": newest.key}).encode()
                self.run.store.impatient().write(HINT, hint)
        except Superseded:  # the next save raises this
            return
        except StoreError as error:
            self._tidier.postpone(error)
        else:
            self._tidier.tidy()

    def size_bytes(self, ref: CheckpointRef) -> int:
        """Return the size of a checkpoint that this attempt has saved; 0 if it has pruned the checkpoint since."""
        return self._tidier.size_bytes(ref)

    def in_directory(self, directory: Path) -> "Attempt":
        """Return the same attempt with a directory as its store.

        The keys are the same, so that the directory's content can be copied into the run's store.
        """
        return replace(self, run=Run(DirectoryStore(directory)), fenced=False)

    def require_current(self) -> None:
        """Check that no later attempt has started. A listing that shows less than was written proves nothing.

        Raises:
            Superseded: a later attempt has started.
            StoreError: the store does not answer.
        """
        if not self.fenced:
            return
        started = time.monotonic()
        for number, note in self.run.attempts.from_number(self.number + self.conditional):
            if note.token != self.token:
                raise Superseded(
                    f"{self.run.store.location}: attempt {number} of this run has begun on {note.host} (process "
                    f"{note.process}); this one, attempt {self.number}, stops"
                )
        self.owned_since = started

    def is_current(self) -> bool:
        """Return whether it is certain that no later attempt has started."""
        try:
            self.require_current()
        except StoreError:
            return False
        return True

    def _save_earlier_rows(self, checkpoint: Checkpoint) -> SharedFile | None:
        """Save the segments that are not saved yet, and an index of all; return the index."""
        segments = checkpoint.segments
        if not segments:
            return checkpoint.earlier_rows
        num_indexed, index = self._index
        if num_indexed != len(segments):
            files = [self._save_segment(segment) for segment in segments]
            files = [checkpoint.earlier_rows, *files] if checkpoint.earlier_rows else files
            num_rows = sum(file.num_rows for file in files)
            index = self._save_shared(index_bytes(files), "json", num_rows)
            self._index = len(segments), index
        return index

    def _save_segment(self, segment: Segment) -> SharedFile:
        file = segment.saved or self._save_shared(segment.text.encode(), "csv", segment.num_rows)
        segment.mark_saved(file)
        return file

    def _save_shared(self, content: bytes, suffix: str, num_rows: int) -> SharedFile:
        file = SharedFile(f"blobs/{self.id}/{sha256_of(content)}.{suffix}", len(content), num_rows)
        self.run.store.write(file.key, content)
        return file


def claim(run: Run, keep: int = KEEP_CHECKPOINTS) -> Attempt:
    """Start the next attempt of a run. Earlier attempts stop at their next save.

    Raises:
        StoreError: the store cannot be reached, refuses writes, returns other bytes than were written, or has no
            free number.
    """
    conditional = honours_conditions(run.store, "attempts/")
    if not conditional:
        _log.warning(
            "%s ignores conditional writes; two trainings that start under one name at the same time detect each "
            "other only when they save",
            run.store.location,
        )
    token = secrets.token_hex(4)
    note = AttemptNote(token, socket.gethostname(), os.getpid(), time.time(), source_commit())
    number, problem = 0, StoreError("it is too large")
    for tried in range(_CLAIM_TRIES):
        number = max(number, run.last_attempt()) + 1  # no number is left out, or a later attempt might find it
        if number > MAX_ATTEMPT:
            break
        try:
            run.store.create(note_key(number), note.to_bytes())
        except StoreUnavailable:
            raise
        except StoreError as error:  # it is taken, and the listing did not show it; or it is no file
            problem = error
            time.sleep(min(0.05 * 2**tried, _LONGEST_PAUSE_SECONDS))
        else:
            return Attempt(run, number, token, conditional, keep)
    raise StoreError(
        f"{run.store.location}: no free number for this attempt, the last one tried is {number}: {problem}; "
        "delete what other programs have left in attempts/"
    )
