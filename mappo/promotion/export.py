"""The export of a trained policy to a file that needs only PyTorch and maps observations to actions."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from mappo.environment.environment import groups_of, make_environment
from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.groups import Group, described
from mappo.environment.keys import ACTION, DONE, FRAME, MEMORY, OBSERVATION, next_key
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotExportable
from mappo.learning.memory import first_memory
from mappo.learning.networks import GroupNetworks, Networks, make_networks
from mappo.runs.checkpoint import Checkpoint, restore_networks

_NUM_ENVS, _FRAMES_OF_EACH = 20, 50  # 1,000 frames, in which an exported policy must act as the trained one does


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


@dataclass(frozen=True)
class TracedPolicy:
    """A trained policy as a graph on the CPU, and recorded frames with its most likely actions.

    program: maps `inputs` of a frame to actions [envs, agents, ...]; if there are several groups, both are
    dictionaries by the group's name. A policy with a memory also returns the memory after the frame.
    observations and actions: those of all agents, [frames, envs, agents, ...], in the order of time.
    memories: those before and after the frames, [frames, envs, agents, units]; None without a memory.
    """

    checkpoint: Checkpoint
    environment: EnvBase
    networks: Networks
    program: ExportedProgram
    observations: Tensor
    actions: Tensor
    memories: tuple[Tensor, Tensor] | None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of agents."""
        return self.networks.groups

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Return what the graph takes in a recorded frame."""
        memories = self.memories[:1] if self.memories else ()
        return _of_groups(self.groups, self.observations[index]), *(memory[index] for memory in memories)


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
        frames = _play(environment, networks.policy)
        observations, actions = frames[OBSERVATION].contiguous(), frames[ACTION].contiguous()
        memories = None
        if networks.has_memory:
            memories = frames[MEMORY].contiguous(), frames[next_key(MEMORY)].contiguous()
        program = _trace(networks, observations[0], *(memory[0] for memory in (memories or ())[:1]))
    return TracedPolicy(checkpoint, environment, networks, program, observations, actions, memories)


def _trace(networks: Networks, observation: Tensor, *memory: Tensor) -> ExportedProgram:
    parts, envs = networks.parts, {0: torch.export.Dim("envs", min=1)}
    module: nn.Module = _ActionsByGroup(parts)
    if len(parts) == 1:
        module = (_RecurrentActions if memory else _Actions)(parts[0].policy)
    inputs = _of_groups(networks.groups, observation)
    of_inputs: Any = dict.fromkeys(inputs, envs) if isinstance(inputs, dict) else envs
    dynamic_shapes = of_inputs, *(envs for _ in memory)
    return torch.export.export(module, (inputs, *memory), dynamic_shapes=dynamic_shapes, strict=False)


def by_group(groups: Sequence[Group], tensors: Any) -> dict[str, Tensor]:
    """Return the observations or actions of a frame by the group's name; the graph of one group has one tensor."""
    named: dict[str, Tensor] = {groups[0].name: tensors} if len(groups) == 1 else tensors
    return named


def _of_groups(groups: Sequence[Group], observation: Tensor) -> Tensor | dict[str, Tensor]:
    """Return observations [envs, agents, features] as the graph takes them."""
    if len(groups) == 1:
        return observation
    return {group.name: group.observations(observation) for group in groups}


def _play(environment: EnvBase, policy: TensorDictModuleBase) -> TensorDictBase:
    """Return frames [frames, envs] of new episodes, with the most likely actions and the policy's memory."""
    memory, state = first_memory(policy, _NUM_ENVS), environment.reset()
    frames = Frames(_FRAMES_OF_EACH, (*FRAME, *memory, *map(next_key, memory)))
    for key, zeros in memory.items():
        state[key] = zeros
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(_FRAMES_OF_EACH):
            require_finite_observations(state[OBSERVATION])
            frame, state = environment.step_and_maybe_reset(policy(state))
            frames.append(frame)
            for key in memory:
                state[key] = frame[next_key(key)].masked_fill(frame[next_key(DONE)].unsqueeze(-1), 0)
    return frames.batch().transpose(0, 1)


def export_policy(traced: TracedPolicy) -> bytes:
    """Export a policy; return a file for `torch.export.load`.

    The exported policy takes observations [envs, agents, features] in float32 and in the scenario's own units,
    for any number of environments. It returns the most likely actions. If there are several groups of agents, it
    takes and returns dictionaries, with a tensor for each group's name. A policy with a memory also takes the
    memory before the frame, [envs, agents, units], and returns the memory after it. To verify the exported policy,
    load it again and compare its results with those of the trained policy.

    Raises:
        NotExportable: the exported policy returns other actions, or another memory, than the trained policy.
    """
    file = io.BytesIO()
    torch.export.save(traced.program, file)
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()
    for index, trained in enumerate(traced.actions):
        returned = exported(*traced.inputs(index))
        if traced.memories:
            returned, memory = returned
            if not torch.equal(memory, traced.memories[1][index]):
                raise NotExportable("the memory of the exported policy differs from that of the trained policy")
        for group in traced.groups:
            actions, expected = by_group(traced.groups, returned)[group.name], group.actions(trained)
            if actions.shape != expected.shape or not torch.equal(actions, expected):
                raise NotExportable(
                    f"the exported policy's actions of {group.name} {list(actions.shape)} differ from the "
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
