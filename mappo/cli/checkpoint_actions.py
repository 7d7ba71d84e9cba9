"""The actions of `mappo checkpoints`: list, show, verify, prune and collect garbage."""

from collections import deque
from collections.abc import Callable, Sequence

from mappo.errors import CheckpointError
from mappo.reporting.tables import checkpoint_lines
from mappo.runs.checkpoint import manifest_bytes
from mappo.runs.checkpoint_ref import best_of
from mappo.runs.run import Run
from mappo.stages.readable_errors import readable_errors


def show_list(location: str) -> None:
    """Print a line for each checkpoint of a run, newest first.

    Raises:
        StageFailed: the store does not answer.
    """
    with readable_errors("checkpoints"):
        run = Run.at(location)
        refs = run.refs()
        readable = run.readable(refs)
        best = best_of(readable) if readable else None
        for line in checkpoint_lines(refs, readable, best):
            print(line)


def show_manifest(location: str, checkpoint: str) -> None:
    """Print a checkpoint's manifest as JSON.

    Raises:
        StageFailed: the checkpoint does not exist or cannot be read.
    """
    with readable_errors("checkpoints"):
        run = Run.at(location)
        print(manifest_bytes(run.manifest(run.choose(checkpoint))).decode(), end="")


def verify(location: str) -> None:
    """Read all checkpoints of a run and print for each one whether it is good or damaged.

    Raises:
        StageFailed: a checkpoint is damaged, or the run has no checkpoint.
    """
    with readable_errors("checkpoints"):
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
        StageFailed: the store refused a request or did not answer.
    """
    with readable_errors("checkpoints"):
        run = Run.at(location)
        _delete(run, [(ref.key, str(ref)) for ref in run.prunable(keep)], delete)


def collect_garbage(location: str, grace_hours: float, delete: bool) -> None:
    """Delete the files that no checkpoint needs and that are older than `grace_hours`.

    Raises:
        StageFailed: the store refused a request or did not answer.
    """
    with readable_errors("checkpoints"):
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
