"""The training on a store that fails: a fault proxy stands in front of real S3 servers, or the disk is full."""

import itertools
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pipelines.__main__
from mappo.config import from_dict, override, to_json
from mappo.errors import StageFailed, StoreError, StoreUnavailable
from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.stages.evaluate import evaluate
from mappo.stages.train import train as train_stage
from mappo.training.history import HistoryFile
from mappo.training.training import train
from tests.conftest import TINY
from tests.runs.test_saver import wait_until
from tests.support.fault_proxy import always, fault_proxy, first
from tests.support.runs import assert_same_training, iterations, kill, last, start_training, train_here
from tests.support.services import file_system_of, s3_client, use_s3

CONFIG = override(
    from_dict(TINY),
    {
        "environment": {"max_episode_frames": 13},
        "collection": {"num_envs": 24, "rollout_frames": 5, "total_frames": 120 * 12},
        "selection": {"interval_iterations": 3, "episodes_per_seed": 2},
    },
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run without faults."""
    return train_here(CONFIG, tmp_path_factory.mktemp("whole"))


@pytest.fixture(params=["rgw", pytest.param("moto", marks=pytest.mark.long)])
def endpoint(request):
    return request.getfixturevalue(f"{request.param}_endpoint")


@pytest.fixture
def proxy(endpoint, monkeypatch):
    with fault_proxy(endpoint) as proxy:
        proxy.location = f"s3://{use_s3(monkeypatch, proxy.endpoint)}/runs/killed"
        yield proxy


@pytest.fixture
def moto_proxy(moto_endpoint, monkeypatch):
    with fault_proxy(moto_endpoint) as proxy:
        proxy.location = f"s3://{use_s3(monkeypatch, proxy.endpoint)}/runs/killed"
        yield proxy


@pytest.fixture
def small_disk(tmp_path):
    with file_system_of(4096, tmp_path / "disk") as directory:
        yield directory


def only(count, action, method, part):
    """Return a rule for one request: number `count` (from 1) of those with this method and part of the path."""
    matching = itertools.count(1)
    return lambda number, its_method, path: (
        action if its_method == method and part in path and next(matching) == count else ""
    )


def train_at(location, folder, on_report=lambda _: None, patience_seconds=60.0):
    return train(CONFIG, Run.at(location, patience_seconds), HistoryFile(folder / "history.csv"), on_report)


def num_puts(proxy, part):
    return sum(method == "PUT" and part in path for method, path in proxy.requests)


def has_only_good_checkpoints(location):
    """Load every checkpoint of a run; return whether there is any."""
    run = Run.at(location)
    refs = run.refs()
    for ref in refs:
        run.load(ref)
    return bool(refs)


def test_training_on_a_store_that_fails_now_and_then_loses_nothing(proxy, whole, tmp_path):
    chance = random.Random(0)
    faults = [
        "503 SlowDown",
        "reset early",
        "reset middle",
        "lose reply",
        "truncate",
        "corrupt",
        "delay 0.1",
        "503",
    ]
    proxy.rule = lambda *request: chance.choice(faults) if chance.random() < 0.2 else ""

    def on_report(report):
        """Wait until at least half of the checkpoints are saved, so that the saver does not skip most of them."""
        wait_until(lambda: num_puts(proxy, "/checkpoints/") >= report.progress.iteration // 2)

    assert_same_training(train_at(proxy.location, tmp_path, on_report), whole)
    proxy.rule = always("")
    assert_same_training(last(proxy.location), whole)
    assert has_only_good_checkpoints(proxy.location)


def test_run_that_was_killed_during_a_save_resumes_and_ends_the_same(proxy, whole, tmp_path, capsys):
    store, _, name = proxy.location.rpartition("/")
    proxy.rule = only(8, "hold", "PUT", "/blobs/")  # in the second save, since each save has five parts
    process = start_training(CONFIG, store, name, tmp_path)
    assert proxy.held.wait(60)
    kill(process)
    proxy.rule = always("")
    proxy.released.set()
    time.sleep(0.2)
    train_stage(to_json(CONFIG), proxy.location, tmp_path / "history.csv")
    assert "resumed after" in capsys.readouterr().out
    assert_same_training(last(proxy.location), whole)
    assert has_only_good_checkpoints(proxy.location)
    assert len(Run.at(proxy.location).garbage(grace_seconds=-5)) >= 2  # the parts that were saved before the kill


def test_process_that_continues_after_another_attempt_has_started_stops_and_damages_nothing(
    moto_proxy, whole, tmp_path
):
    store, _, name = moto_proxy.location.rpartition("/")
    moto_proxy.rule = only(2, "hold", "PUT", "/checkpoints/")
    held_process = start_training(CONFIG, store, name, tmp_path)
    assert moto_proxy.held.wait(60)
    moto_proxy.rule = always("")
    finished = train_at(moto_proxy.location, tmp_path / "other")
    moto_proxy.released.set()
    output, _ = held_process.communicate(timeout=60)
    assert held_process.returncode == 1
    assert "failed: " in output
    assert "attempt 2 of this run has begun on" in output
    assert_same_training(finished, whole)
    assert_same_training(last(moto_proxy.location), whole)


def test_store_that_is_down_for_a_while_does_not_delay_training(moto_proxy, whole, tmp_path):
    reports = []

    def on_report(report):
        reports.append(report)
        if report.progress.iteration == 3:
            moto_proxy.rule = always("503 SlowDown")
        if report.progress.iteration == 9:
            moto_proxy.rule = always("")

    assert_same_training(train_at(moto_proxy.location, tmp_path, on_report), whole)
    assert len(reports) == 12
    assert reports[-1].saves.num_skipped_saves > 0
    assert_same_training(last(moto_proxy.location), whole)


def test_slow_store_delays_training_less_than_one_save_takes(moto_proxy, tmp_path):
    moto_proxy.rule = always("delay 0.2", "PUT")
    reports = []
    train_at(moto_proxy.location, tmp_path, reports.append)
    assert sum(report.save_seconds for report in reports) < 1.3  # a single save takes longer
    assert reports[-1].saves.num_skipped_saves > 0
    assert iterations(moto_proxy.location)[0] == 12


@pytest.mark.parametrize("fault", ["403 AccessDenied", pytest.param("503 SlowDown", marks=pytest.mark.long)])
def test_refused_deletions_lose_no_checkpoint_and_are_logged_once(moto_proxy, whole, tmp_path, caplog, fault):
    moto_proxy.rule = always(fault, "DELETE")
    reports = []

    def on_report(report):
        reports.append(report)
        wait_until(lambda: num_puts(moto_proxy, "/checkpoints/") >= report.progress.iteration - 1)

    assert_same_training(train_at(moto_proxy.location, tmp_path, on_report), whole)
    assert reports[-1].saves.num_failed_saves == 0
    assert iterations(moto_proxy.location) == list(range(12, 0, -1))
    assert caplog.text.count("old checkpoints are not deleted; training and saving continue") == 1
    moto_proxy.rule = always("")
    assert_same_training(last(moto_proxy.location), whole)


def test_expired_credentials_are_logged_and_saving_continues_with_new_ones(moto_proxy, whole, tmp_path, caplog):
    def on_report(report):
        if report.progress.iteration == 3:
            moto_proxy.rule = always("400 ExpiredToken")
        if report.progress.iteration == 9:
            wait_until(lambda: "ExpiredToken" in caplog.text)
            moto_proxy.rule = always("")

    with caplog.at_level(logging.WARNING):
        train_at(moto_proxy.location, tmp_path, on_report)
    assert "ExpiredToken: the credentials are wrong, expired, or not allowed" in caplog.text
    assert "saving works again" in caplog.text
    assert_same_training(last(moto_proxy.location), whole)


def test_store_that_is_down_at_the_end_fails_the_stage_and_the_result_is_saved_locally(
    moto_proxy, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mappo.training.training._SAVE_TIMEOUT_SECONDS", 1.0)
    moto_proxy.rule = lambda number, method, path: "503 SlowDown" if "/blobs/" in path else ""
    with pytest.raises(StageFailed):
        train_stage(to_json(CONFIG), moto_proxy.location, tmp_path / "history.csv")
    assert f"kept in {tmp_path / 'unsaved'}: copy its content to {moto_proxy.location}" in capsys.readouterr().out
    moto_proxy.rule = always("")
    bucket, _, prefix = moto_proxy.location.removeprefix("s3://").partition("/")
    with s3_client() as client:
        for path in (tmp_path / "unsaved").rglob("*.*"):
            key = f"{prefix}/{path.relative_to(tmp_path / 'unsaved').as_posix()}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    assert_same_training(train_at(moto_proxy.location, tmp_path / "again"), whole)


def test_damaged_downloads_are_repeated(proxy, whole):
    claim(Run.at(proxy.location)).save(whole)
    for fault in ("corrupt", "truncate"):
        proxy.rule = first(2, fault, "GET")
        assert_same_training(last(proxy.location), whole)


def test_previous_checkpoint_is_used_when_every_download_of_the_newest_is_damaged(
    moto_proxy, whole, tmp_path, caplog
):
    class StopTraining(Exception):
        pass

    def stop(report):
        if report.progress.iteration == 8:
            raise StopTraining

    with pytest.raises(StopTraining):
        train_at(moto_proxy.location, tmp_path, stop)
    run = Run.at(moto_proxy.location)
    newest, previous, *_ = run.refs()
    part = run.manifest(newest).file_name("simulation")
    moto_proxy.rule = lambda number, method, path: "corrupt" if method == "GET" and path.endswith(part) else ""
    reports = []
    with caplog.at_level(logging.WARNING):
        assert_same_training(train_at(moto_proxy.location, tmp_path / "again", reports.append), whole)
    assert reports[0].progress.iteration == previous.iteration + 1
    assert f"{newest} cannot be used, trying the previous checkpoint: " in caplog.text
    assert "damaged or replaced" in caplog.text


def test_unreachable_store_stops_training_before_its_first_iteration(moto_proxy, monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnavailable, match=endpoint):
        train_at(moto_proxy.location, tmp_path, patience_seconds=0.5)
    assert not (tmp_path / "history.csv").exists()


def test_store_that_ignores_conditions_is_logged_and_the_earlier_attempt_cannot_save(
    moto_proxy, whole, tmp_path, caplog
):
    moto_proxy.rule = always("drop condition")
    with caplog.at_level(logging.WARNING):
        first_attempt = claim(Run.at(moto_proxy.location))
    assert "ignores conditional writes" in caplog.text
    assert_same_training(train_at(moto_proxy.location, tmp_path), whole)
    with pytest.raises(StoreError, match="attempt 2 of this run has begun"):
        first_attempt.save(whole)
    assert_same_training(last(moto_proxy.location), whole)


def test_attempts_that_race_for_a_number_get_different_numbers(proxy):
    attempts, threads = [], []
    for _ in range(4):
        thread = threading.Thread(target=lambda: attempts.append(claim(Run.at(proxy.location))))
        threads.append(thread)
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attempt.number for attempt in attempts) == [1, 2, 3, 4]


@pytest.mark.long  # test_secrets.py searches what every command prints; other tests here kill training
def test_pipeline_that_was_killed_resumes_and_writes_no_secret(moto_proxy, tmp_path, monkeypatch):
    """Kill the local pipeline in training, start it again, and search all its output for credentials."""
    canaries = ["canary-access-key-5f1d", "canary-secret-key-77ac", "canary-session-token-b2e9"]
    for name, canary in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), canaries, strict=True):
        monkeypatch.setenv(f"AWS_{name}", canary)
    store, _, name = moto_proxy.location.rpartition("/")
    config = override(CONFIG, {"environment": {"scenario": "simple", "scenario_kwargs": {}}})
    (tmp_path / "config.json").write_text(to_json(config))

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run", "--config", "config.json", "--run", name, "--store", store],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    moto_proxy.rule = only(2, "hold", "PUT", "/checkpoints/")
    killed = start()
    assert moto_proxy.held.wait(120)
    os.killpg(killed.pid, signal.SIGKILL)
    output = killed.communicate()[0]
    moto_proxy.released.set()
    resumed = start()
    output += resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, output
    assert "resumed after" in output
    assert moto_proxy.location in output
    files = ["--config", str(tmp_path / "config.json"), "--output", str(tmp_path / "training.yaml")]
    assert pipelines.__main__.main(["compile", "--image", "a:1", *files]) == 0
    contents = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = Run.at(moto_proxy.location)
    contents |= {entry.key: run.store.read(entry.key, 2**30) for entry in run.store.entries()}
    assert any(key.startswith("checkpoints/") for key in contents)
    assert "evaluation" in output
    for canary in canaries:
        assert canary not in output
        assert [name for name, content in contents.items() if canary.encode() in content] == []


def fill(disk):
    with pytest.raises(OSError, match="No space left"), (disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_history_is_complete_again_as_soon_as_the_disk_has_space(small_disk, tmp_path, caplog):
    reports = []
    train_at(tmp_path / "run", tmp_path, reports.append)
    history = HistoryFile(small_disk / "history.csv")
    history.append(reports[0])
    fill(small_disk)
    for report in reports * 3:
        history.append(report)
    assert "history.csv: No space left on device; training continues, but free disk space" in caplog.text
    (small_disk / "filling").unlink()
    history.append(reports[0])
    assert (small_disk / "history.csv").read_text() == history.text


def test_disk_that_is_full_for_a_while_does_not_stop_training_and_everything_is_saved_in_the_end(
    small_disk, whole, caplog
):
    def on_report(report):
        if report.progress.iteration == 3:
            fill(small_disk)
        if report.progress.iteration == 9:
            wait_until(lambda: "No space left" in caplog.text)
            (small_disk / "filling").unlink()

    with caplog.at_level(logging.WARNING):
        assert_same_training(train_at(small_disk / "run", small_disk, on_report), whole)
    assert "No space left on device; free some space, and saving continues" in caplog.text
    assert "saving works again" in caplog.text
    assert_same_training(last(small_disk / "run"), whole)
    assert (small_disk / "history.csv").read_text() == last(small_disk / "run").history


def test_disk_that_is_read_only_for_a_while_does_not_stop_training(small_disk, whole, tmp_path, caplog):
    def remount(mode):
        """Mount the disk again; that fails while the saver has a file open."""
        command = ["mount", "-o", f"remount,{mode}", str(small_disk)]
        wait_until(lambda: subprocess.run(command, capture_output=True).returncode == 0)

    def on_report(report):
        if report.progress.iteration == 3:
            remount("ro")
        if report.progress.iteration == 9:
            wait_until(lambda: "Read-only file system" in caplog.text)
            remount("rw")

    with caplog.at_level(logging.WARNING):
        assert_same_training(train_at(small_disk / "run", tmp_path, on_report), whole)
    assert "Read-only file system; make it writable, and saving continues" in caplog.text
    assert "saving works again" in caplog.text
    assert_same_training(last(small_disk / "run"), whole)


def test_best_output_of_training_is_a_run_with_one_checkpoint(tmp_path):
    result = train_stage(to_json(CONFIG), tmp_path / "run", tmp_path / "history.csv", tmp_path / "best")
    assert len(iterations(tmp_path / "best")) == 1
    assert result.metadata["seed"] == "0"
    shutil.rmtree(tmp_path / "run")
    assert evaluate(to_json(CONFIG), tmp_path / "best").metrics["training_frames"] > 0
