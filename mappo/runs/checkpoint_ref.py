"""The references to a run's checkpoints: their keys, their order, and the selection of the best."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mappo.runs.checkpoint import Manifest

_CHECKPOINT = re.compile(r"checkpoints/(([0-9]{4,9})-[0-9a-f]{8})/([0-9]{10})-([0-9a-f]{64})\.json")
MAX_ATTEMPT = 999_999_999


@dataclass(frozen=True)
class CheckpointRef:
    """The reference to a checkpoint of a run: the key of its manifest, and the fields that the key contains."""

    key: str
    attempt_id: str
    attempt: int
    iteration: int
    sha256: str

    @classmethod
    def from_key(cls, key: str) -> "CheckpointRef | None":
        """Parse the key of a manifest; return None for any other key."""
        match = _CHECKPOINT.fullmatch(key)
        if not match or not is_attempt_number(match[2]):
            return None
        return cls(key, match[1], int(match[2]), int(match[3]), match[4])

    def blob(self, file_name: str) -> str:
        """Return the key of the part with this file name."""
        return f"blobs/{self.attempt_id}/{file_name}"

    def blobs(self, manifest: Manifest) -> set[str]:
        """Return the keys of all parts that the manifest names, without the earlier rows of the history."""
        return {self.blob(manifest.file_name(part)) for part in manifest.parts}

    def __str__(self) -> str:
        return f"iteration {self.iteration} of attempt {self.attempt}"


def is_attempt_number(text: str) -> bool:
    """Return whether a text is the number of an attempt, as keys contain it: 0001, but not 00001."""
    return text.isascii() and text.isdecimal() and f"{int(text):04d}" == text


def best_of(manifests: dict[CheckpointRef, Manifest]) -> CheckpointRef:
    """Return the checkpoint with the highest return in the evaluations during training.

    Of equal returns, the earliest iteration wins. If no checkpoint was evaluated, return the first of
    `manifests`, which callers order from the newest to the oldest.
    """
    returns = {
        ref: manifest.selection_return
        for ref, manifest in manifests.items()
        if manifest.selection_return is not None
    }
    if not returns:
        return next(iter(manifests))
    return max(returns, key=lambda ref: (returns[ref], -ref.iteration, ref.attempt))


def select_prunable(readable: dict[CheckpointRef, Manifest], keep: int) -> list[CheckpointRef]:
    """Return all checkpoints but the first `keep` and the best. `readable` is ordered, the newest first."""
    best = best_of(readable) if readable else None
    return [ref for ref in list(readable)[max(keep, 1) :] if ref != best]


def newest_first(refs: Iterable[CheckpointRef | None]) -> list[CheckpointRef]:
    distinct = {ref for ref in refs if ref}
    return sorted(distinct, key=lambda ref: (ref.attempt, ref.iteration, ref.key), reverse=True)
