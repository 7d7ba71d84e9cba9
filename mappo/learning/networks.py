"""The decentralised actor and the critic, centralised or not, sized from the environment's specs.

This file is long because each group of agents, with a memory or without, is built here from one set of parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from mappo.config import NetworksConfig
from mappo.environment.environment import groups_of
from mappo.environment.groups import Group, merged
from mappo.environment.keys import ACTION, CRITIC_MEMORY, MEMORY, OBSERVATION, next_key
from mappo.errors import ConfigError
from mappo.learning.distributions import MultiCategorical, PartlyConstant
from mappo.learning.memory import (
    RecurrentActor,
    RecurrentCritic,
    RecurrentNetwork,
    RecurrentOnePerAgent,
    has_memory,
    player_of,
)

VALUE = ("agents", "state_value")  # [envs, time, agents, 1]
_LOC, _SCALE, _LOGITS = ("agents", "loc"), ("agents", "scale"), ("agents", "logits")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_DECAY = 0.99999  # decay of running moments per update, as in the MAPPO paper's code
_MIN_VARIANCE = 1e-2  # lower bound of variances, as in the MAPPO paper's code


@dataclass(frozen=True)
class GroupNetworks:
    """The networks of one group of agents; both read a tensordict with the observations of all agents.

    policy: writes the actions of the group's agents, with one set of weights for all of them or one for each.
    critic: writes the values of the group's agents, in units of the reward. A central critic sees the observations
    of the agents of all groups, an own critic only those of the agent.
    """

    group: Group
    policy: ProbabilisticActor
    critic: TensorDictModule

    def modules(self) -> nn.ModuleDict:
        """Return both networks as one module."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})


@dataclass(frozen=True)
class Networks:
    """The networks of MAPPO or IPPO for all agents; both read and write tensordicts.

    policy: writes the actions of all agents. critic: writes the values of all agents. parts: the networks of each
    group; of a single group, they are `policy` and `critic`. Networks with a memory, which only a single group can
    have, also read their memory before a frame and write the memory after it (`mappo.learning.memory`).
    """

    policy: TensorDictModuleBase
    critic: TensorDictModule
    parts: tuple[GroupNetworks, ...]

    @classmethod
    def of(cls, parts: Sequence[GroupNetworks]) -> "Networks":
        """Return the networks of all groups."""
        if len(parts) == 1:
            return cls(parts[0].policy, parts[0].critic, tuple(parts))
        critic = TensorDictModule(JointCritic(parts), in_keys=[OBSERVATION], out_keys=[VALUE])
        return cls(JointPolicy(parts), critic, tuple(parts))

    @cached_property
    def player(self) -> TensorDictModuleBase:
        """The networks that act during collection: the policy, and what carries the critic's memory."""
        return player_of(self.policy, self.critic)

    @property
    def has_memory(self) -> bool:
        """Return whether the networks remember earlier frames of an episode."""
        return has_memory(self.critic)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of agents, in the order of `parts`."""
        return tuple(part.group for part in self.parts)

    def modules(self) -> nn.ModuleDict:
        """Return both networks as one module, whose state_dict is everything to be saved."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})

    def update_observation_moments(self, observations: Tensor) -> None:
        """Update the moments of the networks that standardise observations [..., agents, features]."""
        for module in self.modules().modules():
            if isinstance(module, ObservationNormaliser):
                module.moments.update(module.group.observations(observations))


def observed(observation: Tensor) -> TensorDictBase:
    """Return a tensordict of observations [frames, agents, features]."""
    return TensorDict({OBSERVATION: observation}, batch_size=[len(observation)])


class JointPolicy(TensorDictModuleBase):  # type: ignore[misc]
    """The policies of several groups as one policy of all agents. The actions of shorter groups are padded."""

    def __init__(self, parts: Sequence[GroupNetworks]):
        super().__init__()
        self.in_keys, self.out_keys = [OBSERVATION], [ACTION]
        self._groups = tuple(part.group for part in parts)
        self.groups = nn.ModuleDict({_module_name(part.group): part.policy for part in parts})

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions of all agents into the tensordict."""
        # Each policy gets a tensordict of its own, whose axis of agents may have any length.
        actions = [policy(observed(tensordict[OBSERVATION]))[ACTION] for policy in self.groups.values()]
        return tensordict.set(ACTION, merged(self._groups, actions, self._groups[0].action_axis))


class JointCritic(nn.Module):
    """The critics of several groups as one critic of all agents."""

    def __init__(self, parts: Sequence[GroupNetworks]):
        super().__init__()
        self._groups = tuple(part.group for part in parts)
        self.groups = nn.ModuleDict({_module_name(part.group): part.critic.module for part in parts})

    def forward(self, observation: Tensor) -> Tensor:
        """Return values [..., agents, 1] in units of the reward for observations [..., agents, features]."""
        return merged(self._groups, [critic(observation) for critic in self.groups.values()])


def _module_name(group: Group) -> str:
    return f"of_{group.name}"  # a name alone can be that of a method, such as `train`


class RunningMoments(nn.Module):
    """The mean and standard deviation of a stream of batches, each weighted by 0.99999 ** (its age in updates).

    Before the first update, the mean is 0 and the deviation 1. Source: ValueNorm in the code of Yu et al.,
    The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games (2022). Its debiasing is the division
    by the weight here.
    """

    def __init__(self, num_features: int, device: torch.device):
        super().__init__()
        zero = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.means = nn.Buffer(zero.clone())
        self.squares = nn.Buffer(zero.clone())
        self.weight = nn.Buffer(zero.sum())

    def update(self, values: Tensor) -> None:
        """Add a batch [..., features] to the moments."""
        rows = values.detach().double().flatten(0, -2)
        self.means.mul_(_DECAY).add_(rows.mean(0))
        self.squares.mul_(_DECAY).add_(rows.square().mean(0))
        self.weight.mul_(_DECAY).add_(1)

    def standardise(self, values: Tensor) -> Tensor:
        """Scale values [..., features] to zero mean and unit deviation."""
        mean, deviation = self._mean_and_deviation()
        return (values - mean) / deviation

    def restore(self, values: Tensor) -> Tensor:
        """Invert `standardise`."""
        mean, deviation = self._mean_and_deviation()
        return values * deviation + mean

    def _mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.clamp_min(1)
        mean = self.means / weight
        variance = torch.where(self.weight > 0, self.squares / weight - mean.square(), 1.0)
        return mean.float(), variance.clamp_min(_MIN_VARIANCE).sqrt().float()


class GroupView(nn.Module):
    """A module that returns the observations of one group, without padding."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    def forward(self, observation: Tensor) -> Tensor:
        return self.group.observations(observation)


class ObservationNormaliser(GroupView):
    """A view that standardises a group's observations by their running moments over all agents of the group."""

    def __init__(self, group: Group, device: torch.device):
        super().__init__(group)
        self.moments = RunningMoments(group.num_features, device)

    def forward(self, observation: Tensor) -> Tensor:
        return self.moments.standardise(super().forward(observation))


class JointView(nn.Module):
    """A module that returns the observations of all groups as one row, [..., 1, features of all agents]."""

    def __init__(self, views: Sequence[GroupView]):
        super().__init__()
        self.groups = nn.ModuleDict({_module_name(view.group): view for view in views})

    def forward(self, observation: Tensor) -> Tensor:
        views = [view(observation).flatten(-2) for view in self.groups.values()]
        return torch.cat(views, -1).unsqueeze(-2)


class OnePerAgent(nn.Module):
    """The networks of agents that share no weights; each agent has its own network."""

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, observation: Tensor) -> Tensor:
        """Return outputs [..., agents, outputs] for observations [..., agents, features]."""
        pairs = zip(self.networks, observation.unbind(-2), strict=True)
        return torch.stack([network(features) for network, features in pairs], dim=-2)


class Critic(nn.Module):
    """The critic of a group, which maps the observations of all agents to the values of the group's agents.

    The network of a central critic sees all observations at once. It has one output per agent, since rewards may
    differ between agents. The network of an own critic sees one observation and returns the value of its agent.
    With `moments` of the value targets, the network predicts standardised values. Source: Yu et al., The
    Surprising Effectiveness of PPO in Cooperative Multi-Agent Games (2022), sections 3 and 5.1; the own critic:
    de Witt et al., Is Independent Learning All You Need in the StarCraft Multi-Agent Challenge? (2020).
    """

    def __init__(
        self,
        observation_normaliser: nn.Module,
        network: nn.Module,
        moments: RunningMoments | None,
        is_central: bool,
    ):
        super().__init__()
        self.observation_normaliser = observation_normaliser
        self.network = network
        self.moments = moments
        self.is_central = is_central

    def predict(self, observation: Tensor) -> Tensor:
        """Return the network's predictions [..., agents of the group, 1], standardised if the critic has moments.

        Observations are [..., agents, features].
        """
        features = self.observation_normaliser(observation)
        values: Tensor = self.network(features.flatten(-2) if self.is_central else features)
        return values.unsqueeze(-1) if self.is_central else values

    def forward(self, observation: Tensor) -> Tensor:
        """Return values [..., agents of the group, 1] in units of the reward, for observations of all agents."""
        prediction = self.predict(observation)
        return self.moments.restore(prediction) if self.moments else prediction


def make_networks(config: NetworksConfig, environment: EnvBase) -> Networks:
    """Make networks on the environment's device; torch's random stream determines their initial weights.

    Raises:
        ConfigError: the networks should have a memory, and there are several groups of agents.
    """
    groups = groups_of(environment)
    if config.has_memory and len(groups) > 1:
        raise ConfigError(
            f"networks.memory = {config.memory}: the agents form {len(groups)} groups "
            f"({', '.join(group.name for group in groups)}), and only a single group can have a memory; use none, "
            "or make all agents alike"
        )
    policies = [_make_policy(config, group, environment) for group in groups]
    critics = [_make_critic(config, group, groups, environment.device) for group in groups]
    return Networks.of([GroupNetworks(*networks) for networks in zip(groups, policies, critics, strict=True)])


def _make_critic(
    config: NetworksConfig, group: Group, groups: tuple[Group, ...], device: torch.device
) -> TensorDictModule:
    is_central = config.critic == "central"
    if is_central:
        num_features = sum(len(other.agents) * other.num_features for other in groups)
        network = _network(config, num_features, len(group.agents), device)
    else:
        network = _for_agents(config, group, group.num_features, 1, device)
    views = [_view(config, other, device) for other in (groups if is_central else (group,))]
    view = views[0] if len(views) == 1 else JointView(views)
    moments = RunningMoments(1, device) if config.normalise_values else None
    if config.has_memory:
        shape = 1 if is_central else len(group.agents), config.memory_size
        critic = RecurrentCritic(view, network, moments, is_central, shape)
        in_keys, out_keys = [OBSERVATION, CRITIC_MEMORY], [VALUE, next_key(CRITIC_MEMORY)]
        return TensorDictModule(critic, in_keys=in_keys, out_keys=out_keys)
    return TensorDictModule(Critic(view, network, moments, is_central), in_keys=[OBSERVATION], out_keys=[VALUE])


def _make_policy(config: NetworksConfig, group: Group, environment: EnvBase) -> ProbabilisticActor:
    num_outputs, keys, distribution = _action_distribution(group, environment)
    actors = _for_agents(config, group, group.num_features, num_outputs, environment.device)
    extractor = NormalParamExtractor() if keys == [_LOC, _SCALE] else nn.Identity()
    view = _view(config, group, environment.device)
    if config.has_memory:
        actor = RecurrentActor(view, actors, extractor, (len(group.agents), config.memory_size))
        module = TensorDictModule(actor, in_keys=[OBSERVATION, MEMORY], out_keys=[*keys, next_key(MEMORY)])
    else:
        module = TensorDictModule(
            nn.Sequential(view, actors, extractor),
            in_keys=[OBSERVATION],
            out_keys=keys,
        )
    return ProbabilisticActor(
        module,
        in_keys=keys,
        out_keys=[ACTION],
        **distribution,
    )


def _view(config: NetworksConfig, group: Group, device: torch.device) -> GroupView:
    return ObservationNormaliser(group, device) if config.normalise_observations else GroupView(group)


def _action_distribution(group: Group, environment: EnvBase) -> tuple[int, list[tuple[str, str]], dict[str, Any]]:
    """Return the number of outputs of an agent's network, their keys, and their distribution."""
    if not group.choices:
        space = environment.full_action_spec_unbatched[ACTION].space
        bounds = {"low": group.actions(space.low), "high": group.actions(space.high)}
        squashed = {"distribution_class": TanhNormal, "distribution_kwargs": bounds}
        if (is_constant := bounds["low"] == bounds["high"]).any():
            with_constants = {**bounds, "is_constant": is_constant}
            squashed = {"distribution_class": PartlyConstant, "distribution_kwargs": with_constants}
        return 2 * bounds["low"].shape[-1], [_LOC, _SCALE], squashed
    if group.num_components is None:
        return sum(group.choices), [_LOGITS], {"distribution_class": Categorical}
    categorical = {"distribution_class": MultiCategorical, "distribution_kwargs": {"choices": group.choices}}
    return sum(group.choices), [_LOGITS], categorical


def _for_agents(
    config: NetworksConfig, group: Group, in_features: int, out_features: int, device: torch.device
) -> Any:
    """Make a network that maps features [..., agents, in] to [..., agents, out], each agent by itself."""
    network = partial(_network, config, in_features, out_features, device)
    if config.share_policy:
        return network()
    one_per_agent = RecurrentOnePerAgent if config.has_memory else OnePerAgent
    return one_per_agent([network() for _ in group.agents])


def _network(config: NetworksConfig, in_features: int, out_features: int, device: torch.device) -> Any:
    """Make a multi-layer perceptron, with a memory before its hidden layers if the configuration says so."""
    mlp = MLP(
        in_features=in_features + (config.memory_size if config.has_memory else 0),
        out_features=out_features,
        num_cells=list(config.hidden_sizes),
        activation_class=_ACTIVATIONS[config.activation],
        device=device,
    )
    return (
        RecurrentNetwork(nn.GRUCell(in_features, config.memory_size, device=device), mlp)
        if config.has_memory
        else mlp
    )
