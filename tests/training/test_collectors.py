"""The collector whose processes collect for one training run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from mappo.config import ExperimentConfig, override
from mappo.environment.keys import OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import ConfigError, NonFiniteObservation, ProcessDied, SimulationStateError
from mappo.learning.networks import make_networks
from mappo.recipes import recipe
from mappo.training.collectors import make_collector
from mappo.training.local_collector import LocalCollector
from tests.conftest import CPU
from tests.support.runs import assert_same_training, last, train_here


def config_of(processes=2, **collection) -> ExperimentConfig:
    collection = {"num_envs": 4, "rollout_frames": 10, "processes": processes, **collection}
    return override(
        recipe("navigation"),
        {
            "environment": {"max_episode_frames": 7},
            "networks": {"hidden_sizes": [8]},
            "selection": {"interval_iterations": 0},
        },
        {"collection": collection, "learner": {"minibatch_frames": 20, "epochs": 2}},
    )


@contextmanager
def running(config):
    """Yield a collector after `begin`, and a policy."""
    with private_random_streams(0, Stream.TRAINING, CPU), closing(make_collector(config, CPU)) as collector:
        policy = make_networks(config.networks, collector.environment).policy
        collector.begin(policy)
        yield collector, policy


@pytest.fixture(scope="module")
def collecting():
    """Yield one collector for all tests, since its processes take seconds to start; the last test kills one."""
    with running(config_of()) as collector_and_policy:
        yield collector_and_policy


def pids_of(collector):
    return [process._process.pid for process in collector._processes]


def test_each_process_collects_the_same_batch_as_a_local_collector_with_its_streams(collecting):
    together, policy = collecting
    batches = [together.collect(policy) for _ in range(2)]
    for index in range(2):
        share = override(config_of(), {"collection": {"num_envs": 2, "processes": 1}})
        with private_random_streams(0, Stream.TRAINING, CPU, process=index + 1):
            alone = LocalCollector(share, CPU, process=index + 1)
            alone.begin(make_networks(share.networks, alone.environment).policy)
            for batch in batches:
                expected = alone.collect(policy)
                assert set(expected.keys(True, True)) == set(batch.keys(True, True))
                for key in expected.keys(True, True):
                    assert torch.equal(batch[key][2 * index : 2 * index + 2], expected[key]), key
    first = batches[0][OBSERVATION]
    assert not torch.equal(first[:2], first[2:])


DAMAGES = {
    "no process": lambda structure: structure.pop("processes"),
    "one process": lambda structure: structure["processes"].pop(),
    "half a process": lambda structure: structure["processes"][0].pop("objects"),
    "no random states": lambda structure: structure.pop("others"),
}


def test_state_of_other_collectors_is_refused(collecting):
    collector, _ = collecting
    for name, damage in DAMAGES.items():
        state = collector.capture()
        damage(state.structure)
        with pytest.raises(SimulationStateError):
            collector.restore(state)
            raise AssertionError(name)


def test_training_ends_with_a_message_when_a_process_is_killed(collecting):
    collector, policy = collecting
    os.kill(pids_of(collector)[1], signal.SIGKILL)
    with pytest.raises(
        ProcessDied, match=r"process 2 of collection.processes ended with exit code -9 \(-9: killed, often"
    ):
        collector.collect(policy)


def test_resumed_training_in_two_processes_equals_uninterrupted_training(tmp_path):
    """Resume a copy of the run that was made before its end: a kill leaves the same files."""
    config = config_of(total_frames=4 * 40)

    def copy(report):
        if report.progress.iteration == 3:
            partial = shutil.ignore_patterns("*.partial-*")
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=partial)

    whole = train_here(config, tmp_path / "whole", copy)
    assert last(tmp_path / "stopped").iteration < 4
    assert_same_training(train_here(config, tmp_path / "stopped"), whole)


def test_processes_end_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.training.test_collectors import *\n"
        "if __name__ == '__main__':\n"
        "    with running(config_of()) as (collector, _):\n"
        "        print(*pids_of(collector), flush=True)\n"
        "        input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the processes are still running"
        time.sleep(0.05)


def test_error_in_a_process_is_raised_by_the_collector():
    config = override(
        config_of(rollout_frames=20),
        {"environment": {"scenario": "tests.support.scenarios:NanObservation", "max_episode_frames": 100}},
    )
    with (
        running(config) as (collector, policy),
        pytest.raises(NonFiniteObservation, match="feature 0 of the observation of agent 0 is nan"),
    ):
        collector.collect(policy)


def test_environments_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(ConfigError, match=r"collection.processes = 3: collection.num_envs = 4 cannot be shared"):
        config_of(processes=3)
