"""A trained policy as a file that needs PyTorch alone: observations of all agents in, actions out."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotExportable
from mappo.learning.networks import make_networks
from mappo.runs.checkpoint import Checkpoint, restore_networks

_EXAMPLES = 7  # observations with which the exported policy is tried


class _Actions(nn.Module):
    """The policy's deterministic actions, without tensordicts."""

    def __init__(self, policy: ProbabilisticActor):
        super().__init__()
        parameters, sampler = policy[0], policy[-1]
        self.network = parameters.module
        self._names = [key[-1] for key in parameters.out_keys]
        self._distribution, self._bounds = sampler.distribution_class, sampler.distribution_kwargs

    def forward(self, observation: Tensor) -> Tensor:
        """[envs, agents, features] -> [envs, agents, ...], as the task takes them."""
        found = self.network(observation)
        values = dict(zip(self._names, found if isinstance(found, tuple) else (found,), strict=True))
        chosen = self._distribution(**values, **self._bounds)
        best: Tensor = chosen.deterministic_sample if hasattr(chosen, "deterministic_sample") else chosen.mode
        return best


def export_policy(checkpoint: Checkpoint) -> bytes:
    """The policy of a checkpoint, as `torch.export.load` reads it, for any number of environments.

    It takes observations [envs, agents, features] float32, in the scenario's own units, and gives the most likely
    actions. What is written is loaded again, and must give the same actions.

    Raises:
        CheckpointError: the checkpoint's networks do not fit its task.
        NotExportable: it gives others.
    """
    cpu = torch.device("cpu")
    config = replace(checkpoint.config, device="cpu")
    with private_random_streams(0, Stream.GATE, cpu), torch.no_grad():
        environment = make_environment(config.environment, _EXAMPLES, 0, Stream.GATE, cpu)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
        state = environment.reset()
        observation = state[OBSERVATION]
        program = torch.export.export(
            _Actions(networks.policy),
            (observation,),
            dynamic_shapes=({0: torch.export.Dim("envs", min=1)},),
            strict=False,
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            trained = networks.policy(state)[ACTION]
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()(observation)
    if exported.shape != trained.shape or not torch.equal(exported, trained):
        raise NotExportable(f"the exported policy's actions {list(exported.shape)} are not the trained policy's")
    return file.getvalue()


def model_card(checkpoint: Checkpoint, task: str, gate: Mapping[str, Any]) -> str:
    """What someone must know who is given the exported policy; Markdown. `gate`: how it was judged, by name."""
    config = checkpoint.config
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.platform.versions.items())
    judged = "\n".join(f"| {name} | {value} |" for name, value in gate.items())
    kwargs = config.environment.scenario_kwargs or "none"
    return f"""# A policy for {task}

Agents that act by their own observations alone, trained by multi-agent proximal policy optimisation (MAPPO).

| | |
|---|---|
| scenario | {config.environment.scenario}, keyword arguments {kwargs} |
| time limit | {config.environment.max_episode_frames} frames |
| actions | {config.environment.actions}, the most likely ones |
| trained on | {checkpoint.frames:,} frames, seed {config.seed} |
| versions | {versions} |
{judged}

`policy.pt2` needs PyTorch alone. Observations are [envs, agents, features], float32, as the scenario gives them:

    import torch
    policy = torch.export.load("policy.pt2").module()
    actions = policy(observations)

It is meant for this task. Nothing is known of how it acts in another, with another number of agents, or where
observations are out of the range that it met in training. Returns are undiscounted sums over an episode, mean over
agents.
"""
