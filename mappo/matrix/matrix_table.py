"""The table of a matrix: one row for each task and algorithm, with statistics over training seeds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mappo.evaluation import statistics
from mappo.evaluation.statistics import Estimate
from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Matrix, Task

INTERVALS = (
    "95 % intervals over training seeds. Means: Student's t. Interquartile means and probabilities: a bootstrap "
    "of the seeds, which is too narrow for fewer than about ten seeds"
)


@dataclass(frozen=True)
class TableRow:
    """The results of an algorithm on a task.

    seeds: those with a result. num_planned: the seeds that the matrix wants. The estimates are over seeds; None
    without a result. improvement: the probability that a seed of this algorithm earns more than one of the task's
    first algorithm; None for that one itself. random, heuristic: the mean return of the untrained policies.
    frames, seconds: the means of training. hardware: where the cells were trained. config_hash: that of the first
    of the seeds. missing: why the other seeds have no result. notes: what a reader should know about the results.
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    num_planned: int
    return_mean: Estimate | None
    interquartile_mean: Estimate | None
    improvement: Estimate | None
    success: Estimate | None
    collisions: Estimate | None
    random: float | None
    heuristic: float | None
    frames: float | None
    seconds: float | None
    hardware: tuple[str, ...]
    config_hash: str
    missing: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Overall:
    """An algorithm against the first one of the matrix: the mean over tasks of its probability of improvement."""

    algorithm: str
    num_tasks: int
    improvement: Estimate


@dataclass(frozen=True)
class MatrixTable:
    """The table of a matrix. reference: its first algorithm. notes: sentences about results that are not used."""

    name: str
    rows: tuple[TableRow, ...]
    overall: tuple[Overall, ...]
    reference: str
    num_done: int
    num_cells: int
    notes: tuple[str, ...]

    def missing(self) -> list[str]:
        """Return why seeds have no result, one line for each reason, and the notes about rows."""
        return [f"{row.task}, {row.algorithm}: {text}" for row in self.rows for text in (*row.missing, *row.notes)]


def make_table(matrix: Matrix, results: Sequence[CellResult], notes: Sequence[str] = ()) -> MatrixTable:
    """Return the table of these results, which begin with those of the matrix's cells."""
    by_pair: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        by_pair.setdefault((result.task, result.algorithm), []).append(result)
    rows: list[TableRow] = []
    for task in matrix.tasks:
        others = sorted({algorithm for name, algorithm in by_pair if name == task.name} - set(task.algorithms))
        reference = by_pair[task.name, task.algorithms[0]]
        for algorithm in (*task.algorithms, *others):
            cells = by_pair[task.name, algorithm]
            num_planned = len(matrix.seeds) if algorithm in task.algorithms else len(cells)
            rows.append(_row(task, cells, None if cells is reference else reference, num_planned))
    return MatrixTable(
        name=matrix.name,
        rows=tuple(rows),
        overall=tuple(_overall(matrix, by_pair)),
        reference=matrix.algorithms[0],
        num_done=sum(result.state == "done" for result in results[: len(matrix.cells)]),
        num_cells=len(matrix.cells),
        notes=tuple(notes),
    )


def _row(
    task: Task, cells: Sequence[CellResult], reference: Sequence[CellResult] | None, num_planned: int
) -> TableRow:
    done = [cell for cell in cells if cell.state == "done"]
    returns, opposed = _returns(cells), _returns(reference or ())
    return TableRow(
        task=task.name,
        algorithm=cells[0].algorithm,
        seeds=tuple(cell.seed for cell in done),
        num_planned=num_planned,
        return_mean=_over(statistics.mean_over_seeds, returns),
        interquartile_mean=_over(statistics.interquartile_mean, returns),
        improvement=statistics.probability_of_improvement(returns, opposed) if returns and opposed else None,
        success=_over(statistics.mean_over_seeds, [cell.success for cell in done]),
        collisions=_over(statistics.mean_over_seeds, [cell.collisions for cell in done]),
        random=_mean(cell.random for cell in done),
        heuristic=_mean(cell.heuristic for cell in done),
        frames=_mean(cell.frames for cell in done),
        seconds=_mean(cell.seconds for cell in done),
        hardware=tuple(dict.fromkeys(text for cell in done if (text := _hardware(cell)))),
        config_hash=done[0].config_hash if done else "",
        missing=tuple(_missing(cells)),
        notes=tuple(_notes(cells, done, reference)),
    )


def _returns(cells: Iterable[CellResult]) -> list[float]:
    return [cell.return_mean for cell in cells if cell.state == "done" and cell.return_mean is not None]


def _over(estimate: Callable[[Sequence[float]], Estimate], values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.plain_mean(known).value if known else None


def _hardware(cell: CellResult) -> str:
    threads = f", {cell.threads} thread{'s' if cell.threads != 1 else ''}" if cell.threads else ""
    return cell.hardware + threads if cell.hardware else ""


def _missing(cells: Sequence[CellResult]) -> Iterable[str]:
    """Yield why seeds have no result; those with the same reason are one sentence."""
    seeds: dict[str, list[str]] = {}
    for cell in cells:
        if cell.state != "done":
            seeds.setdefault(_why(cell), []).append(str(cell.seed))
    for why, numbers in seeds.items():
        yield f"seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} {why}"


def _why(cell: CellResult) -> str:
    progress = ""
    if cell.state == "begun" and cell.frames is not None and cell.final_frames:
        progress = f" ({cell.frames:,} of {cell.final_frames:,} frames)"
    return f"{cell.state}{progress}" + (f": {cell.reason}" if cell.reason else "")


def _notes(
    cells: Sequence[CellResult], done: Sequence[CellResult], reference: Sequence[CellResult] | None
) -> Iterable[str]:
    yield from dict.fromkeys(f"{cell.reason}" for cell in done if cell.reason)
    hashes = {cell.evaluation_hash for cell in (*done, *(reference or cells))}
    if done and any(cell.evaluation_hash == "" for cell in done):
        yield "nobody knows whether it was judged on the same episodes as the others"
    elif done and len(hashes - {""}) > 1:
        yield "judged on other episodes than the task's first algorithm; not comparable"


def _overall(matrix: Matrix, by_pair: dict[tuple[str, str], list[CellResult]]) -> Iterable[Overall]:
    """Yield each other algorithm against the first one, over the tasks on which both have results."""
    first = matrix.algorithms[0]
    others = dict.fromkeys([*matrix.algorithms[1:], *sorted({name for _, name in by_pair})])
    for algorithm in others:
        if algorithm == first:
            continue
        pairs = [
            (_returns(by_pair.get((task.name, algorithm), ())), _returns(by_pair.get((task.name, first), ())))
            for task in matrix.tasks
        ]
        known = [(values, opposed) for values, opposed in pairs if values and opposed]
        if known:
            yield Overall(algorithm, len(known), statistics.mean_probability_of_improvement(known))
