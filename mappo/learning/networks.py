"""The decentralised actor and the critic, centralised or not, sized from the environment's specs."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torchrl.data import MultiCategorical as MultiCategoricalSpec
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from mappo.config import NetworksConfig
from mappo.environment.environment import action_choices
from mappo.environment.keys import ACTION, OBSERVATION

VALUE = ("agents", "state_value")  # [envs, time, agents, 1]
_LOC, _SCALE, _LOGITS = ("agents", "loc"), ("agents", "scale"), ("agents", "logits")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_DECAY = 0.99999  # decay of running moments per update, as in the MAPPO paper's code
_MIN_VARIANCE = 1e-2  # lower bound of variances, as in the MAPPO paper's code
_IMPOSSIBLE = -1e8  # a logit whose probability is 0
_DENSITY_ONE = 1 / math.sqrt(2 * math.pi)  # the deviation of a normal distribution whose density at its mean is 1


@dataclass(frozen=True)
class Networks:
    """The networks of MAPPO or IPPO; both read and write tensordicts.

    policy: maps each agent's observation to its action, with one set of weights for all agents or one for each.
    critic: maps observations to one value for each agent, in units of the reward. A central critic sees the
    observations of all agents, an own critic only those of the agent.
    """

    policy: ProbabilisticActor
    critic: TensorDictModule

    def modules(self) -> nn.ModuleDict:
        """Return both networks as one module, whose state_dict is everything to be saved."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})

    def update_observation_moments(self, observations: Tensor) -> None:
        """Update the moments of the networks that standardise observations [..., agents, features]."""
        for module in self.modules().modules():
            if isinstance(module, ObservationNormaliser):
                module.moments.update(observations)


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


class ObservationNormaliser(nn.Module):
    """A module that standardises observations [..., features] by their running moments over all agents."""

    def __init__(self, num_features: int, device: torch.device):
        super().__init__()
        self.moments = RunningMoments(num_features, device)

    def forward(self, observation: Tensor) -> Tensor:
        return self.moments.standardise(observation)


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
    """The critic, which maps the observations of all agents to the values of all agents.

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
        """Return the network's predictions [..., agents, 1], standardised if the critic has moments.

        Observations are [..., agents, features].
        """
        features = self.observation_normaliser(observation)
        values: Tensor = self.network(features.flatten(-2) if self.is_central else features)
        return values.unsqueeze(-1) if self.is_central else values

    def forward(self, observation: Tensor) -> Tensor:
        """Return values [..., agents, 1] in units of the reward for observations [..., agents, features]."""
        prediction = self.predict(observation)
        return self.moments.restore(prediction) if self.moments else prediction


class MultiCategorical(Independent):  # type: ignore[type-arg]
    """The distribution of an action with several independent discrete components.

    Log-probabilities and entropies are sums over the components. Logits are [..., sum of choices], samples
    [..., components].
    """

    def __init__(self, logits: Tensor, choices: tuple[int, ...]):
        parts = torch.split(logits, list(choices), dim=-1)
        padded = [nn.functional.pad(part, (0, max(choices) - part.shape[-1]), value=_IMPOSSIBLE) for part in parts]
        super().__init__(Categorical(logits=torch.stack(padded, dim=-2)), 1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The most likely choice of each component."""
        return self.mode


class PartlyConstant(TanhNormal):  # type: ignore[misc]
    """The distribution of a continuous action of which some components are constants, the middle of their bounds.

    Constants contribute nothing to log-probabilities, entropies and gradients. `is_constant` marks them; it and
    the bounds are [agents, components].
    """

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, is_constant: Tensor):
        super().__init__(
            torch.where(is_constant, 0.0, loc),
            torch.where(is_constant, _DENSITY_ONE, scale),  # the log-probability of the constant is 0
            low=torch.where(is_constant, low - 1, low),  # TanhNormal needs bounds that differ; the slope is 1
            high=torch.where(is_constant, high + 1, high),
        )
        self.base_dist.base_dist = _PartlyFixedNormal(self.loc, self.scale, is_constant)


class _PartlyFixedNormal(Normal):
    """A normal distribution whose components marked by `is_fixed` never leave their mean."""

    def __init__(self, loc: Tensor, scale: Tensor, is_fixed: Tensor):
        super().__init__(loc, scale)
        self._is_fixed = is_fixed

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        drawn: Tensor = super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return torch.where(self._is_fixed, self.loc, drawn)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.where(self._is_fixed, self.loc, super().rsample(sample_shape))


def make_networks(config: NetworksConfig, environment: EnvBase) -> Networks:
    """Make networks on the environment's device; torch's random stream determines their initial weights."""
    num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape[-1]

    def normaliser() -> nn.Module:
        if config.normalise_observations:
            return ObservationNormaliser(num_features, environment.device)
        return nn.Identity()

    policy = _make_policy(config, environment, normaliser())
    critic = Critic(
        normaliser(),
        _critic_network(config, environment),
        RunningMoments(1, environment.device) if config.normalise_values else None,
        config.critic == "central",
    )
    return Networks(policy, TensorDictModule(critic, in_keys=[OBSERVATION], out_keys=[VALUE]))


def _critic_network(config: NetworksConfig, environment: EnvBase) -> MLP | OnePerAgent:
    num_agents, num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape
    if config.critic == "central":
        return _mlp(config, num_agents * num_features, num_agents, environment)
    return _for_agents(config, num_features, 1, environment)


def _make_policy(config: NetworksConfig, environment: EnvBase, normaliser: nn.Module) -> ProbabilisticActor:
    num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape[-1]
    num_outputs, keys, distribution = _action_distribution(environment)
    actors = _for_agents(config, num_features, num_outputs, environment)
    extractor = NormalParamExtractor() if keys == [_LOC, _SCALE] else nn.Identity()
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(normaliser, actors, extractor),
            in_keys=[OBSERVATION],
            out_keys=keys,
        ),
        spec=environment.full_action_spec_unbatched,
        in_keys=keys,
        out_keys=[ACTION],
        **distribution,
    )


def _action_distribution(environment: EnvBase) -> tuple[int, list[tuple[str, str]], dict[str, Any]]:
    """Return the number of outputs of an agent's network, their keys, and their distribution."""
    spec, choices = environment.full_action_spec_unbatched[ACTION], action_choices(environment)
    if not choices:
        bounds = {"low": spec.space.low, "high": spec.space.high}
        squashed = {"distribution_class": TanhNormal, "distribution_kwargs": bounds}
        if (is_constant := bounds["low"] == bounds["high"]).any():
            with_constants = {**bounds, "is_constant": is_constant}
            squashed = {"distribution_class": PartlyConstant, "distribution_kwargs": with_constants}
        return 2 * spec.shape[-1], [_LOC, _SCALE], squashed
    if isinstance(spec, MultiCategoricalSpec):
        categorical = {"distribution_class": MultiCategorical, "distribution_kwargs": {"choices": choices}}
        return sum(choices), [_LOGITS], categorical
    return sum(choices), [_LOGITS], {"distribution_class": Categorical}


def _for_agents(
    config: NetworksConfig, in_features: int, out_features: int, environment: EnvBase
) -> MLP | OnePerAgent:
    """Make a network that maps features [..., agents, in] to [..., agents, out], each agent by itself."""
    network = partial(_mlp, config, in_features, out_features, environment)
    if config.share_policy:
        return network()
    num_agents = environment.full_observation_spec_unbatched[OBSERVATION].shape[0]
    return OnePerAgent([network() for _ in range(num_agents)])


def _mlp(config: NetworksConfig, in_features: int, out_features: int, environment: EnvBase) -> MLP:
    return MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(config.hidden_sizes),
        activation_class=_ACTIVATIONS[config.activation],
        device=environment.device,
    )
