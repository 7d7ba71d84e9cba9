import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import override
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, MEMORY, OBSERVATION, next_key
from mappo.environment.random_streams import Stream
from mappo.errors import CheckpointError
from mappo.learning.memory import remembering
from mappo.learning.networks import make_networks
from mappo.promotion.export import export_policy, model_card
from mappo.runs.checkpoint import restore_networks
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


@pytest.fixture(scope="module")
def pytorch():
    """Start a process with PyTorch alone; it runs the policy in each directory that it reads."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-I", "-c", BARE], text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"environment": {"actions": "discrete"}},
        {"environment": {"actions": "multi-discrete"}},
        {"networks": {"share_policy": False, "normalise_observations": True}},
        {"networks": {"critic": "own"}},
        {"networks": {"memory": "gru", "memory_size": 5}},
        {"networks": {"memory": "gru", "share_policy": False}, "environment": {"actions": "discrete"}},
        {"environment": {"scenario": "tests.support.scenarios:MoveAndSpeak", "scenario_kwargs": {}}},
        {"environment": {"scenario_kwargs": {"n_agents": 1}}},
    ],
    ids=[
        "continuous",
        "discrete",
        "multi-discrete",
        "own-networks",
        "own-critic",
        "memory",
        "own-memories",
        "speech",
        "one-agent",
    ],
)
def test_exported_policy_gives_the_same_actions_with_only_pytorch_installed(tiny, tmp_path, pytorch, change):
    """Use another number of environments than in the export, and the frames of a whole episode."""
    config = override(tiny, {**change, "collection": {"total_frames": 120}})
    checkpoint = train_here(config, tmp_path / "run")
    environment = make_environment(config.environment, 5, 3, Stream.EVALUATION, torch.device("cpu"))
    networks = make_networks(config.networks, environment)
    restore_networks(checkpoint, networks)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        episode = environment.rollout(8, remembering(networks.policy), break_when_any_done=False)
    inputs, outputs = [OBSERVATION], [ACTION]
    if networks.has_memory:
        inputs, outputs = [OBSERVATION, MEMORY], [ACTION, next_key(MEMORY)]
    torch.save([episode[key].flatten(0, 1) for key in inputs], tmp_path / "inputs.pt")
    (tmp_path / "policy.pt2").write_bytes(export_policy(checkpoint))
    print(tmp_path, file=pytorch.stdin, flush=True)
    assert pytorch.stdout.readline() == "done\n"
    results = torch.load(tmp_path / "outputs.pt")
    for key, result in zip(outputs, results if networks.has_memory else [results], strict=True):
        torch.testing.assert_close(result, episode[key].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_networks_that_do_not_fit_their_task_are_refused(checkpoint):
    tensors = dict(list(checkpoint.tensors.items())[1:])
    with pytest.raises(CheckpointError, match="is missing"):
        export_policy(replace(checkpoint, tensors=tensors))


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
