"""Print tables for people, JSON for scripts, and notes on the error stream."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from shutil import get_terminal_size
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table

from pipelines.kubeflow.api import Trying

_STYLES = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "red", "CANCELED": "yellow", "CANCELING": "yellow"}
_WIDTH = 200  # of what goes into a file
_REWRITE = "\r\x1b[K"  # the line of a terminal


def add_output_argument(command: argparse.ArgumentParser) -> None:
    """Add `--output`."""
    command.add_argument(
        "--output", choices=("table", "json"), default="table", help="for people or for scripts (default: table)"
    )


class _Console(Console):
    """A console that leaves a closed pipe to the command, as `print` does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Return the terminal, or a file that is wide enough for a row on a line."""
    return _Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of equal keys, which head the columns."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        made.add_column(name.replace("_", " "), overflow="fold", no_wrap=name != "message")
    for row in rows:
        made.add_row(
            *("" if value is None else str(value) for value in row.values()),
            style=_STYLES.get(row.get("state", "")),
        )
    return made


def show_rows(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], empty: str) -> None:
    """Rows of equal keys, as a table or as a JSON list."""
    if arguments.output == "json":
        print(json.dumps([dict(row) for row in rows], indent=1))
    elif rows:
        console().print(table(rows))
    else:
        print(empty)


def show_one(arguments: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Print one thing, as lines or as a JSON object."""
    if arguments.output == "json":
        print(json.dumps(dict(values), indent=1))
        return
    width = max(map(len, values))
    for name, value in values.items():
        if value not in ("", None):
            print(f"{name.replace('_', ' '):<{width}}  {value}")


def show_trying(trying: Trying) -> None:
    """Show that a request is tried again: on a terminal in one line that counts, else in two lines in all."""
    count = f"tried {trying.tries} times in {trying.seconds:.0f} s"
    if sys.stderr.isatty() and not isinstance(sys.stderr, FileProxy):  # which shows whole lines only
        text = f"note: {count}" if trying.is_over else f"note: {count}: {trying.reason}"
        shown = f"{_REWRITE}{text[: get_terminal_size().columns - 1]}"
        print(shown, end="\n" if trying.is_over else "", file=sys.stderr, flush=True)
    elif trying.is_over:
        print(f"note: {count}", file=sys.stderr, flush=True)
    elif trying.tries == 1:
        print(f"note: {trying.reason}; trying again", file=sys.stderr, flush=True)


def moment(when: datetime | None) -> str:
    """A time in UTC, to the second; empty for none, or for 1970, which is the server's word for none."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if when and when.year > 1970 else ""


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
