"""The table of a matrix: statistics computed again by hand, and what partial tables say."""

import csv
import io
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mappo.evaluation import statistics
from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Matrix, read_matrix
from mappo.matrix.matrix_table import make_table
from mappo.matrix.results_file import cells_csv
from mappo.reporting.matrix_texts import markdown, table_csv, table_lines

FILE = """\
name: first
seeds: [0, 1, 2, 3, 4]
algorithms: {mappo: {}, ippo: {networks: {critic: own}}}
tasks: {navigation: {}, balance: {}}
"""
RETURNS = {
    ("navigation", "mappo"): [0.9, 0.8, 1.0, 0.2, 0.95],
    ("navigation", "ippo"): [0.9, 1.1, 1.2, 0.7, 1.3],
    ("balance", "mappo"): [50.0, 60.0, 55.0, 58.0, 52.0],
    ("balance", "ippo"): [51.0, 40.0, 45.0, 48.0, 59.0],
}


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    (tmp_path / "matrix.yaml").write_text(FILE)
    return read_matrix(tmp_path / "matrix.yaml")


@pytest.fixture
def results(matrix: Matrix) -> list[CellResult]:
    return [
        CellResult(
            *(cell.task, cell.algorithm, cell.seed, "done"),
            return_mean=RETURNS[cell.task, cell.algorithm][cell.seed],
            random=-0.5,
            success=cell.seed / 10,
            frames=84_000,
            seconds=40.0 + cell.seed,
            hardware="cpu",
            threads=1,
            config_hash=cell.config_hash,
            evaluation_hash=cell.task,
        )
        for cell in matrix.cells
    ]


def mann_whitney(values, reference) -> float:
    return float(np.mean([(x > y) + (x == y) / 2 for x, y in product(values, reference)]))


def test_statistics_equal_those_computed_by_hand_from_the_csv(matrix, results):
    cells = list(csv.DictReader(io.StringIO(cells_csv(results))))
    for row in csv.DictReader(io.StringIO(table_csv(make_table(matrix, results)))):
        returns, reference = (
            np.array(
                [
                    float(cell["return_mean"])
                    for cell in cells
                    if (cell["task"], cell["algorithm"], cell["state"]) == (row["task"], algorithm, "done")
                ]
            )
            for algorithm in (row["algorithm"], "mappo")
        )
        assert float(row["return_mean"]) == pytest.approx(returns.mean())
        half = stats.t.ppf(0.975, 4) * returns.std(ddof=1) / np.sqrt(5)
        assert float(row["return_mean_low"]) == pytest.approx(returns.mean() - half)
        assert float(row["return_mean_high"]) == pytest.approx(returns.mean() + half)
        assert float(row["interquartile_mean"]) == pytest.approx(np.sort(returns)[1:4].mean())
        resampled = np.sort(np.random.default_rng(1).choice(returns, (20_000, 5)))[:, 1:4].mean(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        tolerance = 0.1 * (high - low)  # the bootstrap has other random numbers
        assert float(row["interquartile_mean_low"]) == pytest.approx(low, abs=tolerance)
        assert float(row["interquartile_mean_high"]) == pytest.approx(high, abs=tolerance)
        if row["algorithm"] == "ippo":
            assert float(row["improvement"]) == pytest.approx(mann_whitney(returns, reference))
        else:
            assert row["improvement"] == ""
        assert (float(row["success"]), row["collisions"]) == (pytest.approx(0.2), "")
        assert (float(row["random"]), float(row["frames"]), float(row["seconds"])) == (-0.5, 84_000, 42)


def test_probability_over_all_tasks_is_the_mean_with_a_stratified_bootstrap(matrix, results):
    (overall,) = make_table(matrix, results).overall
    tasks = [
        (np.array(RETURNS[task, "ippo"]), np.array(RETURNS[task, "mappo"])) for task in ("navigation", "balance")
    ]
    assert overall.num_tasks == 2
    assert overall.improvement.value == pytest.approx(np.mean([mann_whitney(*task) for task in tasks]))
    rng = np.random.default_rng(1)
    drawn = [
        np.mean([mann_whitney(rng.choice(values, 5), rng.choice(reference, 5)) for values, reference in tasks])
        for _ in range(2_000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert overall.improvement.low == pytest.approx(low, abs=0.04)
    assert overall.improvement.high == pytest.approx(high, abs=0.04)


def test_interval_of_the_mean_probability_is_missing_if_a_task_has_one_value():
    estimate = statistics.mean_probability_of_improvement([([1.0, 2.0], [0.0, 3.0]), ([1.0], [0.0])])
    assert (estimate.value, estimate.low, estimate.high) == (0.75, None, None)


def test_partial_table_says_what_is_missing_and_why(matrix, results):
    results[0] = replace(results[0], state="failed", reason="broken | [x](y)", return_mean=None)
    results[1] = replace(results[1], state="begun", frames=6_000, final_frames=84_000, return_mean=None)
    results[10:15] = [replace(row, state="waiting", return_mean=None) for row in results[10:15]]
    table = make_table(matrix, results, ["a row is not used"])
    lines = table_lines(table)
    assert "13 of 20 cells are done" in lines
    assert "navigation, mappo: seed 0 failed: broken | [x](y)" in lines
    assert "navigation, mappo: seed 1 begun (6,000 of 84,000 frames)" in lines
    assert "balance, mappo: seeds 0, 1, 2, 3, 4 waiting" in lines
    assert "a row is not used" in lines
    assert table.rows[0].seeds == (2, 3, 4)
    assert table.rows[0].return_mean == statistics.mean_over_seeds([1.0, 0.2, 0.95])
    assert (table.rows[2].return_mean, table.rows[2].success) == (None, None)
    assert table.rows[3].improvement is None  # nothing to compare with
    assert [overall.num_tasks for overall in table.overall] == [1]
    assert "3 of 5" in lines[1]
    assert r"failed: broken \| \[x](y)" in markdown(table)


def test_rows_of_another_algorithm_stand_with_their_task_and_say_that_their_episodes_are_unknown(matrix, results):
    foreign = [CellResult("balance", "benchmarl", seed, "done", return_mean=57.0 + seed) for seed in range(2)]
    table = make_table(matrix, [*results, *foreign])
    assert [(row.task, row.algorithm) for row in table.rows][-1] == ("balance", "benchmarl")
    row = table.rows[-1]
    assert (row.seeds, row.num_planned) == ((0, 1), 2)
    assert row.improvement.value == mann_whitney([57.0, 58.0], RETURNS["balance", "mappo"])
    assert row.notes == ("nobody knows whether it was judged on the same episodes as the others",)
    assert [(overall.algorithm, overall.num_tasks) for overall in table.overall] == [("ippo", 2), ("benchmarl", 1)]
    other = [replace(row, evaluation_hash="other") for row in foreign]
    assert "judged on other episodes" in make_table(matrix, [*results, *other]).rows[-1].notes[0]


def test_task_whose_first_algorithm_is_another_one_is_compared_with_that(tmp_path):
    (tmp_path / "matrix.yaml").write_text(FILE.replace("balance: {}", "balance: {algorithms: [ippo, mappo]}"))
    matrix = read_matrix(tmp_path / "matrix.yaml")
    results = [
        CellResult(cell.task, cell.algorithm, cell.seed, "done", return_mean=float(cell.algorithm == "mappo"))
        for cell in matrix.cells
    ]
    table = make_table(matrix, results)
    assert [(row.algorithm, row.improvement and row.improvement.value) for row in table.rows] == [
        *(("mappo", None), ("ippo", 0.0)),
        *(("ippo", None), ("mappo", 1.0)),
    ]
    assert table.overall[0].improvement.value == 0.0
