"""The commands whose outputs are closed, full, or a pipe whose reader has left: stages go on, others fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mappo.runs.run import Run
from tests.cli.test_main import TINY, run_flags
from tests.support.runs import iterations
from tests.support.services import file_system_of

ROOT = Path(__file__).parents[2]
STUDY = ["--tuning.episodes-per-seed=4", "--tuning.pruner=none", "--retrain-seeds=2", "--trials=1"]


def shell(command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command line in which MAPPO and PIPELINES stand for the programs."""
    for program in ("mappo", "pipelines", "components"):
        command = command.replace(program.upper(), f"{sys.executable} -m {program}")
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("redirection", "status", "reason"),
    [
        (">&-", 1, "Bad file descriptor"),
        (">/dev/full", 1, "No space left on device"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("<&- 2>&-", 0, ""),
        (">/dev/full 2>&-", 1, ""),
    ],
)
@pytest.mark.parametrize("command", ["MAPPO recipes", "MAPPO --help", "PIPELINES --help"])
def test_command_whose_output_is_lost_fails_in_one_line(tmp_path, command, redirection, status, reason):
    run = shell(f"{command} {redirection}", tmp_path)
    message = f"{command.split()[0].lower()}: error: the output cannot be written: {reason}\n" if reason else ""
    assert (run.returncode, run.stderr) == (status, message)


def test_error_on_the_command_line_keeps_its_status_when_nothing_can_be_printed(tmp_path):
    for command in ("MAPPO show-config --learner.clip-epsilon=9", "MAPPO nothing", "PIPELINES runs --nothing"):
        assert shell(f"{command} >&- 2>&-", tmp_path).returncode == 2


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
    run = shell("MAPPO report ü", tmp_path, PYTHONIOENCODING="ascii")
    assert run.returncode == 2
    assert run.stderr.startswith(r"mappo report: error: \xfc: ")


def test_file_of_a_run_never_receives_what_is_printed(tmp_path):
    """Close all streams, so that the descriptors 0 to 2 are free for the first files that the training opens."""
    flags = [*run_flags(tmp_path / "run"), *TINY, "--environment.scenario=tests.support.scenarios:Chatty"]
    run = shell(f"MAPPO train {' '.join(flags)} <&- >&- 2>&-", tmp_path)
    assert run.returncode == 0
    assert iterations(tmp_path / "run") == [2, 1]
    stored = Run.at(tmp_path / "run")
    for ref in stored.refs():
        stored.load(ref)
    assert "chatty" not in (tmp_path / "run" / "history.csv").read_text()


def statuses_of(commands: list[tuple[str, str, list[str]]], directory: Path) -> list[int]:
    """Run commands, each a kind of lost output, a program and its arguments; return their exit statuses."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.lost_output", json.dumps(commands)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in run.stderr, run.stderr
    return json.loads(run.stdout)


@pytest.mark.long
def test_stages_go_on_and_keep_their_exit_status_when_nothing_can_be_printed(tmp_path):
    chatty = ["--environment.scenario=tests.support.scenarios:Chatty"]
    in_processes = ["--collection.processes=2", "--learner.minibatch-frames=30"]
    study = ["tune", "--study=s", *STUDY, *TINY]
    commands = [
        ("full", ["validate", *TINY], 0),
        ("full", ["train", "--run=first", *TINY], 0),
        ("gone", ["train", "--run=second", *TINY, *chatty, *in_processes], 0),
        ("read-only", ["train", "--run=third", "--tensorboard=events", *TINY], 0),
        ("full", ["train", "--run=first", *TINY, "--learner.epochs=2"], 2),
        ("gone", ["train", "--run=none", *TINY, "--learner.clip-epsilon=9"], 2),
        ("full", ["evaluate", "runs/first"], 0),
        ("gone", ["evaluate", "runs/missing"], 2),
        ("gone", ["promote", "runs/first", "--gate.num-seeds=2"], 0),
        ("gone", ["report", "runs/first", "runs/third"], 0),
        ("full", study, 0),
        ("gone", ["study", "work", "s"], 0),
        ("full", ["study", "work", "missing"], 2),
        ("full", ["study", "resume", "s"], 0),
        ("full", ["study", "show", "s"], 1),
        ("gone", ["study", "list"], 141),
        ("gone", ["checkpoints", "list", "runs/first"], 141),
        ("full", ["checkpoints", "verify", "runs/first"], 1),
        ("full", ["champion", "show"], 2),
        ("gone", ["compare", "runs/first"], 141),
    ]
    statuses = statuses_of([(kind, "mappo", arguments) for kind, arguments, _ in commands], tmp_path)
    for (kind, arguments, expected), status in zip(commands, statuses, strict=True):
        assert status == expected, (kind, arguments)
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"first", "second", "third"}


@pytest.mark.long
def test_local_pipeline_goes_on_when_nothing_can_be_printed(tmp_path):
    commands = [(kind, "pipelines", ["run", f"--run={kind}", *TINY]) for kind in ("full", "gone")]
    assert statuses_of(commands, tmp_path) == [0, 0]
    assert iterations(tmp_path / "runs" / "gone") == [2, 1]
    log = (tmp_path / "runs" / "gone" / "pipeline.log").read_text()
    assert "[evaluate] trained" in log


def test_training_outlives_the_disk_to_which_it_prints(tmp_path):
    with file_system_of(64, tmp_path / "disk") as disk:
        (disk / "filling").write_bytes(bytes(2**16))
        run = shell(f"MAPPO train {' '.join([*run_flags(tmp_path / 'run'), *TINY])} > disk/log 2>&1", tmp_path)
        assert run.returncode == 0
        assert (disk / "log").stat().st_size == 0
    assert iterations(tmp_path / "run") == [2, 1]
