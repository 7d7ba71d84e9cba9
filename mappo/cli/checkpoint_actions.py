"""The actions of `mappo checkpoints`: list, show, verify, prune and collect garbage."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mappo.errors import CheckpointError
from mappo.reporting.tables import checkpoint_lines
from mappo.runs.checkpoint import Manifest, manifest_bytes
from mappo.runs.checkpoint_ref import CheckpointRef, best_of
from mappo.runs.run import Run


def show_list(location: str, output: str) -> None:
    """Print a line, or with `output` json an object, for each checkpoint of a run, newest first.

    Raises:
        NoCheckpoint: there is no checkpoint.
        StoreError: the store does not answer.
    """
    run = Run.at(location)
    refs = run.refs() or [run.choose("last")]  # in an empty run, `choose` raises the error
    readable = run.readable(refs)
    best = best_of(readable) if readable else None
    if output == "json":
        print(json.dumps([_row(ref, readable.get(ref), ref == refs[0], ref == best) for ref in refs], indent=1))
        return
    for line in checkpoint_lines(refs, readable, best):
        print(line)


def _row(ref: CheckpointRef, manifest: Manifest | None, is_last: bool, is_best: bool) -> dict[str, Any]:
    """Return the fields of a checkpoint; of a damaged one, those of its key."""
    row = {
        "iteration": ref.iteration,
        "attempt": ref.attempt,
        "last": is_last,
        "best": is_best,
        "damaged": not manifest,
    }
    if not manifest:
        return row
    return row | {
        "frames": manifest.frames,
        "selection_return": manifest.selection_return,
        "size_bytes": manifest.size_bytes,
    }


def show_manifest(location: str, checkpoint: str) -> None:
    """Print a checkpoint's manifest as JSON.

    Raises:
        CheckpointError: the checkpoint does not exist or cannot be read.
    """
    run = Run.at(location)
    print(manifest_bytes(run.manifest(run.choose(checkpoint))).decode(), end="")


def verify(location: str) -> None:
    """Read all checkpoints of a run and print for each one whether it is good or damaged.

    Raises:
        CheckpointError: a checkpoint is damaged, or the run has no checkpoint.
    """
    run = Run.at(location)
    refs = run.refs() or [run.choose("last")]  # in an empty run, `choose` raises the error
    damaged = []
    for ref in refs:
        try:
            deque(run.earlier_rows(run.load(ref).earlier_rows, is_strict=True), maxlen=0)
            print(f"good     {ref}")
        except CheckpointError as error:
            damaged.append(ref)
            print(f"damaged  {ref}: {error}")
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(refs)} checkpoints are damaged")


def prune(location: str, keep: int, delete: bool) -> None:
    """Delete all checkpoints but the `keep` newest and the best; their parts become garbage.

    Raises:
        StoreError: the store refused a request or did not answer.
    """
    run = Run.at(location)
    _delete(run, [(ref.key, str(ref)) for ref in run.prunable(keep)], delete)


def collect_garbage(location: str, grace_hours: float, delete: bool) -> None:
    """Delete the files that no checkpoint needs and that are older than `grace_hours`.

    Raises:
        StoreError: the store refused a request or did not answer.
    """
    run = Run.at(location)
    _delete(run, [(key, key) for key in run.garbage(grace_hours * 3600)], delete)


ACTIONS: dict[str, Callable[..., None]] = {
    "list": show_list,
    "show": show_manifest,
    "verify": verify,
    "prune": prune,
    "gc": collect_garbage,
}


def _delete(run: Run, entries: Sequence[tuple[str, str]], delete: bool) -> None:
    """Delete entries, which are (key, text) pairs, and print a line for each; without `delete`, only print."""
    for key, text in entries:
        if delete:
            run.store.delete(key)
        print(f"{'deleted' if delete else 'would delete'} {text}")
    print(f"{len(entries)} {'deleted' if delete else 'to delete; nothing is deleted without --delete'}")
