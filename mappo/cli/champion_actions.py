"""The actions of `mappo champion`: list, show, history, rollback and export."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mappo.errors import ConfigError, KeyTaken
from mappo.promotion.champions import CARD, CONTRACT, ONNX, POLICY, ChampionDecision, Champions, tasks
from mappo.reporting.tables import champion_line, champion_summary
from mappo.reporting.terminal import say
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.locations import require_location
from mappo.stages.readable_errors import readable_errors

_EXPORTS = {"pytorch": (POLICY,), "onnx": (ONNX, CONTRACT)}  # the files of each format


def list_champions(location: str, output: str) -> None:
    """Print a line, or with `output` json an object, for each task that has a champion.

    Raises:
        ConfigError: no task has a champion, or a decision is damaged.
        StoreError: the store does not answer.
    """
    decisions = {task: _in_force(Champions(location, task)) for task in _tasks(location)}
    if output == "json":
        print(json.dumps([{"task": task, **_row(decision)} for task, decision in decisions.items()], indent=1))
        return
    for task, decision in decisions.items():
        print(f"{task}  {champion_line(decision)}")


def show_champion(location: str, task: str, output: str) -> None:
    """Print the decision in force and the location of its policy; with `output` json, all that the decision holds.

    Raises:
        ConfigError: no task has a champion, or `task` names none of these tasks.
        StoreError: the store does not answer.
    """
    champions = _champions_of(location, task)
    decision = _in_force(champions)
    values = {"task": champions.task, "place": champions.policy_location(decision), **asdict(decision)}
    print(json.dumps(values, indent=1) if output == "json" else "\n".join(champion_summary(values)))


def champion_history(location: str, task: str, output: str) -> None:
    """Print a line, or with `output` json an object, for each decision that changed the champion, oldest first.

    Raises:
        ConfigError: no task has a champion, or `task` names none of these tasks.
        StoreError: the store does not answer.
    """
    decisions = _champions_of(location, task).history()
    if output == "json":
        print(json.dumps([_row(decision) for decision in decisions], indent=1))
        return
    for decision in decisions:
        print(champion_line(decision))


def _row(decision: ChampionDecision) -> dict[str, Any]:
    """Return a decision without the evidence of its gate, which has every episode."""
    return {name: value for name, value in asdict(decision).items() if name != "evidence"}


def roll_back(location: str, task: str, to: int | None, reason: str) -> None:
    """Put an earlier champion in force: that of decision `to`, or the last one with another policy.

    Raises:
        ConfigError: there is no earlier champion, or somebody else made a decision at the same time.
    """
    try:
        print(champion_line(_champions_of(location, task).roll_back(to, reason)))
    except KeyTaken:
        raise ConfigError(
            "somebody else changed the champion meanwhile: look at `mappo champion history`, then try again"
        ) from None


def export_champion(location: str, task: str, output: Path, format: str = "pytorch", scenario: str = "") -> None:
    """Copy the exported policy of a champion and its model card into the directory `output`.

    `format` is pytorch or onnx. A champion that was promoted without an ONNX file gets one here. `scenario` is its
    scenario, if the user named it to let its code run.

    Raises:
        StageFailed: no task has a champion, `task` names none of these tasks, a file was replaced, or the ONNX
            file cannot be made.
    """
    with readable_errors("champion"):
        champions = _champions_of(location, task)
        decision = _in_force(champions)
        names = _EXPORTS[format]
        if format == "onnx" and not all(name in decision.files for name in names):
            files = _make_onnx(champions, decision, scenario)
        else:
            files = {name: champions.file(decision, name) for name in names}
        for name, content in {**files, CARD: champions.file(decision, CARD)}.items():
            print(f"{output / name}{_write(output, name, content)}")


def _make_onnx(champions: Champions, decision: ChampionDecision, scenario: str) -> dict[str, bytes]:
    """Export a champion's networks to ONNX here."""
    from mappo.promotion.export import trace_policy
    from mappo.promotion.onnx_export import export_onnx

    checkpoint = champions.policy(decision)
    stored = checkpoint.config.environment.scenario
    if scenario not in ("", stored):
        raise ConfigError(f"--environment.scenario {scenario}: the champion's scenario is {stored!r}")
    if ":" in stored and not scenario:
        raise ConfigError(
            f"decision {decision.number} has no {ONNX}, and making it needs the scenario; {stored!r} is "
            "code outside VMAS, which runs only if you name it: if you trust this code, give it as "
            "--environment.scenario"
        )
    say("champion", f"decision {decision.number} has no {ONNX}: exporting the champion's networks here")
    return export_onnx(trace_policy(checkpoint))


def _write(output: Path, name: str, content: bytes) -> str:
    """Write a file as a whole; return what happened to a file that was there, in brackets."""
    path = output / name
    is_there = path.is_symlink() or path.exists()
    if is_there and not path.is_symlink() and path.read_bytes() == content:
        return " (unchanged)"
    DirectoryStore(output).write(name, content)  # replaces a link, and does not follow it
    return " (replaced another file)" if is_there else ""


def _tasks(location: str) -> list[str]:
    """Return the tasks that have a champion, of which there must be one."""
    names = tasks(require_location(location))
    if not names:
        raise ConfigError(f"{location}: no task has a champion; `mappo promote` makes one")
    return names


def _champions_of(location: str, task: str) -> Champions:
    """Return the champions of a task; the name of the task is optional if only one task has a champion."""
    names = _tasks(location)
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
