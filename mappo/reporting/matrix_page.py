"""The self-contained HTML page of a matrix: its table, learning curves, what is missing, and links to the runs."""

from collections.abc import Sequence
from pathlib import Path

from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Matrix
from mappo.matrix.matrix_table import MatrixTable


def build(matrix: Matrix, table: MatrixTable, results: Sequence[CellResult], store: str, path: Path) -> str:
    """Return the page, which will lie at `path`."""
    return f"{matrix.name} {table.name} {len(results)} {store} {path}"
