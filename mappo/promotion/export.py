"""The export of a trained policy to a file that needs only PyTorch and maps observations to actions."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from mappo.environment.environment import make_environment
from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotExportable
from mappo.learning.networks import make_networks
from mappo.runs.checkpoint import Checkpoint, restore_networks

_NUM_ENVS, _FRAMES_OF_EACH = 20, 50  # 1,000 frames, in which an exported policy must act as the trained one does


class _Actions(nn.Module):
    """The policy's deterministic actions, without tensordicts."""

    def __init__(self, policy: ProbabilisticActor):
        super().__init__()
        parameters, sampler = policy[0], policy[-1]
        self.network = parameters.module
        self._names = [key[-1] for key in parameters.out_keys]
        self._distribution, self._bounds = sampler.distribution_class, sampler.distribution_kwargs

    def forward(self, observation: Tensor) -> Tensor:
        """Return the task's actions [envs, agents, ...] for observations [envs, agents, features]."""
        outputs = self.network(observation)
        values = dict(zip(self._names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
        distribution = self._distribution(**values, **self._bounds)
        has_sample = hasattr(distribution, "deterministic_sample")  # a plain Categorical has only `mode`
        actions: Tensor = distribution.deterministic_sample if has_sample else distribution.mode
        return actions


@dataclass(frozen=True)
class TracedPolicy:
    """A trained policy as a graph on the CPU, and recorded frames with its most likely actions.

    program: maps observations [envs, agents, features] to actions [envs, agents, ...]. observations and actions:
    [frames, envs, agents, ...], in the order of time. policy: the trained policy.
    """

    checkpoint: Checkpoint
    environment: EnvBase
    policy: ProbabilisticActor
    program: ExportedProgram
    observations: Tensor
    actions: Tensor


def trace_policy(checkpoint: Checkpoint) -> TracedPolicy:
    """Trace the policy of a checkpoint, and play 1,000 frames of its task.

    Raises:
        CheckpointError: the checkpoint's networks do not fit its task.
        ConfigError: the task does not exist here.
        NonFiniteObservation: an observation is NaN or infinite; the message names environment and agent.
    """
    cpu = torch.device("cpu")
    config = checkpoint.config
    with private_random_streams(0, Stream.GATE, cpu), torch.no_grad():
        environment = make_environment(config.environment, _NUM_ENVS, 0, Stream.GATE, cpu)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
        observations, actions = _play(environment, networks.policy)
        program = torch.export.export(
            _Actions(networks.policy),
            (observations[0],),
            dynamic_shapes=({0: torch.export.Dim("envs", min=1)},),
            strict=False,
        )
    return TracedPolicy(checkpoint, environment, networks.policy, program, observations, actions)


def _play(environment: EnvBase, policy: ProbabilisticActor) -> tuple[Tensor, Tensor]:
    """Return the observations and the most likely actions of new episodes, both [frames, envs, agents, ...]."""
    frames, state = Frames(_FRAMES_OF_EACH), environment.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(_FRAMES_OF_EACH):
            require_finite_observations(state[OBSERVATION])
            frame, state = environment.step_and_maybe_reset(policy(state))
            frames.append(frame)
    batch = frames.batch()
    return batch[OBSERVATION].transpose(0, 1), batch[ACTION].transpose(0, 1)


def export_policy(traced: TracedPolicy) -> bytes:
    """Export a policy; return a file for `torch.export.load`.

    The exported policy takes observations [envs, agents, features] in float32 and in the scenario's own units,
    for any number of environments. It returns the most likely actions. To verify it, load it again and compare
    its actions with those of the trained policy.

    Raises:
        NotExportable: the exported policy returns other actions than the trained policy.
    """
    file = io.BytesIO()
    torch.export.save(traced.program, file)
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()
    for observation, trained in zip(traced.observations, traced.actions, strict=True):
        actions = exported(observation)
        if actions.shape != trained.shape or not torch.equal(actions, trained):
            raise NotExportable(
                f"the exported policy's actions {list(actions.shape)} differ from the trained policy's "
                f"{list(trained.shape)}"
            )
    return file.getvalue()


def model_card(checkpoint: Checkpoint, task: str, gate: Mapping[str, Any]) -> str:
    """Return the model card of an exported policy, in Markdown. `gate`: the results of the gate, by name."""
    config = checkpoint.config
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.platform.versions.items())
    gate_rows = "\n".join(f"| {name} | {value} |" for name, value in gate.items())
    kwargs = config.environment.scenario_kwargs or "none"
    return f"""# A policy for {task}

Each agent acts on its own observations alone. Training: {config.networks.algorithm}.

| | |
|---|---|
| scenario | {config.environment.scenario}, keyword arguments {kwargs} |
| time limit | {config.environment.max_episode_frames} frames |
| actions | {config.environment.actions}, the most likely ones |
| trained on | {checkpoint.frames:,} frames, seed {config.seed} |
| versions | {versions} |
{gate_rows}

`policy.pt2` needs only PyTorch. Observations are [envs, agents, features], float32, as the scenario returns them:

    import torch
    policy = torch.export.load("policy.pt2").module()
    actions = policy(observations)

`mappo champion export --format onnx` gives the policy as ONNX, with a contract that says what its inputs and
outputs mean.

The policy is meant for this task. It was not tested in other tasks, with another number of agents, or on
observations outside the range of training. A return is the undiscounted sum of rewards over an episode, averaged
over agents.
"""
