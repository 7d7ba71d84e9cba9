"""The notes of a run's attempts: one small file for each process that has started to train the run.

A note that cannot be parsed, or a name that is not that of a note, is ignored.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass

from mappo.errors import StoreError, StoreUnavailable, TooLarge
from mappo.runs.checkpoint_ref import is_attempt_number
from mappo.runs.store import Store

_NOTE_KEY = re.compile(r"attempts/([0-9]{4,9})\.json")
_MAX_NOTE_BYTES = 10_000


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="ignore"))
class AttemptNote:
    """The process of an attempt. started: in seconds since 1970. commit: see `source_commit`."""

    token: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    host: Annotated[str, Field(pattern="^[ -~]{0,255}$")]
    process: int
    started: Annotated[float, Field(allow_inf_nan=False)]
    commit: Annotated[str, Field(pattern="^[ -~]{0,80}$")] = ""

    def to_bytes(self) -> bytes:
        """Return the note as JSON."""
        return json.dumps(asdict(self)).encode()


_NOTE = TypeAdapter(AttemptNote)


class AttemptNotes:
    """The notes in the store of a run."""

    def __init__(self, store: Store):
        self._store = store
        self._unreadable: set[int] = set()  # notes never change, so that each of these is read only once

    def numbers(self) -> list[int]:
        """Return the numbers of all notes that a listing shows, the highest first."""
        matches = (_NOTE_KEY.fullmatch(entry.key) for entry in self._store.entries("attempts/"))
        return sorted((int(match[1]) for match in matches if match and is_attempt_number(match[1])), reverse=True)

    def from_number(self, least: int) -> Iterator[tuple[int, AttemptNote]]:
        """Yield the numbers and the notes of the attempts from `least` on, the highest first.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        for number in self.numbers():
            if number < least:
                return
            if note := self._read(number):
                yield number, note

    def _read(self, number: int) -> AttemptNote | None:
        if number in self._unreadable:
            return None
        try:
            return _NOTE.validate_json(self._store.read(note_key(number), _MAX_NOTE_BYTES))
        except (ValidationError, TooLarge):
            self._unreadable.add(number)
            return None
        except StoreUnavailable:
            raise
        except StoreError:  # it was deleted, or is no file
            return None


def note_key(number: int) -> str:
    """Return the key of an attempt's note."""
    return f"attempts/{number:04d}.json"
