"""The export of a trained policy to a file that needs only PyTorch and maps observations to actions."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from mappo.environment.environment import groups_of, make_environment
from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.groups import Group, described
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotExportable
from mappo.learning.networks import GroupNetworks, Networks, make_networks
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


class _ActionsByGroup(nn.Module):
    """The deterministic actions of several groups, by the group's name."""

    def __init__(self, parts: Sequence[GroupNetworks]):
        super().__init__()
        self._names = [part.group.name for part in parts]
        self.groups = nn.ModuleList(_Actions(part.policy) for part in parts)

    def forward(self, observations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the groups' actions [envs, agents, ...] for their observations [envs, agents, features]."""
        return {name: actions(observations[name]) for name, actions in zip(self._names, self.groups, strict=True)}


@dataclass(frozen=True)
class TracedPolicy:
    """A trained policy as a graph on the CPU, and recorded frames with its most likely actions.

    program: maps `inputs` of a frame to actions [envs, agents, ...]; if there are several groups, both are
    dictionaries by the group's name. observations and actions: those of all agents, [frames, envs, agents, ...],
    in the order of time.
    """

    checkpoint: Checkpoint
    environment: EnvBase
    networks: Networks
    program: ExportedProgram
    observations: Tensor
    actions: Tensor

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of agents."""
        return self.networks.groups

    def inputs(self, observation: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what the graph takes for the observations of a frame [envs, agents, features]."""
        return _inputs(self.groups, observation)


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
        parts = networks.parts
        module: nn.Module = _Actions(parts[0].policy) if len(parts) == 1 else _ActionsByGroup(parts)
        inputs, envs = _inputs(networks.groups, observations[0]), {0: torch.export.Dim("envs", min=1)}
        dynamic_shapes: Any = (dict.fromkeys(inputs, envs) if isinstance(inputs, dict) else envs,)
        program = torch.export.export(module, (inputs,), dynamic_shapes=dynamic_shapes, strict=False)
    return TracedPolicy(checkpoint, environment, networks, program, observations, actions)


def by_group(groups: Sequence[Group], actions: Any) -> dict[str, Tensor]:
    """Return what a graph returned for a frame by the group's name; of one group, it returned one tensor."""
    named: dict[str, Tensor] = {groups[0].name: actions} if len(groups) == 1 else actions
    return named


def _inputs(groups: Sequence[Group], observation: Tensor) -> Tensor | dict[str, Tensor]:
    if len(groups) == 1:
        return observation
    return {group.name: group.observations(observation) for group in groups}


def _play(environment: EnvBase, policy: TensorDictModuleBase) -> tuple[Tensor, Tensor]:
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
    for any number of environments. It returns the most likely actions. If there are several groups of agents, it
    takes and returns dictionaries, with a tensor for each group's name. To verify it, load it again and compare
    its actions with those of the trained policy.

    Raises:
        NotExportable: the exported policy returns other actions than the trained policy.
    """
    file = io.BytesIO()
    torch.export.save(traced.program, file)
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()
    for observation, trained in zip(traced.observations, traced.actions, strict=True):
        actions = by_group(traced.groups, exported(traced.inputs(observation)))
        for group in traced.groups:
            returned, expected = actions[group.name], group.actions(trained)
            if returned.shape != expected.shape or not torch.equal(returned, expected):
                raise NotExportable(
                    f"the exported policy's actions of {group.name} {list(returned.shape)} differ from the "
                    f"trained policy's {list(expected.shape)}"
                )
    return file.getvalue()


def model_card(checkpoint: Checkpoint, task: str, gate: Mapping[str, Any]) -> str:
    """Return the model card of an exported policy, in Markdown. `gate`: the results of the gate, by name."""
    config = checkpoint.config
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.platform.versions.items())
    gate_rows = "\n".join(f"| {name} | {value} |" for name, value in gate.items())
    kwargs = config.environment.scenario_kwargs or "none"
    groups, usage = _groups_and_usage(checkpoint)
    return f"""# A policy for {task}

Each agent acts on its own observations alone. Training: {config.networks.algorithm}.

| | |
|---|---|
| scenario | {config.environment.scenario}, keyword arguments {kwargs} |
| time limit | {config.environment.max_episode_frames} frames |
| actions | {config.environment.actions}, the most likely ones |
| trained on | {checkpoint.frames:,} frames, seed {config.seed} |
| versions | {versions} |
{groups}{gate_rows}

{usage}

`mappo champion export --format onnx` gives the policy as ONNX, with a contract that says what its inputs and
outputs mean.

The policy is meant for this task. It was not tested in other tasks, with another number of agents, or on
observations outside the range of training. A return is the undiscounted sum of rewards over an episode, averaged
over agents.
"""


def _groups_and_usage(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the rows of the groups in a model card, none for a single group, and how the policy is used."""
    cpu = torch.device("cpu")
    with private_random_streams(0, Stream.GATE, cpu):
        environment = make_environment(checkpoint.config.environment, 1, 0, Stream.GATE, cpu)
    groups, names = groups_of(environment), environment.base_env.agent_names
    if len(groups) == 1:
        return "", _USAGE
    rows = [
        f"| group {group.name} | {', '.join(names[agent] for agent in group.agents)}: "
        f"{described(group.shape)} each |\n"
        for group in groups
    ]
    example = ", ".join(f'"{group.name}": ...' for group in groups)
    return "".join(rows), _USAGE_BY_GROUP.format(example=f"{{{example}}}")


_USAGE = """\
`policy.pt2` needs only PyTorch. Observations are [envs, agents, features], float32, as the scenario returns them:

    import torch
    policy = torch.export.load("policy.pt2").module()
    actions = policy(observations)"""
_USAGE_BY_GROUP = """\
`policy.pt2` needs only PyTorch. Observations of a group are [envs, agents, features], float32, as the scenario
returns them; actions have the same names:

    import torch
    policy = torch.export.load("policy.pt2").module()
    actions = policy({example})"""
