"""The page of an overview: a table of runs to filter and to sort, with links to the pages of the runs."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mappo.errors import one_line
from mappo.reporting.html import render
from mappo.reporting.overview_table import TEXT_COLUMNS, Row, cells, columns_of
from mappo.reporting.texts import moment
from mappo.runs.owned_file import write_whole


def write(path: Path, store: str, rows: Sequence[Row], directory: Path | None) -> None:
    """Write the page of these rows. `directory` is that of the store, if it is one: its pages get links.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, build(store, rows, directory))


def build(store: str, rows: Sequence[Row], directory: Path | None) -> str:
    """Return the page. Links are relative to the directory of the store, in which the page lies."""
    columns = columns_of(rows) if rows else []
    studies = sorted(directory.glob("*/study.html")) if directory else []
    return render(
        "overview.html",
        title=one_line(f"Runs in {store}"),
        subtitle=f"As of {moment(time.time())}.",
        columns=[{"name": name, "is_number": name not in TEXT_COLUMNS} for name in columns],
        rows=[_row(row, columns, linked=directory is not None) for row in rows],
        studies=[(one_line(study.parent.name), _link(f"{study.parent.name}/{study.name}")) for study in studies],
    )


def _row(row: Row, columns: Sequence[str], linked: bool) -> dict[str, Any]:
    summary = row.summary
    texts = cells(row, columns)
    return {
        "link": _link(summary.page) if linked and summary.page else "",
        "location": shlex.quote(one_line(summary.location)),
        "cells": [
            {"text": text, "column": name, "sort": _sort_value(row, name)}
            for name, text in zip(columns, texts, strict=True)
        ],
    }


def _link(key: str) -> str:
    """Return the relative link to a file of the store's directory, whose name may be any bytes."""
    return quote(os.fsencode(key))


def _sort_value(row: Row, column: str) -> Any:
    """Return the number by which the page sorts a cell; empty where it sorts by the text."""
    value = row.fields.get(column)
    return value if isinstance(value, int | float) else ""
