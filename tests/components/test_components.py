"""Run stages as their pods do: the compiled command with the executor input of the test server's driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mappo.config import from_dict, to_json
from mappo.runs.run import Run
from pipelines.compiling import compile_pipeline
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.submission import Submission
from pipelines.site import Site, StagePod, StagePods
from tests.conftest import TINY
from tests.support.kubeflow_server import KubeflowServer
from tests.support.runs import train_here

SITE = Site(
    image="a/b:1",
    stages=StagePods(
        train=StagePod(retries=2, backoff_seconds=1), validate=StagePod(retries=1, backoff_seconds=1)
    ),
)
CONFIG = {**TINY, "collection": {"num_envs": 6, "rollout_frames": 20, "total_frames": 2_400}}
SHORT = to_json(from_dict(TINY))


class Cluster:
    """A run of the training pipeline, whose stages a test starts as Kubeflow's launcher would."""

    def __init__(self, server: KubeflowServer, directory: Path, site: Site = SITE, **parameters: Any):
        self.server, self.directory = server, directory
        self.compiled = compile_pipeline("training", site, {"config": config()})
        api = Api(Connection(endpoint=server.url))
        root = str(directory / "artifacts")
        self.run_id = submit(api, Submission(self.compiled, parameters, pipeline_root=root)).run_id

    def start(self, stage: str, pod: str = "pod-0", **environment: str) -> "subprocess.Popen[str]":
        """Start the container of a stage in a pod of this name."""
        self.server.reach(self.run_id, stage)
        executor_input = json.dumps(self.server.executor_input_of(self.run_id, stage))
        container = self.compiled.specification["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]
        command = [word.replace("{{$}}", executor_input) for word in [*container["command"], *container["args"]]]
        assert command[:3] == ["python3", "-m", "components"]
        return subprocess.Popen(
            [sys.executable, *command[1:]],
            env={**os.environ, "KFP_POD_NAME": pod, "KFP_POD_UID": f"uid of {pod}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, stage: str, pod: str = "pod-0", **environment: str) -> tuple[int, str]:
        """Run a stage to its end; return its exit status and its log."""
        process = self.start(stage, pod, **environment)
        log, _ = process.communicate(timeout=120)
        return process.returncode, log

    def artifact(self, stage: str, name: str) -> Path:
        outputs = self.server.executor_input_of(self.run_id, stage)["outputs"]["artifacts"]
        return Path(outputs[name]["artifacts"][0]["uri"])


@pytest.fixture
def server(kubeflow: KubeflowServer, monkeypatch: pytest.MonkeyPatch) -> KubeflowServer:
    """Return the test server; stages started by the test import the repository."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return kubeflow


def config() -> str:
    return to_json(from_dict(CONFIG))


def part_hashes(run: Path) -> dict[str, str]:
    """Return the hash of each part of a run's last checkpoint."""
    stored = Run.at(run)
    return {name: part.sha256 for name, part in stored.manifest(stored.choose("last")).parts.items()}


def lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("[")]


@pytest.mark.long
def test_process_restarted_after_a_kill_ends_with_bit_identical_checkpoints(server, tmp_path):
    train_here(from_dict(CONFIG), tmp_path / "undisturbed")
    killed = Cluster(server, tmp_path / "killed")
    supervisor = killed.start("train")
    while not list(killed.artifact("train", "checkpoints").glob("checkpoints/*/*")):
        assert supervisor.poll() is None
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-P", str(supervisor.pid)], check=True)
    log, _ = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0, log
    assert "[train] attempt 0 ended: signal 9 ended its process (SIGKILL); attempt 1 begins in 1 s" in log
    assert "[train] attempt 1; 1 left" in log
    compared = ("networks", "optimiser", "simulation")
    expected = part_hashes(tmp_path / "undisturbed")
    actual = part_hashes(killed.artifact("train", "checkpoints"))
    assert {name: actual[name] for name in compared} == {name: expected[name] for name in compared}


def test_attempts_of_a_lost_pod_count_in_the_next_pod_and_in_the_metadata(server, tmp_path):
    cluster = Cluster(server, tmp_path)
    process = cluster.start("train")
    while not list(cluster.artifact("train", "checkpoints").glob("checkpoints/*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    status, log = cluster.finish("train", pod="pod-1", KFP_RETRY_INDEX="1")
    assert status == 0, log
    assert "[train] attempt 1; 1 left" in log
    output = server.executor_input_of(cluster.run_id, "train")["outputs"]["outputFile"]
    labels = json.loads(Path(output).read_text())
    assert labels["artifacts"]["best"]["artifacts"][0]["metadata"]["attempts"] == "2"


@pytest.mark.parametrize(
    ("parameters", "stage", "reason"),
    [
        (
            {"run": "first"},
            "train",
            "run = 'first': a name needs a store, in which a later start finds the run again",
        ),
        pytest.param(
            *({"train_gpu_count": "1"}, "train", "gpu_count = 1, and the stage would run on the CPU: "),
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"config": config().replace('"navigation"', '"nowhere"')},
            "validate",
            "environment: environment.scenario = 'nowhere'",
            marks=pytest.mark.long,
        ),
    ],
)
def test_permanent_failure_is_not_retried_and_its_reason_is_logged(server, tmp_path, parameters, stage, reason):
    cluster = Cluster(server, tmp_path, **parameters)
    status, log = cluster.finish(stage)
    assert status == 1
    messages = lines(log)
    assert messages[0].startswith(f"[{stage}] attempt 0; ")
    assert any(line.startswith(f"[{stage}] failed: {reason}") for line in messages), log
    assert messages[-1] == f"[{stage}] not tried again: another attempt would fail in the same way"
    assert "Traceback" not in log
    later_messages = lines(cluster.finish(stage, pod="pod-1")[1])
    assert later_messages[0].startswith(f"[{stage}] failed: {reason}")
    assert later_messages[-1].startswith(f"[{stage}] not tried again: 1 of at most ")


def test_missing_store_is_retried_since_it_may_come_back(server, tmp_path):
    root = tmp_path / "artifacts"
    root.write_text("a file where a directory should be, as a volume that is not mounted yet")
    cluster = Cluster(server, tmp_path)
    status, log = cluster.finish("validate")
    assert status == 1
    messages = lines(log)
    assert messages[0].startswith("[validate] warning: attempts are counted in this pod alone: ")
    assert "[validate] attempt 1; 0 left" in messages


def test_run_without_a_name_is_kept_in_the_store_under_its_id(server, tmp_path):
    cluster = Cluster(server, tmp_path, config=SHORT, store=str(tmp_path / "runs"))
    assert cluster.finish("train", MAPPO_PIPELINE_RUN=cluster.run_id)[0] == 0
    assert [run.name for run in (tmp_path / "runs").iterdir()] == [cluster.run_id]


@pytest.mark.long  # test_schedules.py compares the names of all stages on the test server
def test_scheduled_time_is_the_same_in_every_stage(server, tmp_path):
    cluster = Cluster(server, tmp_path, config=SHORT, run="n-[[ScheduledTime]]", store=str(tmp_path / "runs"))
    assert cluster.finish("train")[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    scheduled_at = server.executor_input_of(cluster.run_id, "train")["inputs"]["parameterValues"]["scheduled_at"]
    assert run.name == "n-" + "".join(character for character in scheduled_at if character.isdigit())
