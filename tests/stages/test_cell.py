"""The stages of one cell and of a matrix's tables, called as their components call them."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from mappo.errors import StageFailed
from mappo.matrix.matrix import matrix_from_json, matrix_json, read_matrix
from mappo.stages.cell import fill_cell
from mappo.stages.summarise import MatrixFiles, summarise
from tests.conftest import read_json
from tests.stages.test_whole_matrix import BROKEN, FILE, ONE

TWO = json.dumps(yaml.safe_load(ONE + BROKEN))


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[str, dict[str, float], Path]:
    """Fill a cell of two; return the store, the metrics of the stage, and its report."""
    directory = tmp_path_factory.mktemp("matrix")
    store, report = str(directory / "runs"), directory / "artifacts" / "report"
    result = fill_cell(TWO, "navigation-mappo-0", store, report)
    assert result.metadata["location"] == f"{store}/tiny/navigation-mappo-0"
    return store, result.metrics, report


def files_in(directory: Path) -> MatrixFiles:
    return MatrixFiles(*(directory / name for name in ("cells", "table", "markdown", "page")))


def test_cell_is_trained_once_and_its_report_is_the_one_of_its_run(filled, tmp_path, capsys):
    store, metrics, report = filled
    kept = Path(store, "tiny/navigation-mappo-0/evaluation.json")
    assert report.read_bytes() == kept.read_bytes()
    evaluation = read_json(kept)
    assert metrics["return_mean"] == evaluation["trained"]["mean"]["value"]
    collisions = evaluation["trained"]["measurements"]["agent_collisions"]
    assert metrics["collisions"] == collisions["mean"]["value"]
    assert metrics["frames"] == 1200
    assert fill_cell(TWO, "navigation-mappo-0", store, tmp_path / "again").metrics == metrics
    assert (tmp_path / "again").read_bytes() == report.read_bytes()
    assert "[cell] navigation-mappo-0: done before, with return" in capsys.readouterr().out
    assert len(list(Path(store, "tiny/navigation-mappo-0/attempts").iterdir())) == 1


@pytest.mark.long
def test_cell_compiles_by_default_however_short_it_is_because_the_others_use_it(tmp_path, capsys):
    task = {"recall": {"changes": {"collection": {"simulation": "auto"}}}}
    matrix = json.dumps(yaml.safe_load(ONE.partition("tasks:")[0]) | {"tasks": task})
    fill_cell(matrix, "recall-mappo-0", str(tmp_path / "runs"), tmp_path / "report")
    output = capsys.readouterr().out
    assert "the runs of a study or a matrix share what is compiled" in output
    assert "the simulation is fast: compiled and checked" in output


def test_failed_cell_leaves_its_reason_to_the_tables_of_the_others(filled, tmp_path, capsys):
    store, metrics, _ = filled
    with pytest.raises(StageFailed) as error:
        fill_cell(TWO, "broken-mappo-0", store, tmp_path / "report")
    assert error.value.is_final
    assert f"[cell] failed: broken-mappo-0: {error.value}" in capsys.readouterr().out
    files = files_in(tmp_path / "tables")
    result = summarise(TWO, store, files)
    numbers = {"num_cells": 2.0, "num_done_cells": 1.0, "num_failed_cells": 1.0}
    assert result.metrics == {**result.metrics, **numbers}
    done, failed = csv.DictReader(files.cells.read_text().splitlines())
    assert (done["state"], float(done["return_mean"])) == ("done", metrics["return_mean"])
    assert (failed["state"], failed["reason"]) == ("failed", str(error.value))
    assert [row["seeds"] for row in csv.DictReader(files.table.read_text().splitlines())] == ["0", ""]
    assert "1 of 2 cells are done" in files.markdown.read_text()
    assert "agent_radius" in files.page.read_text()


def test_cell_whose_run_has_another_configuration_is_refused_and_left_as_it_is(filled, tmp_path):
    store, _, report = filled
    changed = TWO.replace('"epochs": 2', '"epochs": 3')
    assert changed != TWO
    with pytest.raises(
        StageFailed, match=r"another configuration: learner.epochs = .*give the matrix another name"
    ):
        fill_cell(changed, "navigation-mappo-0", store, tmp_path / "report")
    assert fill_cell(TWO, "navigation-mappo-0", store, tmp_path / "report")
    assert (tmp_path / "report").read_bytes() == report.read_bytes()


def test_cell_that_the_matrix_does_not_have_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(
        StageFailed, match="not a cell of the matrix tiny; did you mean navigation-mappo-0"
    ) as error:
        fill_cell(TWO, "navigation-mappo-1", str(tmp_path), tmp_path / "report")
    assert error.value.is_final


def test_summarising_fails_if_no_cell_is_done_and_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(StageFailed, match="none of the 2 cells of tiny is done"):
        summarise(TWO, str(tmp_path / "runs"), files_in(tmp_path))
    assert "navigation, mappo: seed 0 waiting" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_json_of_a_matrix_is_the_matrix_of_its_file_in_its_order(tmp_path):
    """The first algorithm is the reference of the others, and is not the first by name."""
    (tmp_path / "m.yaml").write_text(FILE)
    whole = matrix_from_json(matrix_json(tmp_path / "m.yaml"))
    assert whole == read_matrix(tmp_path / "m.yaml")
    assert whole.algorithms == ("mappo", "ippo")
