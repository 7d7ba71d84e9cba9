"""The actions of `mappo champion`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mappo.errors import ConfigError, KeyTaken
from mappo.promotion.champions import CARD, POLICY, ChampionDecision, Champions, tasks
from mappo.reporting.tables import champion_line
from mappo.runs.locations import open_store
from mappo.stages.runtime import readable_errors

_MAX_POLICY_BYTES = 1 << 32


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


def _in_force(champions: Champions) -> ChampionDecision:
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
