"""What `mappo checkpoints` and `mappo champion` do: list, show, verify and tidy up; history, rollback, export."""

from collections.abc import Callable, Sequence

from mappo.errors import CheckpointError
from mappo.reporting.tables import checkpoint_lines
from mappo.runs.checkpoint import manifest_bytes
from mappo.runs.checkpoint_ref import best_of
from mappo.runs.run import Run
from mappo.stages.runtime import readable_errors


def show_list(run: str) -> None:
    """Print a line for each checkpoint, newest first.

    Raises:
        StageFailed: the store does not answer.
    """
    with readable_errors("checkpoints"):
        place = Run.at(run)
        saved = place.saved()
        readable = place.readable(saved)
        best = best_of(readable) if readable else None
        for line in checkpoint_lines(saved, readable, best):
            print(line)


def show_manifest(run: str, checkpoint: str) -> None:
    """Print a checkpoint's manifest as JSON.

    Raises:
        StageFailed: there is no such checkpoint, or it cannot be read.
    """
    with readable_errors("checkpoints"):
        place = Run.at(run)
        print(manifest_bytes(place.manifest(place.choose(checkpoint))).decode(), end="")


def verify(run: str) -> None:
    """Read everything, and say of each checkpoint whether it is whole.

    Raises:
        StageFailed: one is not, or there is none.
    """
    with readable_errors("checkpoints"):
        place = Run.at(run)
        damaged = []
        for saved in [*place.saved()] or [place.choose("last")]:
            try:
                place.load(saved)
                print(f"good     {saved}")
            except CheckpointError as error:
                damaged.append(saved)
                print(f"damaged  {saved}: {error}")
        if damaged:
            raise CheckpointError(f"{len(damaged)} damaged")


def prune(run: str, keep: int, delete: bool) -> None:
    """Delete all checkpoints but the last and the best; their parts are then garbage.

    Raises:
        StageFailed: the store failed.
    """
    with readable_errors("checkpoints"):
        place = Run.at(run)
        _delete(place, [(saved.key, str(saved)) for saved in place.prunable(keep)], delete)


def collect_garbage(run: str, grace_hours: float, delete: bool) -> None:
    """Delete what no checkpoint needs.

    Raises:
        StageFailed: the store failed.
    """
    with readable_errors("checkpoints"):
        place = Run.at(run)
        _delete(place, [(key, key) for key in place.garbage(grace_hours * 3600)], delete)


ACTIONS: dict[str, Callable[..., None]] = {
    "list": show_list,
    "show": show_manifest,
    "verify": verify,
    "prune": prune,
    "gc": collect_garbage,
}


def _delete(place: Run, doomed: Sequence[tuple[str, str]], delete: bool) -> None:
    for key, name in doomed:
        if delete:
            place.store.delete(key)
        print(f"{'deleted' if delete else 'would delete'} {name}")
    print(f"{len(doomed)} {'deleted' if delete else 'to delete; nothing is deleted without --delete'}")
