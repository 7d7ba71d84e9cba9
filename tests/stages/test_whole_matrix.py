"""A whole matrix through its command: cells, workers, kills, failures, tables and the page."""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.config import to_json
from mappo.errors import StoreUnavailable
from mappo.matrix.cell_result import read_result, read_results
from mappo.matrix.failure import Failure, failure_json
from mappo.matrix.matrix import Matrix, read_matrix
from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.stages.run_cell import run_cell
from mappo.stages.train import train
from mappo.tuning.database import Database
from tests.cli.test_prechecks import results_of
from tests.conftest import read_json
from tests.support.browser import chromium, complaints, open_page, requests
from tests.support.services import moto_server, postgres, use_s3, wait

FILE = """\
name: tiny
seeds: [0, 1]
changes:
  environment: {max_episode_frames: 10}
  networks: {hidden_sizes: [16]}
  learner: {epochs: 2, minibatch_frames: 50, update: plain}
  collection: {num_envs: 6, rollout_frames: 20, total_frames: 1200, simulation: plain}
  selection: {interval_iterations: 5, episodes_per_seed: 4}
  evaluation: {seeds: [1, 2], episodes_per_seed: 4}
algorithms:
  mappo: {}
  ippo: {networks: {critic: own}}
tasks:
  navigation: {success: terminated, collisions: agent_collisions}
  dispersion:
    recipe: navigation
    changes: {environment: {scenario: dispersion, scenario_kwargs: {n_agents: 2, n_food: 2}}}
"""
ONE = (
    FILE.replace("[0, 1]", "[0]").replace("  ippo: {networks: {critic: own}}\n", "").partition("  dispersion:")[0]
)
BROKEN = "  broken: {recipe: navigation, changes: {environment: {scenario_kwargs: {agent_radius: big}}}}\n"
FOLDER = Path("runs/tiny")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty directory to work in."""
    for name in ("MAPPO_DATABASE", "MAPPO_PIPELINE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str) -> Matrix:
    Path("matrix.yaml").write_text(text)
    return read_matrix(Path("matrix.yaml"))


def matrix(*arguments: str) -> int:
    return main(["matrix", arguments[0], "matrix.yaml", *arguments[1:]])


def start(*arguments: str) -> subprocess.Popen:
    """Start a command in another process, which writes to a log here."""
    with Path("log.txt").open("a") as log:
        command = [sys.executable, "-m", "mappo", "matrix", arguments[0], "matrix.yaml", *arguments[1:]]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def networks_of(run: str | Path) -> str:
    stored = Run.at(run)
    return stored.manifest(stored.choose("last")).parts["networks"].sha256


def killed_in_the_middle_of_a_cell(process: subprocess.Popen, cell: str = "navigation-mappo-0") -> None:
    wait(lambda: bool(list(FOLDER.glob(f"{cell}/checkpoints/*/*.json"))), 60, "no checkpoint")
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_matrix_with_a_killed_worker_is_completed_and_its_cell_equals_an_uninterrupted_run(place, capsys):
    tiny = written(FILE)
    killed_in_the_middle_of_a_cell(start("run"))
    cell = tiny.cells[0]
    begun = read_result(tiny, "runs", cell)
    assert begun.state == "begun"
    assert 0 < begun.frames < 1200
    assert matrix("status") == 0
    out = capsys.readouterr().out
    assert "tiny: 0 of 8 cells done, 1 begun, 7 waiting" in out
    assert f"navigation, mappo: seed 0 begun ({begun.frames:,} of 1,200 frames)" in out

    assert matrix("run", "--workers=2") == 0
    out = capsys.readouterr().out
    assert "navigation-mappo-0: resumed after" in out + Path(FOLDER, "worker-2.log").read_text()
    train(to_json(cell.config), place / "whole", place / "history.csv")
    assert networks_of(FOLDER / cell.name) == networks_of("whole")

    capsys.readouterr()
    names = sorted(path.parent.name for path in FOLDER.glob("*/checkpoints"))
    assert names == sorted(cell.name for cell in tiny.cells)
    assert len(list(FOLDER.glob("*/attempts/0001.json"))) == 8
    assert [len(list((FOLDER / name).glob("attempts/*.json"))) for name in names] == [
        2 if name == cell.name else 1 for name in names
    ]
    _require_rows_are_those_of_the_runs(tiny)
    assert matrix("run") == 0  # nothing is left
    assert "begins" not in capsys.readouterr().out
    _require_look_ups_need_no_torch(place)
    with chromium() as browser:
        open_page(browser, FOLDER / "matrix.html")
        assert (complaints(browser), requests(browser)) == ([], [])
        assert "Nothing: every cell is done." in browser.page_source
        assert len(browser.find_elements("css selector", "polyline")) == 2 * (4 + 2)  # seeds, and the means
        browser.find_element("link text", "dispersion-ippo-1").click()
        assert browser.current_url.endswith("/runs/tiny/dispersion-ippo-1/report.html")


def _require_rows_are_those_of_the_runs(tiny: Matrix) -> None:
    rows = csv.DictReader((FOLDER / "cells.csv").read_text().splitlines())
    for row, cell in zip(rows, tiny.cells, strict=True):
        report = read_json(FOLDER / cell.name / "evaluation.json")
        assert row["config_hash"] == cell.config_hash == report["training_config_hash"]
        assert float(row["return_mean"]) == report["trained"]["mean"]["value"]
        assert float(row["random"]) == report["random"]["mean"]["value"]
        measured = report["trained"]["measurements"]
        assert float(row["measured_terminated"]) == measured["terminated"]["mean"]["value"]
        *_, last = csv.DictReader((FOLDER / cell.name / "history.csv").read_text().splitlines())
        assert (row["frames"], float(row["seconds"])) == ("1200", float(last["elapsed_seconds"]))
        if cell.task == "navigation":
            assert row["success"] == row["measured_terminated"]
            assert float(row["collisions"]) == measured["agent_collisions"]["mean"]["value"]
        else:
            assert row["success"] == row["collisions"] == ""


def _require_look_ups_need_no_torch(place: Path) -> None:
    commands = [
        *("matrix status matrix.yaml", "matrix table matrix.yaml", "matrix table matrix.yaml --markdown"),
        *("matrix table matrix.yaml --cells --output out.csv", "matrix page matrix.yaml --output page.html"),
        "matrix table matrix.yaml --results out.csv --store elsewhere --csv",
    ]
    assert results_of(commands, place) == dict.fromkeys(commands, (0, "", False))
    assert Path("out.csv").read_text() == (FOLDER / "cells.csv").read_text()
    assert "runs/tiny/navigation-mappo-0/report.html" in Path("page.html").read_text()


def test_failed_cell_says_why_everywhere_and_is_tried_again_when_asked(place, capsys):
    written(ONE + BROKEN)
    assert matrix("run") == 1
    out = capsys.readouterr().out
    reason = "TypeError: can only concatenate str"
    assert "navigation-mappo-0: done, return" in out
    assert out.splitlines()[-1].startswith("[matrix] failed: 1 of 2 cells are not done")
    (line,) = [line for line in out.splitlines() if "broken-mappo-0: failed: train: " in line]
    assert reason in line
    for arguments in (["status"], ["table"], ["table", "--markdown"], ["table", "--csv"], ["table", "--cells"]):
        assert matrix(*arguments) == 0
        assert reason in capsys.readouterr().out
    assert reason in (FOLDER / "matrix.html").read_text()
    assert reason in (FOLDER / "table.md").read_text()

    first = read_json(FOLDER / "broken-mappo-0" / "failure.json")
    assert matrix("run") == 1
    assert read_json(FOLDER / "broken-mappo-0" / "failure.json") == first  # it was not tried again
    assert matrix("run", "--retry-failed") == 1
    assert read_json(FOLDER / "broken-mappo-0" / "failure.json")["seconds"] > first["seconds"]
    capsys.readouterr()
    tiny = written(ONE + BROKEN.replace("big", "0.05"))
    assert read_result(tiny, "runs", tiny.cells[1]).state == "waiting"  # the failure is another configuration's
    assert matrix("run") == 0


def test_failure_that_may_pass_is_tried_again_by_the_next_run(place):
    tiny = written(ONE)
    (cell,) = tiny.cells
    failure = Failure("the store did not answer", False, cell.config_hash, time.time(), "0")
    Run.at(FOLDER / cell.name).store.write("failure.json", failure_json(failure))
    assert read_result(tiny, "runs", cell).reason == "the store did not answer"
    assert matrix("work") == 0  # a worker leaves failed cells alone
    assert read_result(tiny, "runs", cell).state == "failed"
    assert matrix("run") == 0
    assert not (FOLDER / cell.name / "failure.json").exists()


def test_result_in_a_file_is_not_trained_again(place, capsys):
    tiny = written(ONE)
    cell = tiny.cells[0]
    header = "task,algorithm,seed,return_mean,config_hash\n"
    Path("old.csv").write_text(
        f"{header}navigation,mappo,0,0.75,{cell.config_hash}\nnavigation,benchmarl,0,0.5,\n"
    )
    assert matrix("run", "--results=old.csv") == 0
    assert not (FOLDER / cell.name).exists()
    table = (FOLDER / "table.csv").read_text()
    assert "navigation,mappo,0,1,0.75" in table
    assert "navigation,benchmarl,0,1,0.5" in table


def test_run_with_another_configuration_is_refused_before_anything_is_trained(place, capsys):
    tiny = written(ONE)
    run_cell(to_json(tiny.cells[0].config), FOLDER / tiny.cells[0].name, place / "history.csv")
    before = sorted(place.rglob("*"))
    written(ONE.replace("epochs: 2", "epochs: 3"))
    capsys.readouterr()
    assert matrix("run") == 2
    out = capsys.readouterr().out
    assert "its run was trained with another configuration: learner.epochs = 2 -> 3" in out
    assert "delete these runs, take the change back, or give the matrix another name" in out
    assert matrix("table") == 0
    assert "seed 0 conflict: its run was trained with another" in capsys.readouterr().out
    assert sorted(place.rglob("*")) == sorted([*before])


def test_evaluation_that_is_damaged_or_of_an_unfinished_run_is_made_again(place, capsys):
    tiny = written(ONE)
    (cell,) = tiny.cells
    assert matrix("run") == 0
    file = FOLDER / cell.name / "evaluation.json"
    content, networks = file.read_text(), networks_of(FOLDER / cell.name)
    early = json.dumps({**json.loads(content), "run_frames": 600})
    for damaged, reason in (
        ("{", "not an evaluation report"),
        (early, "evaluated before the end of training"),
        (content.replace('"epochs": 2', '"epochs": 3'), "the evaluation is that of another configuration"),
    ):
        file.write_text(damaged)
        result = read_result(tiny, "runs", cell)
        assert (result.state, reason in result.reason) == ("begun", True), result
    assert matrix("run") == 0
    assert json.loads(file.read_text()) == json.loads(content)
    assert networks_of(FOLDER / cell.name) == networks


def test_measurement_that_a_task_does_not_have_is_refused_before_anything_is_trained(place, capsys):
    written(ONE.replace("collisions: agent_collisions", "collisions: colisions"))
    assert matrix("run") == 2
    assert (
        "task navigation: collisions: 'colisions' is not measured; it measures agent_collisions (sum), final_rew"
        in (capsys.readouterr().out)
    )
    assert not FOLDER.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["table", "matrix.yaml", "--results", "nowhere.csv"], "nowhere.csv: No such file"),
        (["run", "matrix.yaml", "--store", "s3:/bucket"], "did you mean s3://bucket?"),
        (["run", "matrix.yaml", "--retry-fail"], "did you mean --retry-failed?"),
        (["table", "matrix.yaml", "--csv", "--cells"], "not allowed with argument"),
        (["table", "matrix.yaml", "--output", "matrix.yaml/x"], "--output matrix.yaml/x: "),
    ],
)
def test_wrong_command_is_refused(place, capsys, arguments, words):
    written(ONE)
    with suppress(SystemExit):  # argparse's own
        assert main(["matrix", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


def test_free_lock_is_held_by_one_process_at_a_time_and_ends_with_it(place):
    database = Database("sqlite:///runs/studies.db")
    with (
        database.free_lock("cell-a") as is_free,
        Database("sqlite:///runs/studies.db").free_lock("cell-b") as other,
    ):
        assert (is_free, other) == (True, True)
        with Database("sqlite:///runs/studies.db").free_lock("cell-a") as again:
            assert not again
    with database.free_lock("cell-a") as is_free:
        assert is_free


@pytest.mark.long
def test_matrix_killed_again_and_again_equals_one_that_ran_through(place):
    """All processes are killed at once at random moments; at last, the command gets SIGTERM."""
    tiny, moments = written(FILE), random.Random(0)
    assert start("run", "--store=whole", "--workers=2").wait() == 0, Path("log.txt").read_text()
    for sign in (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        Path("log.txt").write_text("")
        process = start("run", "--workers=2")
        wait(lambda: bool(re.search("begins|resumed", Path("log.txt").read_text())), 60, "nothing begins")
        time.sleep(moments.uniform(0, 4))
        if sign == signal.SIGKILL:
            os.killpg(process.pid, sign)
            assert process.wait() in (0, -sign)
        else:
            process.terminate()  # it ends its workers
            assert process.wait() in (0, 128 + sign), Path("log.txt").read_text()
            assert subprocess.run(["pgrep", "-g", str(process.pid)], check=False).returncode == 1
    assert matrix("run") == 0
    for cell in tiny.cells:
        assert networks_of(FOLDER / cell.name) == networks_of(f"whole/tiny/{cell.name}")
    one, other = (
        [{**row, "seconds": "", "source": ""} for row in csv.DictReader(Path(text).read_text().splitlines())]
        for text in ("runs/tiny/cells.csv", "whole/tiny/cells.csv")
    )
    assert one == other


@pytest.mark.long
def test_matrix_in_a_bucket_is_filled_and_read_and_its_files_lie_here(place, capsys, monkeypatch):
    written(ONE + BROKEN)
    with moto_server() as endpoint:
        store = f"--store=s3://{use_s3(monkeypatch, endpoint)}/runs"
        assert matrix("run", store) == 1
        capsys.readouterr()
        assert matrix("table", store, "--cells") == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["state"] for row in rows] == ["done", "failed"]
        assert rows[0]["source"].endswith("/runs/tiny/navigation-mappo-0")
        assert (FOLDER / "cells.csv").exists()
        assert "polyline" in (FOLDER / "matrix.html").read_text()
        assert matrix("run", store) == 1
        assert "navigation-mappo-0: begins" not in capsys.readouterr().out


@pytest.mark.long
def test_workers_on_one_database_share_the_cells_and_resume_those_of_a_killed_one(place, monkeypatch):
    """Two commands work at once, as on two machines; the first is killed, and the second completes the matrix."""
    tiny = written(FILE.replace("[0, 1]", "[0, 1, 2]"))
    with postgres() as server:
        monkeypatch.setenv("MAPPO_DATABASE", server.create("studies"))
        first = start("work")
        wait(lambda: bool(list(FOLDER.glob("*/checkpoints/*/*.json"))), 60, "no checkpoint")
        second = start("run")
        wait(lambda: len(list(FOLDER.glob("*/attempts"))) >= 3, 90, "the second has begun nothing")
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert second.wait(300) == 0, Path("log.txt").read_text()
    results = read_results(tiny, "runs", tiny.cells)
    assert [result.state for result in results] == ["done"] * 12
    attempts = [len(list((FOLDER / cell.name).glob("attempts/*.json"))) for cell in tiny.cells]
    assert sorted(attempts) in ([1] * 12, [1] * 11 + [2])  # nothing was trained twice


def test_attempts_that_saved_nothing_are_told(place):
    tiny = written(ONE)
    (cell,) = tiny.cells
    for reason in ("", "2 attempts have saved no checkpoint; were they killed?"):
        claim(Run.at(FOLDER / cell.name))
        result = read_result(tiny, "runs", cell)
        assert (result.state, result.reason) == ("waiting", reason)


def test_store_that_does_not_answer_ends_the_look_up(place, monkeypatch):
    tiny = written(ONE)

    def refuse(*_: object) -> None:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr("mappo.runs.directory_store.DirectoryStore.entries_outside", refuse)
    with pytest.raises(StoreUnavailable):
        read_results(tiny, "runs", tiny.cells)
