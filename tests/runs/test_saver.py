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
    return [ref.iteration for ref in run.refs()]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class BrokenStore:
    """A store that refuses writes of parts: a file occupies the name of the directory of parts."""

    def __init__(self, tmp_path):
        self._blobs = tmp_path / "run" / "blobs"
        self._blobs.parent.mkdir(exist_ok=True)
        self._blobs.touch()

    def mend(self):
        self._blobs.unlink()


def test_close_returns_after_all_checkpoints_are_saved(run, checkpoint):
    saver = Saver(claim(run))
    saver.save(at(checkpoint, 1))
    saver.close(10)
    assert iterations(run) == [1]
    assert saver.counts == SaveCounts(num_saves=1)


def test_on_save_is_called_once_for_every_result(run, checkpoint, tmp_path):
    results: list[SaveResult] = []
    attempt = claim(run)
    broken = BrokenStore(tmp_path)
    saver = Saver(attempt, results.append)
    for iteration in range(1, 5):
        saver.save(at(checkpoint, iteration))
    wait_until(lambda: any(result.outcome == "failed" for result in results))
    broken.mend()
    saver.close(20)
    outcomes = [result.outcome for result in results]
    assert (outcomes.count("saved"), outcomes.count("skipped")) == (1, 3)
    assert outcomes.count("failed") == saver.counts.num_failed_saves
    (saved,) = [result for result in results if result.outcome == "saved"]
    assert saved.size_bytes == run.manifest(run.refs()[0]).size_bytes > 1000
    assert saved.seconds > 0


def test_broken_store_does_not_delay_training_and_the_newest_and_the_best_are_saved_later(
    run, checkpoint, tmp_path, caplog
):
    attempt = claim(run)
    broken = BrokenStore(tmp_path)
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
    assert "a checkpoint could not be saved; training continues" in caplog.text
    assert "saving works again" in caplog.text


def test_failures_are_logged_only_once_a_minute(run, checkpoint, tmp_path, caplog):
    attempt = claim(run)
    broken = BrokenStore(tmp_path)
    saver = Saver(attempt)
    for iteration in range(1, 5):
        failed = saver.counts.num_failed_saves
        saver.save(at(checkpoint, iteration))
        wait_until(lambda: saver.counts.num_failed_saves > failed)  # noqa: B023
    assert caplog.text.count("could not be saved") == 1
    broken.mend()
    saver.close(20)


def test_checkpoint_that_is_not_saved_in_time_is_named_with_the_cause_and_can_be_rescued(
    run, checkpoint, tmp_path
):
    attempt = claim(run)
    BrokenStore(tmp_path)
    saver = Saver(attempt)
    saver.save(at(checkpoint, 5))
    with pytest.raises(
        NotSaved, match=r"iteration 5 is not saved: .*blobs.*: (File exists|Not a directory)"
    ) as raised:
        saver.close(0.5)
    raised.value.rescue(tmp_path / "unsaved")
    rescued = Run.at(tmp_path / "unsaved")
    (ref,) = rescued.refs()
    assert ref.attempt_id == attempt.id  # it can be copied into the store as it is
    assert rescued.load(ref).iteration == 5


def test_thread_ends_when_the_saver_is_closed(run, checkpoint, tmp_path):
    num_threads = threading.active_count()
    good = Saver(claim(run))
    good.save(at(checkpoint, 1))
    good.close(10)
    attempt = claim(run)
    for path in (tmp_path / "run" / "blobs").rglob("*.*"):
        path.unlink()
    for path in [*(tmp_path / "run" / "blobs").iterdir(), tmp_path / "run" / "blobs"]:
        path.rmdir()
    BrokenStore(tmp_path)
    bad = Saver(attempt)
    bad.save(at(checkpoint, 1))
    with pytest.raises(NotSaved):
        bad.close(0.2)
    wait_until(lambda: threading.active_count() == num_threads)


def test_superseded_attempt_fails_at_its_next_save(run, checkpoint):
    saver = Saver(claim(run))
    claim(run)
    saver.save(at(checkpoint, 1))
    with pytest.raises(Superseded):
        saver.close(10)
    with pytest.raises(Superseded):
        saver.save(at(checkpoint, 2))
    assert iterations(run) == []


def test_earlier_of_two_processes_that_train_one_run_stops(tmp_path):
    config = override(from_dict(TINY), {"collection": {"total_frames": 120 * 200}})
    directory = tmp_path / "run"

    def start_another_attempt(report):
        if report.progress.iteration == 3:
            claim(Run.at(directory))

    reports = []
    with pytest.raises(Superseded, match="this one, attempt 1, stops"):
        train_here(config, directory, lambda report: (reports.append(report), start_another_attempt(report)))
    assert len(reports) < 50
    assert max(iterations(Run.at(directory))) <= 3
