"""The commands `mappo runs` and `mappo tag`: list the runs of a store, and attach tags and a comment to a run."""

import argparse
import json
import sys
import time
from pathlib import Path

from mappo.cli.arguments import RUN_HELP, Commands, add_command, add_format_argument
from mappo.cli.run_names import RUNS, find_run
from mappo.cli.status import look_up
from mappo.errors import ConfigError, NoCheckpoint

_PAGE = "runs.html"
_CELL_WIDTH = 44  # characters of a long cell on a terminal


def add(commands: Commands) -> None:
    """Add the commands."""
    command = add_command(commands, "runs", _runs, "list the runs of a store; filter and sort them")
    command.add_argument(
        "store", nargs="?", default=RUNS, metavar="STORE", help=f"the store of the runs (default: {RUNS})"
    )
    command.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="CONDITION",
        help="list only runs that meet it: a field, = != < <= > or >=, and a value, such as task=navigation, "
        "state=finished, tag=good, 'age<24' (hours), 'evaluation>0.9', learner.clip_epsilon=0.1 or a measurement; "
        "or a text in the name, the task, a tag or the comment; may be repeated",
    )
    command.add_argument(
        "--sort",
        default="",
        metavar="FIELD",
        help="sort by a field, from the highest number, or from A (default: the newest first)",
    )
    command.add_argument("--reverse", action="store_true", help="sort the other way round")
    add_format_argument(command)
    command.add_argument(
        "--page",
        action="store_true",
        help=f"write the table as a page, with links to the pages of runs: {_PAGE} in the store if it is a "
        "directory, else here",
    )
    command = add_command(commands, "tag", _tag, "attach tags and a comment to a run, or show them")
    command.add_argument("run_location", metavar="RUN", help=RUN_HELP)
    command.add_argument("tags", nargs="*", metavar="TAG", help="tag to add: lower-case letters, digits and . _ -")
    command.add_argument("--remove", action="append", default=[], metavar="TAG", help="tag to remove")
    command.add_argument("--comment", metavar="TEXT", help="the comment, in place of an earlier one")


def _runs(arguments: argparse.Namespace) -> int:
    return look_up("runs", lambda: _list(arguments))


def _list(arguments: argparse.Namespace) -> None:
    from mappo.reporting.overview_table import lines, rows_of
    from mappo.runs.overview import as_json, overview

    summaries = overview(arguments.store, page="report.html")
    if not summaries:
        raise ConfigError(f"there is no run in {arguments.store}; give the STORE of your trainings")
    rows = rows_of(summaries, time.time(), arguments.filter, arguments.sort, arguments.reverse)
    if arguments.page:
        from mappo.reporting.overview_page import write

        directory = None if "://" in arguments.store else Path(arguments.store)
        path = (directory or Path()) / _PAGE
        write(path, arguments.store, rows, directory)
        print(f"page: {path.absolute().as_uri()}")
    elif arguments.output == "json":
        print(json.dumps(as_json([row.summary for row in rows]), indent=1))
    elif rows:
        print("\n".join(lines(rows, _CELL_WIDTH if sys.stdout.isatty() else 200)))
    else:
        print(f"no run meets the conditions; {len(summaries)} do not", file=sys.stderr)


def _tag(arguments: argparse.Namespace) -> int:
    return look_up("tag", lambda: _change_tags(arguments))


def _change_tags(arguments: argparse.Namespace) -> None:
    from mappo.runs.locations import open_store
    from mappo.runs.tags import read_tags, write_tags

    store = open_store(find_run(arguments.run_location))
    if not store.entries("attempts/"):
        raise NoCheckpoint(f"{store.location}: there is no run here")
    tags = read_tags(store).changed(arguments.tags, arguments.remove, arguments.comment)
    if arguments.tags or arguments.remove or arguments.comment is not None:
        write_tags(store, tags)
    print(" ".join(tags.tags) or "no tag")
    if tags.comment:
        print(tags.comment)
