"""Print results as tables for people or JSON for scripts, and notes on the error stream."""

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

from pipelines.kubeflow.api import RetryNotice

_STYLES = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "red", "CANCELED": "yellow", "CANCELING": "yellow"}
_WIDTH = 200  # characters of a line if the output is not a terminal
_REWRITE = "\r\x1b[K"  # moves to the start of the terminal's line and clears it


def add_output_argument(command: argparse.ArgumentParser) -> None:
    """Add `--output`."""
    command.add_argument(
        "--output",
        choices=("table", "json"),
        default="table",
        help="format: table for people, json for scripts (default: table)",
    )


def console() -> Console:
    """Return a console for the standard output; if it is not a terminal, a row fits on one line."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table of rows with equal keys, which become the headings of the columns."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        result.add_column(name.replace("_", " "), overflow="fold", no_wrap=name != "message")
    for row in rows:
        result.add_row(
            *("" if value is None else str(value) for value in row.values()),
            style=_STYLES.get(row.get("state", "")),
        )
    return result


def show_rows(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], empty: str) -> None:
    """Print rows with equal keys, as a table or a JSON list; without rows, a table is replaced by `empty`."""
    if arguments.output == "json":
        print(json.dumps([dict(row) for row in rows], indent=1))
    elif rows:
        console().print(table(rows))
    else:
        print(empty)


def show_one(arguments: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Print named values, as lines or as a JSON object."""
    if arguments.output == "json":
        print(json.dumps(dict(values), indent=1))
        return
    width = max(map(len, values))
    for name, value in values.items():
        if value not in ("", None):
            print(f"{name.replace('_', ' '):<{width}}  {value}")


def show_retry(notice: RetryNotice) -> None:
    """Report retries of a request: on a terminal in one line that is updated, else in two lines in total."""
    count = f"tried {notice.tries} times in {notice.seconds:.0f} s"
    if sys.stderr.isatty() and not isinstance(sys.stderr, FileProxy):  # a FileProxy shows whole lines only
        text = f"note: {count}" if notice.is_over else f"note: {count}: {notice.reason}"
        line = f"{_REWRITE}{text[: get_terminal_size().columns - 1]}"
        print(line, end="\n" if notice.is_over else "", file=sys.stderr, flush=True)
    elif notice.is_over:
        print(f"note: {count}", file=sys.stderr, flush=True)
    elif notice.tries == 1:
        print(f"note: {notice.reason}; trying again", file=sys.stderr, flush=True)


def moment(when: datetime | None) -> str:
    """Format a time in UTC, to the second; empty for None and for 1970, by which the server means no time."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if when and when.year > 1970 else ""


def duration(seconds: float | None) -> str:
    """Format a duration as hours, minutes and seconds, such as 1:02:03; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
