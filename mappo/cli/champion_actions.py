"""The actions of `mappo champion`: list, show, history, rollback and export."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mappo.errors import ConfigError, KeyTaken
from mappo.promotion.champions import CARD, POLICY, ChampionDecision, Champions, tasks
from mappo.reporting.tables import champion_line
from mappo.runs.directory_store import DirectoryStore
from mappo.stages.readable_errors import readable_errors


def list_champions(location: str) -> None:
    """Print a line for each task that has a champion.

    Raises:
        StageFailed: the store does not answer, or a decision is damaged.
    """
    with readable_errors("champion"):
        for task in tasks(location):
            print(f"{task}  {champion_line(_in_force(Champions(location, task)))}")


def show_champion(location: str, task: str) -> None:
    """Print the decision in force and the location of its policy, as JSON.

    Raises:
        StageFailed: no task has a champion, or `task` names none of these tasks.
    """
    with readable_errors("champion"):
        champions = _champions_of(location, task)
        decision = _in_force(champions)
        values = {"task": champions.task, "place": champions.policy_location(decision), **asdict(decision)}
        print(json.dumps(values, indent=1))


def champion_history(location: str, task: str) -> None:
    """Print a line for each decision that changed the champion, the oldest first.

    Raises:
        StageFailed: no task has a champion, or `task` names none of these tasks.
    """
    with readable_errors("champion"):
        for decision in _champions_of(location, task).history():
            print(champion_line(decision))


def roll_back(location: str, task: str, to: int | None, reason: str) -> None:
    """Put an earlier champion in force: that of decision `to`, or the last one with another policy.

    Raises:
        StageFailed: there is no earlier champion, or somebody else made a decision at the same time.
    """
    with readable_errors("champion"):
        try:
            print(champion_line(_champions_of(location, task).roll_back(to, reason)))
        except KeyTaken:
            raise ConfigError(
                "somebody else changed the champion meanwhile: look at `mappo champion history`, then try again"
            ) from None


def export_champion(location: str, task: str, output: Path) -> None:
    """Copy the exported policy of a champion and its model card into the directory `output`.

    Raises:
        StageFailed: no task has a champion, `task` names none of these tasks, or a file was replaced.
    """
    with readable_errors("champion"):
        champions = _champions_of(location, task)
        decision = _in_force(champions)
        files = {name: champions.file(decision, name) for name in (POLICY, CARD)}
        for name, content in files.items():
            DirectoryStore(output).write(name, content)  # replaces a link, and does not follow it
            print(output / name)


def _champions_of(location: str, task: str) -> Champions:
    """Return the champions of a task; the name of the task is optional if only one task has a champion."""
    names = tasks(location)
    if not names:
        raise ConfigError(f"{location}: no task has a champion; `mappo promote` makes one")
    if not task and len(names) == 1:
        return Champions(location, names[0])
    if task not in names:
        raise ConfigError(f"{location}: task {task!r} has no champion; give one of {', '.join(names)} as --task")
    return Champions(location, task)


def _in_force(champions: Champions) -> ChampionDecision:
    decision = champions.current()
    assert decision  # `tasks` lists only tasks that have a decision
    return decision


CHAMPION_ACTIONS: dict[str, Callable[..., None]] = {
    "list": list_champions,
    "show": show_champion,
    "history": champion_history,
    "rollback": roll_back,
    "export": export_champion,
}
