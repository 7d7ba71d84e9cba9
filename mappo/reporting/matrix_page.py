"""The self-contained HTML page of a matrix: its table, learning curves, what is missing, and links to the runs.

The curves are drawn here, as SVG: a page of many tasks needs no script, and stays small.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mappo.errors import one_line
from mappo.matrix.cell_result import CellResult, learning_curves
from mappo.matrix.matrix import Matrix
from mappo.matrix.matrix_table import INTERVALS, MatrixTable
from mappo.reporting.html import render
from mappo.reporting.matrix_texts import HEADS, overall_lines, row_texts
from mappo.reporting.texts import moment

RUN_PAGE = "report.html"  # a run's own page, in its directory
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 200, 46, 8, 8, 22  # of a plot, in its own units
_MAX_POINTS = 200  # of a line
_NUM_STYLES = 6  # of lines in page.css
Curve = list[tuple[int, float]]
_STATES = {"done": "good", "failed": "problem", "conflict": "problem"}


@dataclass(frozen=True)
class _Line:
    """A line of a plot. points: as SVG has them. style: the number of the algorithm. is_mean: over seeds."""

    points: str
    style: int
    is_mean: bool


def build(matrix: Matrix, table: MatrixTable, results: Sequence[CellResult], store: str, path: Path) -> str:
    """Return the page, which will lie at `path`: links to the pages of runs in a directory are relative to it."""
    algorithms = list(dict.fromkeys([*matrix.algorithms, *(row.algorithm for row in table.rows)]))
    return render(
        "matrix.html",
        title=f"Matrix {matrix.name}",
        subtitle=f"{len(matrix.tasks)} tasks x {len(matrix.algorithms)} algorithms x {len(matrix.seeds)} seeds. "
        f"{table.num_done} of {table.num_cells} cells are done. As of {moment(time.time())}.",
        heads=HEADS,
        rows=[row_texts(row) for row in table.rows],
        overall=overall_lines(table),
        intervals=INTERVALS,
        reference=table.reference,
        missing=[*table.missing(), *table.notes],
        plots=_plots(matrix, table, store),
        legend=[(name, index % _NUM_STYLES) for index, name in enumerate(algorithms)],
        cells=[_cell(result, path) for result in results],
        store=store,
    )


def _cell(result: CellResult, path: Path) -> dict[str, Any]:
    return {
        "name": f"{result.task}-{result.algorithm}-{result.seed}",
        "link": _link(result.source, path),
        "state": result.state,
        "style": _STATES.get(result.state, "look"),
        "texts": [
            "" if value is None else form.format(value)
            for value, form in (
                (result.return_mean, "{:.4g}"),
                (result.success, "{:.3g}"),
                (result.collisions, "{:.3g}"),
                (result.frames, "{:,}"),
                (result.judged_frames, "{:,}"),
                (result.seconds, "{:.0f} s"),
                (result.config_hash[:12], "{}"),
            )
        ],
        "reason": one_line(result.reason),
    }


def _link(source: str, path: Path) -> str:
    """Return the relative link to the page of a run; empty if the run has none here."""
    page = Path(source, RUN_PAGE)
    if "://" in source or not page.is_file():
        return ""
    return quote(os.path.relpath(page.absolute(), path.absolute().parent))


def _plots(matrix: Matrix, table: MatrixTable, store: str) -> list[dict[str, Any]]:
    """Return the plot of each task whose cells have been evaluated during training."""
    curves: dict[tuple[str, str], list[Curve]] = {}
    for cell, curve in zip(matrix.cells, learning_curves(matrix, store, matrix.cells), strict=True):
        curves.setdefault((cell.task, cell.algorithm), []).extend([curve] if curve else [])
    plots = []
    for task in matrix.tasks:
        of_task = {algorithm: curves[task.name, algorithm] for algorithm in task.algorithms}
        if any(of_task.values()):
            baselines = next(
                ([row.random, row.heuristic] for row in table.rows if row.task == task.name and row.seeds),
                [None, None],
            )
            styles = {name: matrix.algorithms.index(name) % _NUM_STYLES for name in task.algorithms}
            plots.append({"task": task.name, **_plot(of_task, styles, baselines)})
    return plots


def _plot(
    curves: dict[str, list[Curve]], styles: dict[str, int], baselines: Sequence[float | None]
) -> dict[str, Any]:
    points = [point for of_algorithm in curves.values() for curve in of_algorithm for point in curve]
    values = [value for _, value in points] + [value for value in baselines if value is not None]
    low, high, last = min(values), max(values), max(frames for frames, _ in points)
    span = high - low or 1.0

    def x(frames: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * frames / (last or 1)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / span

    def line(curve: Curve, algorithm: str, is_mean: bool) -> _Line:
        thin = [*curve[:: len(curve) // _MAX_POINTS + 1], *curve[-1:]]
        text = " ".join(f"{x(frames):.1f},{y(value):.1f}" for frames, value in thin)
        return _Line(text, styles[algorithm], is_mean)

    lines = [line(curve, name, False) for name, of_name in curves.items() for curve in of_name]
    lines += [line(_mean(of_name), name, True) for name, of_name in curves.items() if of_name]
    named = zip(("random", "heuristic"), baselines, strict=True)
    return {
        "lines": lines,
        "baselines": [(name, f"{y(value):.1f}") for name, value in named if value is not None],
        "ticks": [(f"{y(value):.1f}", f"{value:.3g}") for value in dict.fromkeys((low, high))],
        "last": f"{last:,}",
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
    }


def _mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean of curves, at the frames at which all of them were evaluated."""
    by_frames: dict[int, list[float]] = {}
    for curve in curves:
        for frames, value in curve:
            by_frames.setdefault(frames, []).append(value)
    return [
        (frames, sum(values) / len(values))
        for frames, values in sorted(by_frames.items())
        if len(values) == len(curves)
    ]
