"""The stage that writes the tables and the page of a matrix, from the runs in a store."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import mappo
from mappo.errors import ConfigError
from mappo.matrix.cell_result import State, read_results
from mappo.matrix.matrix import matrix_from_json
from mappo.matrix.matrix_table import MatrixTable, make_table
from mappo.matrix.results_file import cells_csv
from mappo.reporting import matrix_page
from mappo.reporting.matrix_texts import markdown, table_csv, table_lines
from mappo.reporting.terminal import say
from mappo.runs.owned_file import write_whole
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult


@dataclass(frozen=True)
class MatrixFiles:
    """The files to write: the results of cells as CSV, the table as CSV and as Markdown, and the HTML page."""

    cells: Path
    table: Path
    markdown: Path
    page: Path


def summarise(matrix: str, store: str, files: MatrixFiles) -> StageResult:
    """Write the tables and the page of a matrix; print the table, and why cells are missing.

    `matrix` is the JSON of a matrix. Cells that failed or have not ended are counted, and are no error.

    Raises:
        StageFailed: no cell is done, or the store cannot be read.
    """
    with readable_errors("summarise"):
        whole = matrix_from_json(matrix)
        results = read_results(whole, store, whole.cells)
        table = make_table(whole, results)
        for line in table_lines(table):
            say("summarise", line)
        if not table.num_done:
            raise ConfigError(f"none of the {table.num_cells} cells of {whole.name} is done: there is no result")
        write_whole(files.cells, cells_csv(results))
        write_whole(files.table, table_csv(table))
        write_whole(files.markdown, markdown(table))
        write_whole(files.page, matrix_page.build(whole, table, results, store, files.page))
        counts = Counter(result.state for result in results)
        say("summarise", f"{table.num_done} of {table.num_cells} cells are done, {counts['failed']} failed")
        labels = {"matrix": whole.name, "mappo_version": mappo.__version__}
        return StageResult(labels, _metrics(table, counts))


def _metrics(table: MatrixTable, counts: Counter[State]) -> dict[str, float]:
    """Return the number of cells in each state, and each algorithm's probability of improvement."""
    numbers = {"num_cells": float(table.num_cells)}
    numbers |= {f"num_{state}_cells": float(counts[state]) for state in get_args(State)}
    return numbers | {f"improvement_{each.algorithm}": each.improvement.value for each in table.overall}
