"""References to a run's checkpoints: their keys and their order."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mappo.runs.checkpoint import Manifest

_CHECKPOINT = re.compile(r"checkpoints/((\d{4,9})-[0-9a-f]{8})/(\d{10})-([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class CheckpointRef:
    """The place of a checkpoint in its run."""

    key: str
    attempt_id: str
    attempt: int
    iteration: int
    sha256: str

    @classmethod
    def at(cls, key: str) -> "CheckpointRef | None":
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


def best_of(manifests: dict[CheckpointRef, Manifest]) -> CheckpointRef:
    """The checkpoint with the highest return in evaluation, the earliest of equals; without any, the last."""
    evaluated = {
        place: manifest.selection_return
        for place, manifest in manifests.items()
        if manifest.selection_return is not None
    }
    if not evaluated:
        return next(iter(manifests))
    return max(evaluated, key=lambda place: (evaluated[place], -place.iteration, place.attempt))


def superfluous(readable: dict[CheckpointRef, Manifest], keep: int) -> list[CheckpointRef]:
    """Of checkpoints, the newest first: all but the first `keep` and the best."""
    best = best_of(readable) if readable else None
    return [place for place in list(readable)[max(keep, 1) :] if place != best]


def newest_first(found: Iterable[CheckpointRef | None]) -> list[CheckpointRef]:
    distinct = {saved for saved in found if saved}
    return sorted(distinct, key=lambda saved: (saved.attempt, saved.iteration, saved.key), reverse=True)
