import logging
import threading
import time
from dataclasses import replace

import pytest

from mappo.config import from_dict, override
from mappo.errors import NotSaved, Superseded
from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.runs.saver import SaveCounts, Saver, SaveResult
from tests.conftest import TINY
from tests.support.runs import train_here


@pytest.fixture
def run(tmp_path):
    return Run.at(tmp_path / "run")


def at(checkpoint, iteration, is_best=False):
    value = float(iteration)
    return replace(
        checkpoint, iteration=iteration, selection_return=value if is_best else None, highest_return=value
    )


def iterations(run):
    return [saved.iteration for saved in run.saved()]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Broken:
    """Where parts should go there is a file, so that nothing can be written."""

    def __init__(self, tmp_path):
        self._blobs = tmp_path / "run" / "blobs"
        self._blobs.parent.mkdir(exist_ok=True)
        self._blobs.touch()

    def mend(self):
        self._blobs.unlink()


def test_everything_is_saved_by_the_time_it_is_closed(run, checkpoint):
    saver = Saver(claim(run))
    saver.save(at(checkpoint, 1))
    saver.close(10)
    assert iterations(run) == [1]
    assert saver.counts == SaveCounts(num_saves=1)


def test_every_checkpoint_is_told_of_once_with_what_became_of_it(run, checkpoint, tmp_path):
    heard: list[SaveResult] = []
    attempt = claim(run)
    broken = Broken(tmp_path)
    saver = Saver(attempt, heard.append)
    for iteration in range(1, 5):
        saver.save(at(checkpoint, iteration))
    wait_until(lambda: any(save.outcome == "failed" for save in heard))
    broken.mend()
    saver.close(20)
    outcomes = [save.outcome for save in heard]
    assert (outcomes.count("saved"), outcomes.count("skipped")) == (1, 3)
    assert outcomes.count("failed") == saver.counts.num_failed_saves
    (saved,) = [save for save in heard if save.outcome == "saved"]
    assert saved.size_bytes == run.manifest(run.saved()[0]).size_bytes > 1000
    assert saved.seconds > 0


def test_broken_store_holds_nothing_up_and_the_newest_and_the_best_wait(run, checkpoint, tmp_path, caplog):
    attempt = claim(run)
    broken = Broken(tmp_path)
    saver = Saver(attempt)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        for iteration in range(1, 40):
            saver.save(at(checkpoint, iteration, is_best=iteration == 7))
        assert time.monotonic() - began < 10
        wait_until(lambda: saver.counts.num_failed_saves > 0)
        broken.mend()
        saver.close(20)
    assert iterations(run) == [39, 7]
    assert saver.counts.num_saves == 2
    assert saver.counts.num_skipped_saves == 37
    assert "a checkpoint could not be saved, training goes on" in caplog.text
    assert "saving works again" in caplog.text


def test_failures_are_said_once_a_minute_and_not_every_time(run, checkpoint, tmp_path, caplog):
    attempt = claim(run)
    broken = Broken(tmp_path)
    saver = Saver(attempt)
    for iteration in range(1, 5):
        failed = saver.counts.num_failed_saves
        saver.save(at(checkpoint, iteration))
        wait_until(lambda: saver.counts.num_failed_saves > failed)  # noqa: B023
    assert caplog.text.count("could not be saved") == 1
    broken.mend()
    saver.close(20)


def test_what_is_not_saved_in_time_is_named_with_the_cause_and_handed_back(run, checkpoint, tmp_path):
    attempt = claim(run)
    Broken(tmp_path)
    saver = Saver(attempt)
    saver.save(at(checkpoint, 5))
    with pytest.raises(
        NotSaved, match=r"iteration 5 is not saved: .*blobs.*: (File exists|Not a directory)"
    ) as raised:
        saver.close(0.5)
    (left,) = raised.value.checkpoints
    assert left.iteration == 5
    elsewhere = raised.value.attempt.elsewhere(tmp_path / "unsaved")
    saved = elsewhere.save(left)
    assert saved.attempt_id == attempt.id  # it can be copied into the store as it is
    assert Run.at(tmp_path / "unsaved").load(saved).iteration == 5


def test_no_thread_is_left_when_closed(run, checkpoint, tmp_path):
    before = threading.active_count()
    good = Saver(claim(run))
    good.save(at(checkpoint, 1))
    good.close(10)
    attempt = claim(run)
    for path in (tmp_path / "run" / "blobs").rglob("*.*"):
        path.unlink()
    for path in [*(tmp_path / "run" / "blobs").iterdir(), tmp_path / "run" / "blobs"]:
        path.rmdir()
    Broken(tmp_path)
    bad = Saver(attempt)
    bad.save(at(checkpoint, 1))
    with pytest.raises(NotSaved):
        bad.close(0.2)
    wait_until(lambda: threading.active_count() == before)


def test_superseded_attempt_hears_of_it_at_its_next_save(run, checkpoint):
    saver = Saver(claim(run))
    claim(run)
    saver.save(at(checkpoint, 1))
    with pytest.raises(Superseded):
        saver.close(10)
    with pytest.raises(Superseded):
        saver.save(at(checkpoint, 2))
    assert iterations(run) == []


def test_of_two_processes_that_train_one_run_the_earlier_stops(tmp_path):
    config = override(from_dict(TINY), {"collection": {"total_frames": 120 * 200}})
    place = tmp_path / "run"

    def another_begins(report):
        if report.progress.iteration == 3:
            claim(Run.at(place))

    reports = []
    with pytest.raises(Superseded, match="this one, attempt 1, stops"):
        train_here(config, place, lambda report: (reports.append(report), another_begins(report)))
    assert len(reports) < 50
    assert max(iterations(Run.at(place))) <= 3
