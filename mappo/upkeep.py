"""What `mappo checkpoints` and `mappo champion` do: list, show, verify and tidy up; history, rollback, export."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from mappo.champions import CARD, POLICY, Champions, Entry, tasks
from mappo.checkpoint import CheckpointError, manifest_bytes
from mappo.compare import ComparisonReport
from mappo.config import ConfigError
from mappo.console import champion_line, checkpoint_lines
from mappo.evaluate import EvaluationReport
from mappo.promote import Decision
from mappo.runs import Run, best_of
from mappo.stages import readable_errors
from mappo.storage import KeyTaken, open_store
from mappo.validate import ValidationReport

_MAX_POLICY_BYTES = 1 << 32
_REPORTS: dict[str, type] = {
    "validation": ValidationReport,
    "evaluation": EvaluationReport,
    "comparison": ComparisonReport,
    "decision": Decision,
}


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


def list_champions(place: str) -> None:
    """Print a line for each task that has a champion.

    Raises:
        StageFailed: the store does not answer, or a decision is damaged.
    """
    with readable_errors("champion"):
        for task in tasks(place):
            print(f"{task}  {champion_line(_in_force(Champions(place, task)))}")


def show_champion(place: str, task: str) -> None:
    """Print the decision in force, and where its policy is, as JSON.

    Raises:
        StageFailed: there is none.
    """
    with readable_errors("champion"):
        champions = _of(place, task)
        entry = _in_force(champions)
        print(json.dumps({"task": champions.task, "place": champions.place(entry), **asdict(entry)}, indent=1))


def champion_history(place: str, task: str) -> None:
    """Print a line for each decision that changed the champion, the first first.

    Raises:
        StageFailed: there is none.
    """
    with readable_errors("champion"):
        for entry in _of(place, task).history():
            print(champion_line(entry))


def roll_back(place: str, task: str, to: int | None, reason: str) -> None:
    """Put an earlier champion in force.

    Raises:
        StageFailed: there is none, or another decision was taken in the same moment.
    """
    with readable_errors("champion"):
        try:
            print(champion_line(_of(place, task).roll_back(to, reason)))
        except KeyTaken:
            raise ConfigError(
                "another decision was taken in this moment: look at the history, and try again"
            ) from None


def export_champion(place: str, task: str, output: Path) -> None:
    """Copy the exported policy and its model card.

    Raises:
        StageFailed: there is no champion.
    """
    with readable_errors("champion"):
        champions = _of(place, task)
        source = open_store(champions.place(_in_force(champions)))
        output.mkdir(parents=True, exist_ok=True)
        for name in (POLICY, CARD):
            (output / name).write_bytes(source.read(name, _MAX_POLICY_BYTES))
            print(output / name)


def show_schema(report: str) -> None:
    """Print the JSON Schema of what a stage writes: validation, evaluation, comparison or decision."""
    schema = TypeAdapter(_REPORTS[report]).json_schema()
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1))


def _of(place: str, task: str) -> Champions:
    """The champions of a task, which need not be named where there is one only."""
    there = tasks(place)
    if not there:
        raise ConfigError(f"{place}: no task has a champion; `mappo promote` makes one")
    if not task and len(there) == 1:
        return Champions(place, there[0])
    if task not in there:
        raise ConfigError(f"{place}: task {task!r}: give one of {', '.join(there)}")
    return Champions(place, task)


def _in_force(champions: Champions) -> Entry:
    entry = champions.current()
    assert entry  # it is a task because it has one
    return entry


CHAMPION_ACTIONS: dict[str, Callable[..., None]] = {
    "list": list_champions,
    "show": show_champion,
    "history": champion_history,
    "rollback": roll_back,
    "export": export_champion,
}
