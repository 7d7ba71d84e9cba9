"""The rows of cells as CSV: written from a store, and read again as results whose runs are elsewhere or gone."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from mappo.config import config_hash, require_run_name
from mappo.environment.reductions import is_measurement_name
from mappo.errors import ConfigError, hint_for, one_line
from mappo.matrix.cell_result import CellResult, State
from mappo.matrix.matrix import Cell, Matrix

MEASURED = "measured_"  # the columns of measurements begin with it
COLUMNS = tuple(item.name for item in fields(CellResult) if item.name != "measurements")
_REQUIRED = ("task", "algorithm", "seed", "return_mean")
_WHOLE = ("frames", "final_frames", "judged_frames", "threads")
_NUMBERS = ("return_mean", "random", "heuristic", "success", "collisions", "seconds")
_MAX_BYTES, _MAX_CELL = 50_000_000, 10_000
_MAX_SEED = 2**32
_LARGEST = 1e100  # so that sums and squares are finite, too


@dataclass(frozen=True)
class Foreign:
    """The results of files, by task, algorithm and seed."""

    rows: Mapping[tuple[str, str, int], CellResult] = field(default_factory=dict)


def cells_csv(rows: Sequence[CellResult]) -> str:
    """Return results as CSV, one row a cell, with exact numbers; empty where there is none."""
    names = sorted({name for row in rows for name in row.measurements})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(MEASURED + name for name in names)])
    for row in rows:
        values = [getattr(row, column) for column in COLUMNS] + [row.measurements.get(name) for name in names]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def read_foreign(paths: Sequence[Path], matrix: Matrix) -> Foreign:
    """Read files of results; a cell may appear once in all of them.

    Raises:
        ConfigError: a file cannot be read, or a row is wrong; the message names the file and the line.
    """
    rows: dict[tuple[str, str, int], CellResult] = {}
    for path in paths:
        for line, row in _read(path, matrix):
            if row.key in rows:
                first = rows[row.key].source
                raise ConfigError(
                    f"{path}: line {line}: {row.task}, {row.algorithm}, seed {row.seed}: given already, in {first}"
                )
            rows[row.key] = row
    return Foreign(rows)


def with_foreign(
    matrix: Matrix, own: Sequence[CellResult], foreign: Foreign
) -> tuple[list[CellResult], list[str]]:
    """Return the results of a store with those from files, and sentences about rows that are not used.

    The first ones are those of the matrix's cells, in their order; a row of a file takes the place of a cell that
    is not done, if it has the same configuration. Rows of other algorithms, and of other seeds with the same
    configuration, follow.
    """
    left, notes = dict(foreign.rows), []
    results = []
    for cell, result in zip(matrix.cells, own, strict=True):
        row = left.pop((cell.task, cell.algorithm, cell.seed), None)
        if row is None or row.state != "done" or result.state == "done":
            results.append(result)
        elif row.config_hash == cell.config_hash:
            results.append(_named(matrix, row))
        else:
            notes.append(_other_configuration(row))
            results.append(result)
    configs = {(cell.task, cell.algorithm): cell for cell in matrix.cells}
    for row in left.values():
        cell_of_pair = configs.get((row.task, row.algorithm))
        if cell_of_pair and row.config_hash != _hash_with_seed(cell_of_pair, row.seed):
            notes.append(_other_configuration(row))
        else:
            results.append(_named(matrix, row))
    return results, notes


def _hash_with_seed(cell: Cell, seed: int) -> str:
    return config_hash(replace(cell.config, seed=seed))


def _other_configuration(row: CellResult) -> str:
    which = f"the configuration {row.config_hash[:12]}" if row.config_hash else "no hash of its configuration"
    cell = f"{row.task}, {row.algorithm}, seed {row.seed}"
    return f"{row.source}: {cell}: not used, because it has {which}, which is not the one of the matrix"


def _named(matrix: Matrix, row: CellResult) -> CellResult:
    """Return a row of a file with the measurements that the task names in the columns for these."""
    task = matrix.task(row.task)
    return replace(
        row,
        success=row.measurements.get(task.success, row.success),
        collisions=row.measurements.get(task.collisions, row.collisions),
    )


def _read(path: Path, matrix: Matrix) -> Iterator[tuple[int, CellResult]]:
    reader = csv.reader(io.StringIO(_text_of(path)), strict=True)
    try:
        header = next(reader, [])
        _require_header(header)
        for cells in reader:
            if cells:
                yield reader.line_num, _row(path, reader.line_num, header, cells, matrix)
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: line {max(1, reader.line_num)}: {error}") from None


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: has more than {_MAX_BYTES} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None


def _require_header(header: Sequence[str]) -> None:
    for column in header:
        name = column.removeprefix(MEASURED)
        if column not in COLUMNS and (name == column or not is_measurement_name(name)):
            known = f"the columns are {', '.join(COLUMNS)}, and {MEASURED}NAME"
            raise ConfigError(f"{one_line(column, 80)!r}: unknown column; {hint_for(column, COLUMNS, known)}")
        if header.count(column) > 1:
            raise ConfigError(f"{column}: this column appears twice")
    if missing := [column for column in _REQUIRED if column not in header]:
        raise ConfigError(f"{missing[0]}: this column is missing; needed are {', '.join(_REQUIRED)}")


def _row(path: Path, line: int, header: Sequence[str], cells: Sequence[str], matrix: Matrix) -> CellResult:
    if len(cells) != len(header):
        raise ConfigError(f"{len(cells)} cells, but the header has {len(header)}")
    if long := next((cell for cell in cells if len(cell) > _MAX_CELL), None):
        raise ConfigError(f"a cell with {len(long)} characters; at most {_MAX_CELL} are read")
    texts = dict(zip(header, cells, strict=True))
    values: dict[str, Any] = {
        **{name: one_line(text, _MAX_CELL) for name, text in texts.items() if not name.startswith(MEASURED)},
        **_parsed(texts, ("seed", *_WHOLE), _whole),
        **_parsed(texts, _NUMBERS, _number),
    }
    measured = tuple(name for name in header if name.startswith(MEASURED))
    numbers = {name.removeprefix(MEASURED): value for name, value in _parsed(texts, measured, _number).items()}
    values["measurements"] = {name: value for name, value in numbers.items() if value is not None}
    _require_cell(values, matrix)
    values["source"] = f"{path}: line {line}"
    return CellResult(**values)


def _require_cell(values: dict[str, Any], matrix: Matrix) -> None:
    """Check the names, the seed and the state of a row, and that a result has a return."""
    tasks = [task.name for task in matrix.tasks]
    if values["task"] not in tasks:
        hint = hint_for(values["task"], tasks, f"its tasks are {', '.join(tasks)}")
        raise ConfigError(f"task = {one_line(values['task'], 80)!r}: not a task of the matrix; {hint}")
    require_run_name(values["algorithm"], "algorithm")
    if values["seed"] is None or values["seed"] >= _MAX_SEED:
        raise ConfigError(f"seed: must be a whole number from 0 to {_MAX_SEED - 1}")
    values["state"] = values.get("state") or "done"
    if values["state"] not in get_args(State):
        raise ConfigError(f"state = {one_line(values['state'], 80)!r}: give one of {', '.join(get_args(State))}")
    if values["state"] == "done" and values["return_mean"] is None:
        raise ConfigError("return_mean: empty, although the cell is done")


def _parsed(texts: Mapping[str, str], names: Sequence[str], parse: Callable[[str, str], Any]) -> dict[str, Any]:
    return {name: parse(name, texts[name]) if texts[name] else None for name in names if name in texts}


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ConfigError(f"{name} = {one_line(text, 80)!r}: must be a whole number, 0 or more")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST or "_" in text:
        raise ConfigError(f"{name} = {one_line(text, 80)!r}: must be a number, at most {_LARGEST:g}")
    return value
