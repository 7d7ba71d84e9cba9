"""The decentralised shared actor and the centralised critic, sized from the environment's specs."""

from dataclasses import dataclass

from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from mappo.config import NetworksConfig
from mappo.environment import ACTION, OBSERVATION

VALUE = ("agents", "state_value")  # [envs, time, agents, 1]
_LOC, _SCALE = ("agents", "loc"), ("agents", "scale")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Networks:
    """The two networks of MAPPO, both reading and writing tensordicts.

    policy: each agent's observation -> its action, with one set of weights for all agents.
    critic: the observations of all agents together -> one value for each agent.
    """

    policy: ProbabilisticActor
    critic: TensorDictModule

    def modules(self) -> nn.ModuleDict:
        """Both as one module, whose state_dict is all there is to save."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})


class CentralisedCritic(nn.Module):
    """Values of all agents from the observations of all agents.

    The output layer has one unit for each agent, so that agents with rewards of their own have values of their
    own. Source: Yu et al., The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games (2022),
    section 3 (centralised value function).
    """

    def __init__(self, num_agents: int, num_features: int, hidden: MLP):
        super().__init__()
        self.num_agents, self.num_features = num_agents, num_features
        self.network = hidden

    def forward(self, observation: Tensor) -> Tensor:
        """[..., agents, features] -> [..., agents, 1]."""
        values: Tensor = self.network(observation.flatten(-2))
        return values.unsqueeze(-1)


def make_networks(config: NetworksConfig, environment: EnvBase) -> Networks:
    """Fresh networks on the environment's device; their initial weights come from torch's random stream."""
    specs = environment.full_observation_spec_unbatched[OBSERVATION]
    num_agents, num_features = specs.shape
    action_spec = environment.full_action_spec_unbatched[ACTION]
    num_actions = action_spec.shape[-1]

    def mlp(in_features: int, out_features: int) -> MLP:
        return MLP(
            in_features=in_features,
            out_features=out_features,
            num_cells=list(config.hidden_sizes),
            activation_class=_ACTIVATIONS[config.activation],
            device=environment.device,
        )

    actor = nn.Sequential(mlp(num_features, 2 * num_actions), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(actor, in_keys=[OBSERVATION], out_keys=[_LOC, _SCALE]),
        spec=environment.full_action_spec_unbatched,
        in_keys=[_LOC, _SCALE],
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
    )
    critic = CentralisedCritic(num_agents, num_features, mlp(num_agents * num_features, num_agents))
    return Networks(policy, TensorDictModule(critic, in_keys=[OBSERVATION], out_keys=[VALUE]))
