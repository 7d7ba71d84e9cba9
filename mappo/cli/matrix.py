"""The commands `mappo matrix run | work | status | table | page`. Only those that train import torch."""

import argparse
import sys
from pathlib import Path

from mappo.cli.arguments import Commands, add_command, add_reporting_arguments, count
from mappo.cli.prechecks import require_possible_here
from mappo.cli.run_names import RUNS
from mappo.cli.status import look_up, notified_status, stage_status
from mappo.errors import ConfigError
from mappo.matrix.matrix import Matrix, read_matrix
from mappo.matrix.results_file import read_foreign
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.locations import require_location

_EXAMPLES = """examples:
  mappo matrix run benchmarks/matrix.yaml --workers 2      train what is missing, with two processes here
  mappo matrix work benchmarks/matrix.yaml                 help, on any machine with the same store and database
  mappo matrix status benchmarks/matrix.yaml               count the cells, and say why some are not done
  mappo matrix table benchmarks/matrix.yaml --markdown     print the table as Markdown
  mappo matrix table benchmarks/matrix.yaml --cells        print the results of all cells as CSV
  mappo matrix table FILE --results earlier.csv            with results whose runs are gone, or of another program
  mappo matrix page benchmarks/matrix.yaml --output m.html

docs/matrix.md explains the file, the table and its intervals.
"""


def add(commands: Commands) -> None:
    """Add the command with its actions."""
    command = add_command(
        commands, "matrix", None, "a matrix of tasks x algorithms x seeds: train it, show its state and its table"
    )
    command.epilog, command.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, execute, summary in (
        ("run", _run, "train and evaluate the cells that are not done; then write the tables and the page"),
        ("work", _work, "work on cells, beside any number of other workers anywhere; write no table"),
        ("status", _status, "count the cells by state, and list those that are not done, with the reason"),
        ("table", _table, "print the table, or the results of all cells"),
        ("page", _page, "write the table, the learning curves and what is missing as one HTML page"),
    ):
        action = add_command(actions, name, execute, summary)
        action.add_argument("file", type=Path, metavar="FILE", help="YAML file of the matrix, see docs/matrix.md")
        action.add_argument(
            "--store",
            default=RUNS,
            metavar="STORE",
            help="store of the cells' runs, each at STORE/NAME/TASK-ALGORITHM-SEED: a directory or "
            f"s3://bucket/prefix (default: {RUNS})",
        )
        action.add_argument(
            "--results",
            type=Path,
            action="append",
            default=[],
            metavar="FILE.csv",
            help="results of cells that the store lacks, in the form of `table --cells`; those with the "
            "configuration of a cell count as done; may be repeated",
        )
        if name == "run":
            action.add_argument(
                "--workers", type=count, default=1, metavar="N", help="number of worker processes (default: 1)"
            )
            action.add_argument(
                "--retry-failed",
                action="store_true",
                help="try all failed cells again (default: only those whose failure may pass, as of a store)",
            )
            add_reporting_arguments(action)
        if name == "table":
            form = action.add_mutually_exclusive_group()
            form.add_argument(
                "--cells", action="store_true", help="print one row for each cell as CSV, with all numbers"
            )
            form.add_argument("--csv", action="store_true", help="print the table as CSV, with exact numbers")
            form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
        if name in ("table", "page"):
            default = (
                "the terminal"
                if name == "table"
                else "matrix.html, beside the runs, or below runs/ if these are in a bucket"
            )
            action.add_argument("--output", type=Path, metavar="FILE", help=f"file to write (default: {default})")


def _run(arguments: argparse.Namespace) -> int:
    matrix = _checked(arguments)
    from mappo.stages.whole_matrix import run_matrix

    return notified_status(
        arguments,
        f"matrix {matrix.name}",
        lambda: run_matrix(
            arguments.file,
            arguments.store,
            arguments.workers,
            arguments.results,
            retry_failed=arguments.retry_failed,
        ),
        {"store": arguments.store},
    )


def _work(arguments: argparse.Namespace) -> int:
    _checked(arguments)
    from mappo.stages.whole_matrix import work_on_cells

    return stage_status(lambda: work_on_cells(arguments.file, arguments.store, arguments.results))


def _checked(arguments: argparse.Namespace) -> Matrix:
    """Return the matrix, after all checks that need no torch."""
    matrix = read_matrix(arguments.file)
    require_location(arguments.store)
    read_foreign(arguments.results, matrix)
    MonitorSettings.from_environment()
    for pair in {(cell.task, cell.algorithm): cell for cell in matrix.cells}.values():
        require_possible_here(pair.config)
    return matrix


def _status(arguments: argparse.Namespace) -> int:
    from mappo.cli.matrix_look_ups import status_lines

    return look_up(
        "matrix", lambda: print("\n".join(status_lines(arguments.file, arguments.store, arguments.results)))
    )


def _table(arguments: argparse.Namespace) -> int:
    from mappo.cli.matrix_look_ups import table_text

    form = next((form for form in ("cells", "csv", "markdown") if getattr(arguments, form)), "terminal")
    return look_up(
        "matrix",
        lambda: _write(table_text(arguments.file, arguments.store, arguments.results, form), arguments.output),
    )


def _page(arguments: argparse.Namespace) -> int:
    from mappo.cli.matrix_look_ups import write_page

    return look_up(
        "matrix",
        lambda: print(write_page(arguments.file, arguments.store, arguments.results, arguments.output)),
    )


def _write(text: str, output: Path | None) -> None:
    if not output:
        sys.stdout.write(text)
        return
    from mappo.runs.owned_file import write_whole

    try:
        write_whole(output, text)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
