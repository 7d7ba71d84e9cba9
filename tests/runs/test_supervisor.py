"""The attempts of a stage. Each test imitates the pods that Argo creates with one retry policy of a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mappo.compute.cgroups import num_oom_kills
from mappo.runs.supervisor import COUNT_VARIABLE, FINAL_STATUS, REASON_VARIABLE, Ledger, RetryPolicy, supervise

POLICY = RetryPolicy(retries=2, backoff_seconds=0.05, backoff_factor=2.0)
KEY = "attempts-0.json"


class Stage:
    """A stage whose process appends its attempt's number to a file, and then runs the test's code."""

    def __init__(self, directory: Path):
        self.directory, self.lines = directory, []

    @property
    def attempts(self) -> list[int]:
        file = self.directory / "attempts"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, ending: str, pod: str = "executor-0", uid: str = "u0", **more) -> int:
        """Run the stage in one pod, and return its exit status.

        `ending` is the Python code of the stage's process; its variable `attempt` is the number of the attempt.
        """
        body = (
            f"import os, signal, sys; attempt = int(os.environ['{COUNT_VARIABLE}']) - 1; "
            f"print(attempt, file=open({str(self.directory / 'attempts')!r}, 'a'))\n{ending}"
        )
        environment: Mapping[str, str] = {"KFP_POD_NAME": pod, "KFP_POD_UID": uid, **more}
        ledger = Ledger(str(self.directory / "store"), KEY, environment, self.lines.append)
        return supervise("train", [sys.executable, "-c", body], POLICY, ledger, self.lines.append)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("raise RuntimeError('CUDA error: an illegal memory access')", "its process ended with exit status 1"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "signal 11 ended its process (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9 ended its process (SIGKILL)"),
        ("sys.exit(143)", "its process ended with exit status 143"),
    ],
)
def test_process_that_fails_is_retried_as_often_as_the_site_allows(stage, ending, reason):
    assert stage.run(ending) == 1
    assert stage.attempts == [0, 1, 2]
    assert stage.lines[:2] == ["attempt 0; 2 left", f"attempt 0 ended: {reason}; attempt 1 begins in 0.05 s"]
    assert stage.lines[-2:] == [f"failed: {reason}", "not tried again: all 3 attempts were made"]


def test_stage_succeeds_in_a_later_attempt_after_a_growing_wait(stage):
    start = time.monotonic()
    assert stage.run("sys.exit(attempt < 2)") == 0
    assert stage.attempts == [0, 1, 2]
    assert time.monotonic() - start > 0.05 + 0.1
    assert "failed" not in " ".join(stage.lines)


def test_final_failure_is_not_retried(stage):
    ending = (
        f"open(os.environ['{REASON_VARIABLE}'], 'w').write('seed = 1.5: no integer'); sys.exit({FINAL_STATUS})"
    )
    assert stage.run(ending) == 1
    assert stage.attempts == [0]
    assert stage.lines == ["attempt 0; 2 left", "not tried again: another attempt would fail in the same way"]


def test_later_pods_of_a_stage_that_failed_for_good_make_no_attempt(stage):
    """Imitate the retry policy Always: Argo creates a new pod after any failure."""
    stage.run(f"sys.exit({FINAL_STATUS})")
    assert stage.run("pass", pod="executor-1", uid="u1") == 1
    assert stage.attempts == [0]
    assert stage.lines[-2:] == [
        f"failed: its process ended with exit status {FINAL_STATUS}",
        "not tried again: 1 of at most 3 attempts were made",
    ]


def test_lost_pods_and_failed_processes_share_one_budget_of_attempts(stage):
    """Imitate the retry policy OnError: Argo replaces each lost pod, at several levels of the workflow."""
    for index, pod in enumerate(("train(0).executor(0)", "train(0).executor(1)")):
        with lost_pod(stage, pod, f"u{index}"):
            pass
    assert stage.attempts == [0, 1]
    assert stage.run("sys.exit(1)", pod="train(1).executor(0)", uid="u2") == 1
    assert stage.run("pass", pod="train(1).executor(1)", uid="u3") == 1
    assert stage.attempts == [0, 1, 2]


def test_lost_pods_alone_use_up_the_budget_of_attempts(stage):
    for index in range(3):
        with lost_pod(stage, f"executor-{index}", f"u{index}"):
            pass
    assert stage.run("pass", pod="executor-3", uid="u3") == 1
    assert stage.attempts == [0, 1, 2]
    assert stage.lines[-2:] == [
        "failed: its pods were lost",
        "not tried again: 3 of at most 3 attempts were made",
    ]


def test_run_that_somebody_retries_has_all_its_attempts_again(stage):
    """Imitate the API, which creates failed pods again under their old names."""
    stage.run("sys.exit(1)")
    assert stage.run("sys.exit(attempt < 1)", uid="another") == 0
    assert stage.attempts == [0, 1, 2, 0, 1]


def test_second_retry_of_a_run_works_when_its_pod_was_unknown_at_the_first(stage):
    """Check that the ledger remembers a pod that makes no attempt."""
    stage.run("sys.exit(1)", pod="executor(1)", uid="u1")
    assert stage.run("pass", pod="executor(0)", uid="u2") == 1
    assert stage.run("pass", pod="executor(0)", uid="u3") == 0


def test_stage_that_succeeded_has_all_its_attempts_again_when_argo_repeats_the_pipeline(stage):
    """Imitate root(1): the validation that succeeded runs again, since a later stage lost its pods."""
    for index in range(4):
        assert stage.run("pass", pod=f"root({index})", uid=f"u{index}") == 0
    assert stage.attempts == [0, 0, 0, 0]


def test_attempts_are_counted_in_the_pod_alone_when_the_store_fails(stage, tmp_path):
    (tmp_path / "store").write_text("a file where a directory should be")
    assert stage.run("sys.exit(1)", KFP_RETRY_INDEX="1") == 1
    assert stage.attempts == [1, 2]
    assert stage.lines[0].startswith("warning: attempts are counted in this pod alone: ")


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 9000, "{}x", '{"num_attempts": "many"}', '{"num_attempts": -1}', "[]", "null"),
        *('{"num_attempts": 1e300}', '{"num_attempts": true}', '{"num_attempts": 9' + "0" * 30 + "}"),
        *('{"num_attempts": ' + "9" * 5000 + "}", '{"num_attempts": 3, "pods": []}'),
    ],
    ids=range(11),
)
def test_unreadable_count_is_reported_and_does_not_stop_the_stage(stage, tmp_path, text):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / KEY).write_text(text)
    assert stage.run("pass") == 0
    assert "the count of attempts cannot be read" in stage.lines[0]


def test_process_killed_for_memory_is_not_retried(stage, monkeypatch, tmp_path):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 0\noom_kill 4\n")
    monkeypatch.setattr(
        "mappo.runs.supervisor.num_oom_kills", lambda: num_oom_kills(tmp_path, membership(tmp_path))
    )
    kill = f"open({str(events)!r}, 'w').write('oom_kill 5'); os.kill(os.getpid(), signal.SIGKILL)"
    assert stage.run(kill) == 1
    assert stage.attempts == [0]
    assert any(line.startswith("failed: out of memory: ") and "-p train_memory=" in line for line in stage.lines)


def membership(directory: Path) -> Path:
    """Write the membership file of a cgroup of version 2 whose directory is `directory`; return its path."""
    (directory / "membership").write_text("0::/\n")
    return directory / "membership"


@pytest.mark.parametrize(
    ("file", "text"),
    [("memory.events", "low 0\noom_kill 3\n"), ("memory.oom_control", "oom_kill_disable 0\noom_kill 3\n")],
)
def test_kills_for_memory_are_counted_in_both_versions_of_cgroups(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert num_oom_kills(tmp_path, membership(tmp_path)) == 3


def test_stage_that_gets_sigterm_forwards_it_and_is_not_retried(tmp_path):
    script = (
        "import sys\n"
        "from mappo.runs.supervisor import *\n"
        f"ledger = Ledger({str(tmp_path)!r}, 'a.json', {{}}, print)\n"
        "child = 'import time, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        'print("up", flush=True); time.sleep(60)\'\n'
        "sys.exit(supervise('train', [sys.executable, '-c', child], RetryPolicy(5, 1, 1), ledger, print))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.stdout.readline() != "up\n":
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "a.json").read_text())["num_attempts"] == 1


class lost_pod:  # noqa: N801  (reads as a statement)
    """A pod that is killed while its stage runs, so that it cannot report its end."""

    def __init__(self, stage: Stage, pod: str, uid: str):
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from tests.runs.test_supervisor import Stage\n"
            f"Stage(Path({str(stage.directory)!r})).run('import time; time.sleep(60)', {pod!r}, {uid!r})\n"
        )
        self._stage, num_attempts = stage, len(stage.attempts)
        self._process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while len(stage.attempts) == num_attempts:
            assert self._process.poll() is None
            time.sleep(0.02)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
