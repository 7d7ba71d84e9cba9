"""The memory of the networks: gated recurrent units that carry what matters from frame to frame of an episode.

Collection runs the networks frame by frame and records the memory before each frame. So values and
log-probabilities of a batch need one pass over its frames, in any order. The loss unrolls the networks over chunks
of frames, from the recorded memory before each chunk, so that gradients reach back to the start of the chunk.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from mappo.environment.frames import nested
from mappo.environment.keys import CRITIC_MEMORY, MEMORY, OBSERVATION, STEP_COUNT, Key, next_key

UNROLLED_INPUTS: tuple[Key, ...] = (STEP_COUNT, MEMORY, CRITIC_MEMORY)  # what the unrolled networks read besides


class RecurrentNetwork(nn.Module):
    """A gated recurrent unit (GRU) and a network that reads the features and the memory after them.

    The memory is between -1 and 1. What does not depend on it is computed for all frames at once. Sources: Cho et
    al., Learning Phrase Representations using RNN Encoder-Decoder (2014), in the form of `torch.nn.GRU`; features
    that also pass by the unit: Ni et al., Recurrent Model-Free RL Can Be a Strong Baseline for Many POMDPs (2022).
    """

    def __init__(self, cell: nn.GRUCell, network: nn.Module):
        super().__init__()
        self.cell = cell
        self.network = network

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs [..., outputs] and the next memory for features [..., features], memory [..., units]."""
        memory = self.remember(features, memory)
        return self._outputs(features, memory), memory

    def remember(self, features: Tensor, memory: Tensor) -> Tensor:
        """Return the next memory [..., units] for features [..., features] and memory [..., units]."""
        return self._advance(*self._project(features), memory)

    def unroll(self, features: Tensor, is_first: Tensor, memory: Tensor) -> Tensor:
        """Return the outputs [chunks, time, rows, outputs] of frames that follow each other.

        features: [chunks, time, rows, features]. is_first [chunks, time, 1, 1]: the first frames of episodes,
        before which the memory is 0. memory [chunks, rows, units]: the memory before each chunk.
        """
        memories, frames = [], (*self._project(features), is_first)
        for gates, candidate, is_reset in zip(*(values.unbind(1) for values in frames), strict=True):
            memory = self._advance(gates, candidate, memory.masked_fill(is_reset, 0))
            memories.append(memory)
        return self._outputs(features, torch.stack(memories, 1))

    def _project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the features contribute to the gates [..., 2 units] and to the candidate [..., units]."""
        return self._parts(nn.functional.linear(features, self.cell.weight_ih, self.cell.bias_ih))

    def _advance(self, gates: Tensor, candidate: Tensor, memory: Tensor) -> Tensor:
        """Return the next memory [..., units]."""
        projected = nn.functional.linear(memory, self.cell.weight_hh, self.cell.bias_hh)
        gates_of_memory, candidate_of_memory = self._parts(projected)
        reset, update = (gates + gates_of_memory).sigmoid().chunk(2, -1)
        candidate = torch.addcmul(candidate, reset, candidate_of_memory).tanh()
        return torch.lerp(candidate, memory, update)

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        size = self.cell.hidden_size
        gates, candidate = torch.split(projected, [2 * size, size], -1)
        return gates, candidate

    def _outputs(self, features: Tensor, memory: Tensor) -> Tensor:
        outputs: Tensor = self.network(torch.cat([features, memory], -1))
        return outputs


class RecurrentOnePerAgent(nn.Module):
    """The recurrent networks of agents that share no weights; each agent has its own network and memory."""

    def __init__(self, networks: list[RecurrentNetwork]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and the next memory, as `RecurrentNetwork`; rows are agents."""
        rows = zip(self.networks, torch.split(features, 1, -2), torch.split(memory, 1, -2), strict=True)
        outputs, memories = zip(*(network(*row) for network, *row in rows), strict=True)
        return torch.cat(outputs, -2), torch.cat(memories, -2)

    def remember(self, features: Tensor, memory: Tensor) -> Tensor:
        """Return the next memory, as `RecurrentNetwork`; rows are agents."""
        rows = zip(self.networks, torch.split(features, 1, -2), torch.split(memory, 1, -2), strict=True)
        return torch.cat([network.remember(*row) for network, *row in rows], -2)  # type: ignore[operator]

    def unroll(self, features: Tensor, is_first: Tensor, memory: Tensor) -> Tensor:
        """Return the outputs of frames that follow each other, as `RecurrentNetwork`; rows are agents."""
        rows = zip(self.networks, torch.split(features, 1, -2), torch.split(memory, 1, -2), strict=True)
        outputs = [network.unroll(inputs, is_first, remembered) for network, inputs, remembered in rows]  # type: ignore[operator]
        return torch.cat(outputs, -2)


class RecurrentActor(nn.Module):
    """The policy's network, with a memory for each agent. memory_shape: [agents, units]."""

    def __init__(
        self,
        observation_normaliser: nn.Module,
        network: RecurrentNetwork | RecurrentOnePerAgent,
        extractor: nn.Module,
        memory_shape: tuple[int, int],
    ):
        super().__init__()
        self.observation_normaliser = observation_normaliser
        self.network = network
        self.extractor = extractor
        self.memory_shape = memory_shape

    def forward(self, observation: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """Return the distributions' parameters and the next memory.

        Observations are [..., agents, features], the memory is [..., agents, units].
        """
        outputs, memory = self.network(self.observation_normaliser(observation), memory)
        return *self._distribution(outputs), memory

    def unroll(self, observation: Tensor, step_count: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """Return the distributions' parameters for the frames of chunks.

        Observations are [chunks, time, agents, features], step counts [chunks, time, 1], the memory before each
        chunk is [chunks, agents, units].
        """
        features = self.observation_normaliser(observation)
        return self._distribution(self.network.unroll(features, _is_first(step_count), memory))

    def _distribution(self, outputs: Tensor) -> tuple[Tensor, ...]:
        parameters = self.extractor(outputs)
        return parameters if isinstance(parameters, tuple) else (parameters,)


class ValueMoments(Protocol):
    """The moments of the value targets, by which a critic converts predictions into values."""

    def restore(self, values: Tensor) -> Tensor:
        """Return values in units of the reward for standardised ones."""


class RecurrentCritic(nn.Module):
    """The critic with a memory; otherwise as `Critic`.

    A central critic has one memory, of all observations; an own critic has one for each agent. memory_shape:
    [rows, units], with one row for a central critic, else one for each agent.
    """

    def __init__(
        self,
        observation_normaliser: nn.Module,
        network: RecurrentNetwork | RecurrentOnePerAgent,
        moments: ValueMoments | None,
        is_central: bool,
        memory_shape: tuple[int, int],
    ):
        super().__init__()
        self.observation_normaliser = observation_normaliser
        self.network = network
        self.moments = moments
        self.is_central = is_central
        self.memory_shape = memory_shape

    def forward(self, observation: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return values [..., agents, 1] in units of the reward, and the next memory.

        Observations are [..., agents, features], the memory is [..., rows, units].
        """
        outputs, memory = self.network(self._features(observation), memory)
        prediction = self._by_agent(outputs)
        return self.moments.restore(prediction) if self.moments else prediction, memory

    def remember(self, observation: Tensor, memory: Tensor) -> Tensor:
        """Return the next memory, as `forward` does."""
        return self.network.remember(self._features(observation), memory)

    def unroll(self, observation: Tensor, step_count: Tensor, memory: Tensor) -> Tensor:
        """Return predictions [chunks, time, agents, 1], standardised if the critic has moments.

        Observations are [chunks, time, agents, features], step counts [chunks, time, 1], the memory before each
        chunk is [chunks, rows, units].
        """
        return self._by_agent(self.network.unroll(self._features(observation), _is_first(step_count), memory))

    def _features(self, observation: Tensor) -> Tensor:
        features: Tensor = self.observation_normaliser(observation)
        return features.flatten(-2).unsqueeze(-2) if self.is_central else features

    def _by_agent(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(-2, -1) if self.is_central else outputs


class CriticMemory(nn.Module):
    """The part of a critic that acts during collection: it carries the critic's memory."""

    def __init__(self, critic: RecurrentCritic):
        super().__init__()
        self.critic = critic

    def forward(self, observation: Tensor, memory: Tensor) -> Tensor:
        """Return the next memory [..., rows, units] for observations [..., agents, features] and the memory."""
        return self.critic.remember(observation, memory)


def _is_first(step_count: Tensor) -> Tensor:
    """Return flags [chunks, time, 1, 1] of the first frames of episodes for step counts [chunks, time, 1]."""
    return (step_count == 0).unsqueeze(-1)


def has_memory(networks: nn.Module) -> bool:
    """Return whether a policy or a critic has a memory."""
    return any(isinstance(module, RecurrentActor | RecurrentCritic) for module in networks.modules())


def first_memory(networks: nn.Module, num_envs: int) -> dict[Key, Tensor]:
    """Return the memory of these networks at the start of episodes, zeros, by key; empty without a memory."""
    keys: dict[type[nn.Module], Key] = {RecurrentActor: MEMORY, RecurrentCritic: CRITIC_MEMORY}
    return {
        keys[type(module)]: next(module.parameters()).new_zeros(num_envs, *module.memory_shape)
        for module in networks.modules()
        if isinstance(module, RecurrentActor | RecurrentCritic)
    }


def remembering(policy: TensorDictModuleBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Return a function that acts by the policy, frame by frame, from the start of episodes.

    The function carries the memory of a policy that has one. The episodes of all environments start together.
    """
    if not has_memory(policy):
        return policy  # type: ignore[no-any-return]
    memory: Tensor | None = None

    def act(state: TensorDictBase) -> TensorDictBase:
        nonlocal memory
        state[MEMORY] = first_memory(policy, len(state))[MEMORY] if memory is None else memory
        acted: TensorDictBase = policy(state)
        memory = acted[next_key(MEMORY)]
        return acted

    return act


def player_of(policy: ProbabilisticActor, critic: TensorDictModule) -> TensorDictModuleBase:
    """Return what acts during collection: the policy, and what carries the memory of a critic that has one."""
    if not has_memory(critic):
        return policy
    remember = TensorDictModule(
        CriticMemory(critic.module), in_keys=[OBSERVATION, CRITIC_MEMORY], out_keys=[next_key(CRITIC_MEMORY)]
    )
    return TensorDictSequential(policy, remember)


def unrolled(
    policy: ProbabilisticActor, critic: TensorDictModule, value: Key
) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    """Return the policy and the critic as the loss calls them on chunks; both have the same parameters as before.

    value: the key of the critic's predictions.
    """
    parameters, sampler = policy[0], policy[-1]
    actor = TensorDictModule(
        parameters.module.unroll,
        in_keys=[OBSERVATION, STEP_COUNT, MEMORY],
        out_keys=[key for key in parameters.out_keys if key != next_key(MEMORY)],
    )
    predictor = TensorDictModule(
        critic.module.unroll, in_keys=[OBSERVATION, STEP_COUNT, CRITIC_MEMORY], out_keys=[value]
    )
    return ProbabilisticTensorDictSequential(actor, sampler), predictor


def estimates(
    policy: ProbabilisticActor,
    critic: TensorDictModule,
    observation: Tensor,
    next_observation: Tensor,
    action: Tensor,
    memory: Tensor,
    critic_memory: Tensor,
) -> list[Tensor]:
    """Return the values [frames, agents, 1] of both observations and log pi(a|o, memory) [frames, agents].

    The memories are those before the frame. The critic reaches the next observation with the memory after it.
    """
    frames = TensorDict({}, batch_size=[len(observation)])
    frames[OBSERVATION], frames[MEMORY] = observation, memory
    value, following = critic.module(observation, critic_memory)
    next_value, _ = critic.module(next_observation, following)
    return [value, next_value, policy.get_dist(frames).log_prob(action)]


def in_chunks(batch: TensorDictBase, chunk_frames: int) -> TensorDictBase:
    """Return a batch [envs, time] as chunks of frames, [chunks], for the unrolled networks.

    Tensors become [chunks, chunk_frames, ...]. Of memories, only those before each chunk remain, which are
    [chunks, rows, units].
    """
    num_chunks = batch.numel() // chunk_frames
    tensors: dict[Key, Tensor] = {
        key: value.reshape(num_chunks, chunk_frames, *value.shape[2:]) for key, value in batch.items(True, True)
    }
    starts: dict[Key, Tensor] = {key: tensors[key][:, 0] for key in (MEMORY, CRITIC_MEMORY)}
    return nested({**tensors, **starts}, [num_chunks])
