import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import from_dict, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, MEMORY, OBSERVATION, next_key
from mappo.environment.random_streams import Stream
from mappo.errors import CheckpointError
from mappo.learning.memory import remembering
from mappo.learning.networks import make_networks
from mappo.promotion.export import TracedPolicy, export_policy, model_card, trace_policy
from mappo.promotion.onnx_export import export_onnx
from mappo.runs.checkpoint import restore_networks
from tests.conftest import TINY
from tests.support import onnx_client
from tests.support.runs import train_here

BARE = textwrap.dedent(
    """
    import sys

    for package in ("mappo", "torchrl", "tensordict", "vmas", "pydantic", "safetensors"):
        sys.modules[package] = None  # makes an import of this package fail
    import torch

    for directory in map(str.strip, sys.stdin):
        policy = torch.export.load(f"{directory}/policy.pt2").module()
        torch.save(policy(*torch.load(f"{directory}/inputs.pt")), f"{directory}/outputs.pt")
        print("done", flush=True)
    """
)
BARE_ONNX = textwrap.dedent(
    f"""
    import runpy
    import sys

    for package in ("mappo", "torch", "torchrl", "tensordict", "vmas", "pydantic", "safetensors", "onnx"):
        sys.modules[package] = None  # makes an import of this package fail
    runpy.run_path({onnx_client.__file__!r}, run_name="__main__")
    """
)
SCENARIOS = "tests.support.scenarios"
CHANGES = {
    "continuous": {},
    "discrete": {"environment": {"actions": "discrete"}},
    "multi-discrete": {"environment": {"actions": "multi-discrete"}},
    "own-networks": {"networks": {"share_policy": False, "normalise_observations": True}},
    "own-critic": {"networks": {"critic": "own"}},
    "memory": {"networks": {"memory": "gru", "memory_size": 5}},
    "own-memories": {"networks": {"memory": "gru", "share_policy": False}, "environment": {"actions": "discrete"}},
    "speech": {"environment": {"scenario": f"{SCENARIOS}:MoveAndSpeak", "scenario_kwargs": {}}},
    "one-agent": {"environment": {"scenario_kwargs": {"n_agents": 1}}},
    "partly-constant": {
        "environment": {"scenario": "tests.support.scenarios:FixedComponent", "scenario_kwargs": {}}
    },
}


@dataclass(frozen=True)
class Trained:
    """A trained policy, and an episode [envs, frames] of its most likely actions in other environments."""

    traced: TracedPolicy
    episode: TensorDictBase


@pytest.fixture(scope="module", params=CHANGES.values(), ids=CHANGES)
def trained(request, tmp_path_factory) -> Trained:
    config = override(from_dict(TINY), {**request.param, "collection": {"total_frames": 120}})
    checkpoint = train_here(config, tmp_path_factory.mktemp("run"))
    environment = make_environment(config.environment, 5, 3, Stream.EVALUATION, torch.device("cpu"))
    networks = make_networks(config.networks, environment)
    restore_networks(checkpoint, networks)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        episode = environment.rollout(8, remembering(networks.policy), break_when_any_done=False)
    return Trained(trace_policy(checkpoint), episode)


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen]:
    """Start a program that handles each directory that it reads."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-I", "-c", text], text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def pytorch():
    with program(BARE) as process:
        yield process


@pytest.fixture(scope="module")
def runtime():
    with program(BARE_ONNX) as process:
        yield process


def handle(process: subprocess.Popen, directory: Path) -> None:
    print(directory, file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


def test_exported_policy_gives_the_same_actions_with_only_pytorch_installed(tmp_path, pytorch, trained):
    """Use another number of environments than in the export, and the frames of a whole episode."""
    inputs, outputs = [OBSERVATION], [ACTION]
    if trained.traced.memories:
        inputs, outputs = [OBSERVATION, MEMORY], [ACTION, next_key(MEMORY)]
    torch.save([trained.episode[key].flatten(0, 1) for key in inputs], tmp_path / "inputs.pt")
    (tmp_path / "policy.pt2").write_bytes(export_policy(trained.traced))
    handle(pytorch, tmp_path)
    results = torch.load(tmp_path / "outputs.pt")
    for key, result in zip(outputs, results if trained.traced.memories else [results], strict=True):
        torch.testing.assert_close(result, trained.episode[key].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_onnx_file_gives_the_same_actions_by_its_contract_with_only_onnxruntime(tmp_path, runtime, trained):
    for name, content in export_onnx(trained.traced).items():
        (tmp_path / name).write_bytes(content)
    frames = trained.episode.transpose(0, 1)
    np.save(tmp_path / "observations.npy", frames[OBSERVATION].numpy())
    handle(runtime, tmp_path)
    actions = torch.from_numpy(np.load(tmp_path / "actions.npy"))
    torch.testing.assert_close(actions, frames[ACTION], rtol=0, atol=1e-6)


def test_networks_that_do_not_fit_their_task_are_refused(checkpoint):
    tensors = dict(list(checkpoint.tensors.items())[1:])
    with pytest.raises(CheckpointError, match="is missing"):
        trace_policy(replace(checkpoint, tensors=tensors))


def test_model_card_describes_the_policy_and_its_results(checkpoint):
    card = model_card(checkpoint, "navigation-12345678", {"mean return": "0.5 [0.4, 0.6]"})
    for text in (
        "navigation",
        '"n_agents"',
        "| mean return | 0.5 [0.4, 0.6] |",
        "torch.export.load",
        "360 frames",
    ):
        assert text.replace('"', "'") in card
    assert "multi-agent proximal policy optimisation (MAPPO)" in card
    assert "actions = policy(observations)" in card
    recurrent = override(checkpoint.config, {"networks": {"memory": "gru", "memory_size": 5}})
    card_with_memory = model_card(replace(checkpoint, config=recurrent), "", {})
    for text in ("(MAPPO) with recurrent networks", "observations.shape[1], 5)", "= policy(observations, memory)"):
        assert text in card_with_memory
    own = override(checkpoint.config, {"networks": {"critic": "own"}})
    assert "independent proximal policy optimisation (IPPO)" in model_card(replace(checkpoint, config=own), "", {})
