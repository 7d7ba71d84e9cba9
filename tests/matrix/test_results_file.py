"""The CSV of cells: what is written is read again exactly, and wrong rows are refused with the line."""

from dataclasses import replace
from pathlib import Path

import pytest

from mappo.config import config_hash
from mappo.errors import ConfigError
from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Matrix, read_matrix
from mappo.matrix.results_file import cells_csv, read_foreign, with_foreign

FILE = """\
name: first
seeds: [0, 1]
algorithms: {mappo: {}, ippo: {networks: {critic: own}}}
tasks:
  navigation: {collisions: agent_collisions}
  balance: {algorithms: [mappo]}
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    (tmp_path / "matrix.yaml").write_text(FILE)
    return read_matrix(tmp_path / "matrix.yaml")


def waiting(matrix: Matrix) -> list[CellResult]:
    return [
        CellResult(cell.task, cell.algorithm, cell.seed, "waiting", config_hash=cell.config_hash)
        for cell in matrix.cells
    ]


def done(matrix: Matrix, index: int, value: float = 0.1) -> CellResult:
    return replace(
        waiting(matrix)[index],
        state="done",
        return_mean=value,
        random=-1 / 3,
        collisions=-2.5,
        frames=10**12,
        threads=1,
        seconds=1e-17,
        hardware='cpu, "big", 2',
        measurements={"agent_collisions": -2.5, "odd, name": 1e99},
    )


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cells.csv"
    path.write_text(text)
    return path


def test_rows_are_read_as_they_were_written(tmp_path, matrix):
    rows = [done(matrix, 0), replace(waiting(matrix)[2], state="failed", reason="a; b, c")]
    path = write(tmp_path, cells_csv(rows))
    foreign = read_foreign([path], matrix)
    assert [replace(row, source="") for row in foreign.rows.values()] == rows
    assert [row.source for row in foreign.rows.values()] == [f"{path}: line 2", f"{path}: line 3"]


def test_row_counts_for_a_cell_that_is_not_done_if_its_configuration_is_the_same(tmp_path, matrix):
    own = waiting(matrix)
    own[1] = done(matrix, 1, 7.0)
    rows = [done(matrix, 0), done(matrix, 1), replace(done(matrix, 2), config_hash="0" * 64)]
    results, notes = with_foreign(matrix, own, read_foreign([write(tmp_path, cells_csv(rows))], matrix))
    assert [result.state for result in results] == ["done", "done", *["waiting"] * 4]
    assert (results[0].return_mean, results[1].return_mean) == (0.1, 7.0)  # the store's own comes first
    (note,) = notes
    assert "line 4: navigation, ippo, seed 0: not used, because it has the configuration 000000000000" in note


def test_failed_row_of_a_file_does_not_keep_its_cell_from_being_trained(tmp_path, matrix):
    path = write(tmp_path, cells_csv([replace(waiting(matrix)[0], state="failed", reason="broken")]))
    results, _ = with_foreign(matrix, waiting(matrix), read_foreign([path], matrix))
    assert results == waiting(matrix)


def test_other_seeds_of_the_same_configuration_and_other_algorithms_are_further_rows(tmp_path, matrix):
    cell = matrix.cells[0]
    more = replace(done(matrix, 0), seed=7, config_hash=config_hash(replace(cell.config, seed=7)))
    other = replace(more, seed=8)  # its hash is that of seed 7
    external = CellResult("balance", "benchmarl", 0, "done", return_mean=3.0)
    path = write(tmp_path, cells_csv([more, other, external]))
    results, notes = with_foreign(matrix, waiting(matrix), read_foreign([path], matrix))
    assert [result.key for result in results[6:]] == [("navigation", "mappo", 7), ("balance", "benchmarl", 0)]
    assert len(notes) == 1
    assert "seed 8: not used" in notes[0]


def test_columns_of_success_and_collisions_are_those_that_the_matrix_names(tmp_path, matrix):
    text = "task,algorithm,seed,return_mean,collisions,measured_agent_collisions\nnavigation,x,0,1,5,-3\n"
    results, _ = with_foreign(matrix, waiting(matrix), read_foreign([write(tmp_path, text)], matrix))
    assert results[-1].collisions == -3.0


HEAD = "task,algorithm,seed,state,return_mean\n"
WRONG = {
    "": "line 1: task: this column is missing; needed are task, algorithm, seed, return_mean",
    "task,algorithm,seed\n": "line 1: return_mean: this column is missing",
    "task,algorithm,seed,return_mean,succes\n": "line 1: 'succes': unknown column; did you mean success?",
    "task,task,algorithm,seed,return_mean\n": "line 1: task: this column appears twice",
    "task,algorithm,seed,return_mean,measured_\n": "line 1: 'measured_': unknown column",
    f"{HEAD}navigation,mappo,0,done\n": "line 2: 4 cells, but the header has 5",
    f"{HEAD}navigaton,mappo,0,done,1\n": "task = 'navigaton': not a task of the matrix; did you mean navigation?",
    f"{HEAD}navigation,Mappo,0,done,1\n": "line 2: algorithm 'Mappo': a name has",
    f"{HEAD}navigation,mappo,x,done,1\n": "line 2: seed = 'x': must be a whole number, 0 or more",
    f"{HEAD}navigation,mappo,-1,done,1\n": "line 2: seed = '-1': must be a whole number",
    f"{HEAD}navigation,mappo,4294967296,done,1\n": "line 2: seed: must be a whole number from 0",
    f"{HEAD}navigation,mappo,,done,1\n": "line 2: seed: must be a whole number",
    f"{HEAD}navigation,mappo,0,doen,1\n": "line 2: state = 'doen': give one of done, failed",
    f"{HEAD}navigation,mappo,0,done,\n": "line 2: return_mean: empty, although the cell is done",
    f"{HEAD}navigation,mappo,0,done,nan\n": "line 2: return_mean = 'nan': must be a number, at most 1e+100",
    f"{HEAD}navigation,mappo,0,done,1e101\n": "line 2: return_mean = '1e101': must be a number, at most 1e+100",
    f"{HEAD}navigation,mappo,0,done,1_0\n": "line 2: return_mean = '1_0': must be a number, at most 1e+100",
    f"{HEAD}navigation,mappo,0,done,1\nnavigation,mappo,0,done,2\n": "line 3: navigation, mappo, seed 0: given",
    f'{HEAD}navigation,mappo,0,done,"1\n': "not CSV: unexpected end of data",
    f"{HEAD}{'x' * 20_000},mappo,0,done,1\n": "line 2: a cell with 20000 characters",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_file_is_refused_with_the_line(tmp_path, matrix, text):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_foreign([path], matrix)
    assert str(path) in str(error.value)
    assert WRONG[text] in str(error.value)


def test_unreadable_files_are_refused(tmp_path, matrix):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("nowhere.csv", "No such file"), ("binary.csv", "not a text file")):
        with pytest.raises(ConfigError, match=reason):
            read_foreign([tmp_path / name], matrix)
    path = write(tmp_path, f"{HEAD}navigation,mappo,0,done,1\n")
    with pytest.raises(ConfigError, match="line 2: navigation, mappo, seed 0: given already, in .*line 2"):
        read_foreign([path, path], matrix)
