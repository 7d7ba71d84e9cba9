"""The export of a trained policy to a file that needs only PyTorch and maps observations to actions."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from mappo.environment.environment import groups_of, make_environment
from mappo.environment.groups import described
from mappo.environment.keys import ACTION, MEMORY, OBSERVATION, next_key
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotExportable
from mappo.learning.memory import first_memory
from mappo.learning.networks import GroupNetworks, make_networks
from mappo.runs.checkpoint import Checkpoint, restore_networks

_NUM_EXAMPLES = 7  # the number of environments whose observations test the exported policy


class _Actions(nn.Module):
    """The policy's deterministic actions, without tensordicts."""

    def __init__(self, policy: ProbabilisticActor):
        super().__init__()
        parameters, sampler = policy[0], policy[-1]
        self.network = parameters.module
        self._names = [key[-1] for key in parameters.out_keys if key != next_key(MEMORY)]
        self._distribution, self._bounds = sampler.distribution_class, sampler.distribution_kwargs

    def forward(self, observation: Tensor) -> Tensor:
        """Return the task's actions [envs, agents, ...] for observations [envs, agents, features]."""
        outputs = self.network(observation)
        return self._most_likely(outputs if isinstance(outputs, tuple) else (outputs,))

    def _most_likely(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Return the most likely actions of the distributions with these parameters."""
        distribution = self._distribution(**dict(zip(self._names, outputs, strict=True)), **self._bounds)
        has_sample = hasattr(distribution, "deterministic_sample")  # a plain Categorical has only `mode`
        actions: Tensor = distribution.deterministic_sample if has_sample else distribution.mode
        return actions


class _RecurrentActions(_Actions):
    """The deterministic actions of a policy with a memory, which comes in and goes out."""

    def forward(self, observation: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the task's actions and the memory after the frame, [envs, agents, units] as the one before it."""
        *outputs, following = self.network(observation, memory)
        return self._most_likely(tuple(outputs)), following


class _ActionsByGroup(nn.Module):
    """The deterministic actions of several groups, by the group's name."""

    def __init__(self, parts: Sequence[GroupNetworks]):
        super().__init__()
        self._names = [part.group.name for part in parts]
        self.groups = nn.ModuleList(_Actions(part.policy) for part in parts)

    def forward(self, observations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the groups' actions [envs, agents, ...] for their observations [envs, agents, features]."""
        return {name: actions(observations[name]) for name, actions in zip(self._names, self.groups, strict=True)}


def export_policy(checkpoint: Checkpoint) -> bytes:
    """Export the policy of a checkpoint; return a file for `torch.export.load`.

    The exported policy takes observations [envs, agents, features] in float32 and in the scenario's own units,
    for any number of environments. It returns the most likely actions. If there are several groups of agents, it
    takes and returns dictionaries, with a tensor for each group's name. A policy with a memory also takes the
    memory before the frame, [envs, agents, units], and returns the memory after it. To verify the exported policy,
    load it again and compare its results with those of the trained policy.

    Raises:
        CheckpointError: the checkpoint's networks do not fit its task.
        NotExportable: the exported policy returns other actions, or another memory, than the trained policy.
    """
    cpu = torch.device("cpu")
    config = replace(checkpoint.config, device="cpu")
    with private_random_streams(0, Stream.GATE, cpu), torch.no_grad():
        environment = make_environment(config.environment, _NUM_EXAMPLES, 0, Stream.GATE, cpu)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
        state, groups = environment.reset(), networks.groups
        observations = {group.name: group.observations(state[OBSERVATION]) for group in groups}
        envs = {0: torch.export.Dim("envs", min=1)}
        module: nn.Module = _ActionsByGroup(networks.parts)
        inputs: tuple[Any, ...] = (observations,)
        dynamic_shapes: tuple[Any, ...] = (dict.fromkeys(observations, envs),)
        if networks.has_memory:
            state[MEMORY] = first_memory(networks.policy, _NUM_EXAMPLES)[MEMORY].uniform_(-1, 1)
            module = _RecurrentActions(networks.parts[0].policy)
            inputs, dynamic_shapes = (state[OBSERVATION], state[MEMORY].clone()), (envs, envs)
        elif len(groups) == 1:
            module, inputs, dynamic_shapes = _Actions(networks.parts[0].policy), (state[OBSERVATION],), (envs,)
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            acted = networks.policy(state)
            trained = acted[ACTION]
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()(*inputs)
    if networks.has_memory:
        exported, memory = exported
        if not torch.equal(memory, acted[next_key(MEMORY)]):
            raise NotExportable("the memory of the exported policy differs from that of the trained policy")
    for group in groups:
        expected, actions = group.actions(trained), exported if len(groups) == 1 else exported[group.name]
        if actions.shape != expected.shape or not torch.equal(actions, expected):
            raise NotExportable(
                f"the exported policy's actions of {group.name} {list(actions.shape)} differ from the trained "
                f"policy's {list(expected.shape)}"
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
    if checkpoint.config.networks.has_memory:
        return "", _USAGE_WITH_MEMORY.format(units=checkpoint.config.networks.memory_size)
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
_USAGE_WITH_MEMORY = """\
`policy.pt2` needs only PyTorch. Observations are [envs, agents, features], float32, as the scenario returns them:

    import torch
    policy = torch.export.load("policy.pt2").module()
    memory = torch.zeros(observations.shape[0], observations.shape[1], {units})
    actions, memory = policy(observations, memory)

The policy remembers earlier frames: give the memory of one call to the next, and zeros in the first frame of an
episode."""
_USAGE_BY_GROUP = """\
`policy.pt2` needs only PyTorch. Observations of a group are [envs, agents, features], float32, as the scenario
returns them; actions have the same names:

    import torch
    policy = torch.export.load("policy.pt2").module()
    actions = policy({example})"""
