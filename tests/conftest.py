import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mappo.config import ExperimentConfig, from_dict
from mappo.fast_simulation.making import make_fast_simulation
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train
from pipelines.__main__ import main
from tests.support.kubeflow_server import KubeflowServer
from tests.support.services import ceph_rgw, moto_server, use_s3
from tests.support.surroundings import set_surroundings

set_surroundings()  # before any fixture starts a process
Cli = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> ExperimentConfig:
    """Return a configuration of navigation with two agents, small enough to train in a second."""
    return from_dict(TINY)


TINY = {
    "environment": {
        "scenario": "navigation",
        "scenario_kwargs": {"n_agents": 2, "shared_rew": False},
        "max_episode_frames": 10,
    },
    "networks": {"hidden_sizes": [16]},
    "learner": {"epochs": 2, "minibatch_frames": 50, "update": "plain"},
    "collection": {"num_envs": 6, "rollout_frames": 20, "total_frames": 360, "simulation": "plain"},
    "evaluation": {"seeds": [1, 2], "episodes_per_seed": 4},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return the real checkpoint after the third and last iteration of a run of TINY."""
    directory = tmp_path_factory.mktemp("trained")
    return train(from_dict(TINY), Run.at(directory), HistoryFile(directory / "history.csv"), lambda _: None)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fast simulations and updates run the traced graphs as they are; to compile one takes 12 s."""
    monkeypatch.setattr("mappo.compute.traced_function.compile_graph", lambda graph, _: graph)
    monkeypatch.setattr("mappo.compute.compiler.Compiled.wait", lambda _: None)
    monkeypatch.setattr(
        "mappo.fast_simulation.fast_simulation.make_fast_simulation",
        lambda config, environment, **_: make_fast_simulation(config, environment, is_compiled=False),
    )


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubeflowServer]:
    """Start a test server of Kubeflow Pipelines, the only Kubeflow in the environment and the home directory."""
    for name in [name for name in os.environ if name.startswith(("KF_PIPELINES_", "KUBE", "MAPPO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with KubeflowServer() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command and returns its exit status, its output and its error output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def read(cli: Cli) -> Callable[..., Any]:
    """Return a function that runs a command, checks that it succeeds, and returns its JSON output."""

    def run(*arguments: str) -> Any:
        status, out, err = cli(*arguments, "--output", "json")
        assert status == 0, err
        return json.loads(out)

    return run


def endless(**environment: object) -> ExperimentConfig:
    """Return a configuration whose task has a reward of 1 each frame; see `tests.support.scenarios.Endless`."""
    return from_dict(
        {
            "environment": {
                "scenario": "tests.support.scenarios:Endless",
                "max_episode_frames": 20,
                **environment,
            },
            "networks": {"hidden_sizes": [16]},
            "learner": {
                "discount": 0.9,
                "epochs": 5,
                "minibatch_frames": 100,
                "learning_rate": 0.02,
                "learning_rate_schedule": "constant",
                "advantage_normalisation": "none",
            },
            "collection": {"num_envs": 8, "rollout_frames": 50, "total_frames": 8_000},
        }
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """Start moto, an S3 server that starts at once and checks little."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rgw_endpoint() -> Iterator[str]:
    """Start Ceph's RADOS gateway, a production S3 server that takes about 15 s to start."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as directory, ceph_rgw(Path(directory)) as endpoint:
        yield endpoint


@pytest.fixture
def s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket and return its name; the environment holds endpoint and credentials for boto3."""
    return use_s3(monkeypatch, moto_endpoint)


class Operations(TorchDispatchMode):
    """A counter of the operations that Python launches: of `operations`, or of all."""

    def __init__(self, *operations):
        super().__init__()
        self.count, self._operations = 0, operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self._operations or func in self._operations
        return func(*args, **(kwargs or {}))


def counted_waits():
    """Return a counter of the operations that read a tensor's values, for which Python waits for the GPU."""
    return Operations(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
