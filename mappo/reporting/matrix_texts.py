"""The table of a matrix for a terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Callable

from mappo.evaluation.statistics import Estimate
from mappo.matrix.matrix_table import INTERVALS, MatrixTable, TableRow
from mappo.reporting.texts import aligned

HEADS = (
    *("task", "algorithm", "seeds", "mean return", "interquartile mean", "better than the first", "success"),
    *("collisions", "random", "heuristic", "frames", "training", "hardware", "configuration"),
)
NUM_TEXTS = 2  # columns at the left that hold texts
_ESTIMATES = ("return_mean", "interquartile_mean", "improvement", "success", "collisions")


def table_lines(table: MatrixTable) -> list[str]:
    """Return the table for a terminal, with the lines below it."""
    rows = [list(HEADS), *(row_texts(row) for row in table.rows)]
    return [*aligned(rows, range(NUM_TEXTS)), *overall_lines(table), *_missing_lines(table), INTERVALS]


def markdown(table: MatrixTable) -> str:
    """Return the table as Markdown, with the lines below it."""
    rows = [HEADS, ["---"] * NUM_TEXTS + ["---:"] * (len(HEADS) - NUM_TEXTS), *map(_markdown_cells, table.rows)]
    lines = [f"# {table.name}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    for paragraph in (overall_lines(table), _missing_lines(table)):
        lines += ["", *(f"- {_escaped(line)}" for line in paragraph)] if paragraph else []
    return "\n".join([*lines, "", f"{INTERVALS}.", ""])


def table_csv(table: MatrixTable) -> str:
    """Return the table as CSV with exact numbers; the ends of an interval are columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{end}" for name in _ESTIMATES for end in ("", "_low", "_high")]
    plain = ("random", "heuristic", "frames", "seconds")
    writer.writerow(
        ["task", "algorithm", "seeds", "num_planned", *ends, *plain, "hardware", "config_hash", "missing", "notes"]
    )
    for row in table.rows:
        numbers = [number for name in _ESTIMATES for number in _ends(getattr(row, name))]
        writer.writerow(
            [row.task, row.algorithm, " ".join(map(str, row.seeds)), row.num_planned]
            + ["" if number is None else number for number in (*numbers, *(getattr(row, name) for name in plain))]
            + ["; ".join(row.hardware), row.config_hash, "; ".join(row.missing), "; ".join(row.notes)]
        )
    return text.getvalue()


def row_texts(row: TableRow) -> list[str]:
    """Return the cells of a row for people; a cell without a value is empty."""
    num_done = len(row.seeds)
    return [
        row.task,
        row.algorithm,
        str(num_done) if num_done == row.num_planned else f"{num_done} of {row.num_planned}",
        *("" if (estimate := getattr(row, name)) is None else str(estimate) for name in _ESTIMATES),
        _number(row.random, "{:.3g}".format),
        _number(row.heuristic, "{:.3g}".format),
        _number(row.frames, "{:,.0f}".format),
        _number(row.seconds, lambda seconds: f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"),
        "; ".join(row.hardware),
        row.config_hash[:12],
    ]


def overall_lines(table: MatrixTable) -> list[str]:
    """Return a line for each algorithm that is compared with the first over all tasks."""
    return [
        f"{overall.algorithm} is better than {table.reference} with a probability of {overall.improvement}, "
        f"the mean over {overall.num_tasks} task{'s' if overall.num_tasks != 1 else ''}"
        for overall in table.overall
    ]


def _missing_lines(table: MatrixTable) -> list[str]:
    """Return what is missing, one line for each reason; empty if nothing is."""
    head = [] if table.num_done == table.num_cells else [f"{table.num_done} of {table.num_cells} cells are done"]
    return [*head, *table.missing(), *table.notes]


def _ends(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _markdown_cells(row: TableRow) -> list[str]:
    """Return the cells of a row as Markdown. Only the hardware of a file of results may be any text."""
    texts = row_texts(row)
    return [_escaped(text) if name == "hardware" else text for name, text in zip(HEADS, texts, strict=True)]


def _escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    for character in "\\|<`*[":
        text = text.replace(character, f"\\{character}")
    return text
