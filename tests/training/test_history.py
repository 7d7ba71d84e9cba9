"""The histories that are longer than what a checkpoint holds itself."""

import math
from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.config import from_dict, override
from mappo.errors import CheckpointError, Superseded
from mappo.reporting.run_record import of_runs
from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.runs.segments import walk
from mappo.training import history as histories
from mappo.training.history import COLUMNS, HistoryFile, parse_history
from tests.conftest import TINY
from tests.support.runs import assert_same_training, last, repeatable_history, train_here

CONFIG = override(
    from_dict(TINY),
    {
        "collection": {"num_envs": 4, "rollout_frames": 3, "total_frames": 12 * 11},
        "learner": {"epochs": 1, "minibatch_frames": 12},
    },
)


class Stopped(Exception):
    pass


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(histories, "SEGMENT_ROWS", 2)


def stop_at(iteration):
    def on_report(report):
        if report.progress.iteration == iteration:
            raise Stopped

    return on_report


@pytest.fixture
def resumed(short_segments, tmp_path):
    """A run of 11 iterations that three processes have trained."""
    for iteration in (4, 8):
        with pytest.raises(Stopped):
            train_here(CONFIG, tmp_path / "run", stop_at(iteration))
    train_here(CONFIG, tmp_path / "run")
    return Run.at(tmp_path / "run")


def iterations_of(text):
    return [int(row["iteration"]) for row in parse_history(text)]


def shared(run, suffix):
    """Return the files of the newest checkpoint's earlier rows, or their indexes, the oldest first."""
    files = walk(run.manifest(run.refs()[0]).earlier_rows, run._verified, pytest.fail)
    return [Path(run.store.location, file.key) for file in files if file.key.endswith(suffix)]


def test_checkpoint_holds_the_last_rows_and_names_the_rows_before_them(resumed):
    newest = last(resumed.store.location)
    assert iterations_of(newest.history) == [11]
    assert newest.num_earlier_rows == 10
    assert newest.earlier_rows.num_rows == 10
    assert iterations_of(resumed.whole_history(newest)) == list(range(1, 12))


def test_resumed_run_has_the_whole_history_and_is_bit_identical(resumed, short_segments, tmp_path):
    whole = train_here(CONFIG, tmp_path / "whole")
    newest = last(resumed.store.location)
    assert_same_training(whole, newest)
    complete = resumed.whole_history(newest)
    assert (tmp_path / "run" / "history.csv").read_text() == complete
    assert repeatable_history((tmp_path / "whole" / "history.csv").read_text()) == repeatable_history(complete)
    (record,) = of_runs([resumed.store.location])
    assert record.history == complete


def test_checkpoint_of_an_older_version_with_all_rows_is_resumed(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        train_here(CONFIG, tmp_path / "run", stop_at(8))
    run = Run.at(tmp_path / "run")
    assert len(iterations_of(run.load(run.refs()[0]).history)) in (7, 8)
    monkeypatch.setattr(histories, "SEGMENT_ROWS", 2)
    newest = train_here(CONFIG, tmp_path / "run")
    assert iterations_of(newest.history) == [11]
    assert iterations_of((tmp_path / "run" / "history.csv").read_text()) == list(range(1, 12))


def test_run_of_a_version_without_measurements_is_resumed_and_measured_from_then_on(
    short_segments, tmp_path, monkeypatch
):
    config = override(CONFIG, {"selection": {"interval_iterations": 1}})
    with monkeypatch.context() as older:
        older.setattr("mappo.training.training._measured_names", lambda _: [])
        with pytest.raises(Stopped):
            train_here(config, tmp_path / "run", stop_at(8))
    assert "measured_" not in last(tmp_path / "run").history
    train_here(config, tmp_path / "run")
    text = (tmp_path / "run" / "history.csv").read_text()
    assert text == Run.at(tmp_path / "run").whole_history(last(tmp_path / "run"))
    rows = parse_history(text)
    assert [int(row["iteration"]) for row in rows] == list(range(1, 12))
    assert [math.isnan(row["measured_pos_rew"]) for row in rows][-3:] == [False] * 3
    assert all(math.isnan(row["measured_pos_rew"]) for row in rows[:6])
    train_here(config, tmp_path / "whole")
    whole = parse_history((tmp_path / "whole" / "history.csv").read_text())
    assert [row["measured_pos_rew"] for row in whole][-3:] == [row["measured_pos_rew"] for row in rows][-3:]


@pytest.mark.parametrize(
    "measured",
    [
        "measured_",
        "measured_a,measured_a",
        "other",
        "measured_\x1b",
        *[",".join(f"measured_{i}" for i in range(21))],
    ],
)
def test_history_with_impossible_columns_of_measurements_is_refused(measured, tmp_path):
    header = ",".join(COLUMNS)
    HistoryFile(tmp_path / "a").restore(f"{header},measured_fine\n")
    with pytest.raises(CheckpointError, match="the history has other columns"):
        HistoryFile(tmp_path / "b").restore(f"{header},{measured}\n")


def test_every_checkpoint_of_a_long_history_holds_few_rows(short_segments, tmp_path):
    train_here(CONFIG, tmp_path / "run")
    run = Run.at(tmp_path / "run")
    for ref in run.refs():
        checkpoint = run.load(ref)
        assert len(iterations_of(checkpoint.history)) <= 2
        assert checkpoint.num_earlier_rows + len(iterations_of(checkpoint.history)) == ref.iteration


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("[[[")])
def test_damaged_earlier_rows_cost_these_rows_and_nothing_else(resumed, suffix, damage, tmp_path, caplog):
    damage(shared(resumed, suffix)[0])
    longer = override(CONFIG, {"evaluation": {"episodes_per_seed": 2}})
    newest = train_here(longer, tmp_path / "run")  # the run is finished, and its history.csv is written again
    assert newest.iteration == 11
    assert "rows of the history are lost: " in caplog.text
    rows = iterations_of((tmp_path / "run" / "history.csv").read_text())
    assert rows[-1] == 11
    assert 1 <= len(rows) < 11
    assert resumed.garbage(grace_seconds=-1) == [] or suffix == ".csv"


def test_damaged_earlier_rows_are_found_by_verify(resumed, capsys):
    assert main(["checkpoints", "verify", resumed.store.location]) == 0
    shared(resumed, ".csv")[0].write_text("0,0\n0,0\n")
    assert main(["checkpoints", "verify", resumed.store.location]) == 1
    assert "damaged or replaced" in capsys.readouterr().out


def test_earlier_rows_are_copied_with_a_checkpoint_and_are_no_garbage(resumed, tmp_path):
    newest = resumed.refs()[0]
    complete = resumed.whole_history(resumed.load(newest))
    for key in resumed.garbage(grace_seconds=-1):
        resumed.store.delete(key)
    assert resumed.whole_history(resumed.load(newest)) == complete
    resumed.export(newest, tmp_path / "copy")
    copy = Run.at(tmp_path / "copy")
    assert copy.whole_history(last(tmp_path / "copy")) == complete
    assert len(list(copy.earlier_rows(last(tmp_path / "copy").earlier_rows, is_strict=True))) == 5


@pytest.mark.parametrize(
    "content",
    ["[", "null", "[]", '[{"key": "../../etc/passwd", "size_bytes": 1, "num_rows": 10}]', "[" * 900],
)
def test_index_with_any_content_is_refused_in_one_line(resumed, content):
    run, checkpoint = resumed, last(resumed.store.location)
    attempt = claim(run)
    index = attempt._save_shared(content.encode(), "json", checkpoint.earlier_rows.num_rows)
    with pytest.raises(CheckpointError, match="index") as raised:
        list(run.earlier_rows(index, is_strict=True))
    assert "\n" not in str(raised.value)


def test_history_file_is_that_of_the_newest_attempt(tmp_path):
    """The process of an attempt is stopped, overtaken, and continues."""
    reports, overtaken = [], []

    def on_report(report):
        reports.append(report)
        if report.progress.iteration == 5 and not overtaken:
            overtaken.append(True)
            train_here(CONFIG, tmp_path / "run")

    with pytest.raises(Superseded, match="attempt 2 of this run has begun"):
        train_here(CONFIG, tmp_path / "run", on_report)
    assert iterations_of((tmp_path / "run" / "history.csv").read_text()) == list(range(1, 12))
