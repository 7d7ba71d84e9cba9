"""The look-ups of `mappo matrix`: state, table and page. They import no torch."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mappo.errors import ConfigError
from mappo.matrix.cell_result import CellResult, read_results
from mappo.matrix.matrix import Matrix, read_matrix
from mappo.matrix.matrix_table import make_table
from mappo.matrix.results_file import cells_csv, read_foreign, with_foreign


def status_lines(file: Path, store: str, results: Sequence[Path]) -> list[str]:
    """Return the number of cells by state, and why seeds have no result."""
    matrix, rows, notes = _results(file, store, results)
    cells = rows[: len(matrix.cells)]
    counts = Counter(row.state for row in cells)
    described = [f"{count} {state}" for state, count in counts.items() if state != "done"]
    head = ", ".join([f"{counts['done']} of {len(cells)} cells done", *described])
    table = make_table(matrix, rows)
    return [f"{matrix.name}: {head}", *table.missing(), *notes]


def table_text(file: Path, store: str, results: Sequence[Path], form: str) -> str:
    """Return the table of a matrix as `terminal`, `csv` or `markdown`, or its `cells` as CSV."""
    from mappo.reporting import matrix_texts

    matrix, rows, notes = _results(file, store, results)
    if form == "cells":
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        return cells_csv(rows)
    table = make_table(matrix, rows, notes)
    if form == "csv":
        return matrix_texts.table_csv(table)
    return (
        matrix_texts.markdown(table) if form == "markdown" else "\n".join([*matrix_texts.table_lines(table), ""])
    )


def write_page(file: Path, store: str, results: Sequence[Path], output: Path | None) -> str:
    """Write the page of a matrix, and return the line that says where.

    Raises:
        ConfigError: the file cannot be written.
    """
    from mappo.reporting import matrix_files, matrix_page
    from mappo.runs.owned_file import write_whole

    matrix, rows, notes = _results(file, store, results)
    path = output or matrix_files.matrix_directory(store, matrix.name) / matrix_files.PAGE
    try:
        write_whole(path, matrix_page.build(matrix, make_table(matrix, rows, notes), rows, store, path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return f"page: {path.absolute().as_uri()}"


def _results(file: Path, store: str, results: Sequence[Path]) -> tuple[Matrix, list[CellResult], list[str]]:
    matrix = read_matrix(file)
    foreign = read_foreign(results, matrix)
    rows, notes = with_foreign(matrix, read_results(matrix, store, matrix.cells), foreign)
    return matrix, rows, notes
