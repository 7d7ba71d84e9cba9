"""The files that a matrix leaves beside its runs: the results of cells, the table, and the page."""

from collections.abc import Sequence
from pathlib import Path

from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Matrix
from mappo.matrix.matrix_table import make_table
from mappo.matrix.results_file import cells_csv
from mappo.reporting import matrix_page
from mappo.reporting.matrix_texts import markdown, table_csv
from mappo.runs.owned_file import write_whole
from mappo.tuning.database_url import RUNS

CELLS, TABLE_CSV, TABLE, PAGE = "cells.csv", "table.csv", "table.md", "matrix.html"


def matrix_directory(store: str, name: str) -> Path:
    """Return the directory of a matrix's files: that of its runs, or one below runs/ if these are in a bucket."""
    return (RUNS if "://" in store else Path(store)) / name


def write_files(
    matrix: Matrix, results: Sequence[CellResult], notes: Sequence[str], store: str, directory: Path
) -> Path:
    """Write cells.csv, table.csv, table.md and the page of a matrix; return the page.

    Raises:
        OSError: a file cannot be written.
    """
    table = make_table(matrix, results, notes)
    for name, text in ((CELLS, cells_csv(results)), (TABLE_CSV, table_csv(table)), (TABLE, markdown(table))):
        write_whole(directory / name, text)
    page = directory / PAGE
    write_whole(page, matrix_page.build(matrix, table, results, store, page))
    return page
