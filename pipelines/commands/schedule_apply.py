"""The command `schedule apply`: make the schedules of the server those of a file."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from mappo.cli.arguments import dashed
from mappo.errors import ConfigError
from pipelines.commands.arguments import add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, show_rows
from pipelines.commands.schedule_definition import (
    add_definition_arguments,
    add_zone_argument,
    definition_of,
    next_times,
    waiter,
)
from pipelines.kubeflow.schedule_plan import CREATE, KEEP, LEAVE, REMOVE, REPLACE, Change, carry_out, plan_changes
from pipelines.kubeflow.schedules import Schedule
from pipelines.kubeflow.submission import Submission
from pipelines.schedule_file import Option, ScheduleEntry, read_schedule_file

_EPILOG = """example of a file:
  owner: team-a                    # marks the schedules of this file; another file needs another owner
  defaults:
    site: site.yaml                # paths start at the directory of this file
  schedules:
    nightly:
      cron: "30 2 * * *"
      seeds: 0,1,2
      parameter: {store: s3://bucket/runs, run: "nightly-[[ScheduledTime]]"}

An entry has the flags of `schedule create`, without the dashes in front, and `recipe`. Applying a file again
changes nothing. An entry that differs replaces its schedule. Schedules of other owners are never changed.
"""
_DONE = {CREATE: "created", REPLACE: "replaced", KEEP: "unchanged", REMOVE: "removed", LEAVE: "left"}
_NO_LONGER = "not in the file; --prune removes it"
_RECIPE = "recipe"
_REPEATED = "parameter"


def add(verbs: Any) -> None:
    """Add the command `schedule apply`."""
    summary = "make the schedules of an owner those of a file: create, replace and, with --prune, remove them"
    verb = verbs.add_parser(
        "apply",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("schedules", type=Path, metavar="FILE", help="YAML file of schedules")
    verb.add_argument("--dry-run", action="store_true", help="show what would change; change nothing")
    verb.add_argument(
        "--prune", action="store_true", help="remove schedules of this owner that are no longer in the file"
    )
    add_zone_argument(verb)
    add_connection_arguments(verb)
    add_output_argument(verb)
    verb.set_defaults(execute=_apply)


def _apply(arguments: argparse.Namespace) -> int:
    owner, wanted = _wanted(arguments.schedules)
    kubeflow, wait = connect(arguments), waiter(arguments.time_zone)
    changes = plan_changes(kubeflow, owner, wanted, is_pruned=arguments.prune)
    empty = f"no schedules: {arguments.schedules} describes none, and owner {owner} has none"
    if arguments.dry_run:
        show_rows(arguments, [_row(change, change.action, arguments.time_zone) for change in changes], empty)
        print("note: this was a dry run; nothing was changed", file=sys.stderr)
        return 0
    rows: list[dict[str, str]] = []
    try:
        for change in changes:
            carry_out(kubeflow, change, wait)
            rows.append(_row(change, _DONE[change.action], arguments.time_zone))
    finally:
        show_rows(arguments, rows, "no change was completed" if changes else empty)
    return 0


def _row(change: Change, action: str, zone: str) -> dict[str, str]:
    times = next_times(change.wanted[0].cron, zone, 1) if change.wanted else [""]
    message = _NO_LONGER if change.action == LEAVE else "; ".join(change.differences)
    return {"schedule": change.name, "change": action, "fires_next": times[0], "message": message}


def _wanted(path: Path) -> tuple[str, list[tuple[Schedule, Submission]]]:
    """Return the owner of a file, and the schedules that it describes, after all checks that need no server.

    Raises:
        ConfigError: entries are wrong; the message has one line or more for each.
    """
    parser = _EntryParser(prog="schedule", add_help=False, allow_abbrev=False)
    add_definition_arguments(parser)
    flags = {name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")}
    file = read_schedule_file(path, frozenset({*flags, _RECIPE}))
    wanted, problems = [], []
    for entry in file.entries:
        try:
            wanted.append(_definition(parser, entry, file.owner, path.parent))
        except (ConfigError, OSError) as error:
            place = f"{path}: line {entry.line}: schedule {entry.name}"
            problems += [f"{place}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return file.owner, wanted


def _definition(
    parser: argparse.ArgumentParser, entry: ScheduleEntry, owner: str, directory: Path
) -> tuple[Schedule, Submission]:
    """Return the schedule that an entry describes; paths in the file start at its directory."""
    flags = [flag for name, option in entry.options.items() for flag in _flags(name, option)]
    recipe = entry.options.get(_RECIPE)
    arguments = parser.parse_args(dashed([*flags, "--", entry.name, *([str(recipe.value)] if recipe else [])]))
    for name in entry.options:
        if isinstance(value := getattr(arguments, name.replace("-", "_"), None), Path):
            setattr(arguments, name.replace("-", "_"), directory / value)
    return definition_of(arguments, owner)


def _flags(name: str, option: Option) -> list[str]:
    """Return the words of a command line for an option; a mapping repeats its flag."""
    if name == _RECIPE:
        return []
    if isinstance(option.value, str):
        return [f"--{name}={option.value}"]
    if name != _REPEATED:
        raise ConfigError(f"line {option.line}: {name}: must be a text; write JSON in quotes")
    return [f"--{name}={key}={value}" for key, value in option.value.items()]


class _EntryParser(argparse.ArgumentParser):
    """A parser of an entry's flags that raises its errors instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)
