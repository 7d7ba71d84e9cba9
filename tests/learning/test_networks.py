import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP

from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment.environment import groups_of, make_environment
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream
from mappo.learning.distributions import MultiCategorical
from mappo.learning.networks import VALUE, RunningMoments, make_networks
from tests.conftest import CPU


@pytest.fixture
def environment():
    config = EnvironmentConfig(scenario="navigation", scenario_kwargs={"n_agents": 3})
    return make_environment(config, 5, 0, Stream.TRAINING, CPU)


@pytest.fixture
def networks(environment):
    torch.manual_seed(0)
    return make_networks(NetworksConfig(hidden_sizes=(8,)), environment)


def disturb(state, agent):
    changed = state.clone()
    changed[OBSERVATION][:, agent] += 1
    return changed


def test_action_does_not_depend_on_the_observations_of_other_agents(environment, networks):
    state = environment.reset()
    plain = networks.policy.get_dist(state).deterministic_sample
    disturbed = networks.policy.get_dist(disturb(state, agent=1)).deterministic_sample
    assert torch.equal(plain[:, [0, 2]], disturbed[:, [0, 2]])
    assert not torch.equal(plain[:, 1], disturbed[:, 1])


def test_value_of_each_agent_depends_on_the_observations_of_all(environment, networks):
    state = environment.reset()
    plain = networks.critic(state.clone())[VALUE]
    for agent in range(3):
        disturbed = networks.critic(disturb(state, agent))[VALUE]
        assert (plain != disturbed).all()


@pytest.fixture(params=[True, False], ids=["shared", "one an agent"])
def own(request, environment):
    """Return networks whose critic sees the agent's own observation."""
    torch.manual_seed(0)
    config = NetworksConfig(hidden_sizes=(8,), critic="own", share_policy=request.param)
    return make_networks(config, environment)


def test_value_of_an_own_critic_depends_on_the_observation_of_its_agent_only(environment, own):
    state = environment.reset()
    plain = own.critic(state.clone())[VALUE]
    assert plain.shape == (5, 3, 1)
    for agent in range(3):
        disturbed = own.critic(disturb(state, agent))[VALUE]
        others = [other for other in range(3) if other != agent]
        assert torch.equal(plain[:, others], disturbed[:, others])
        assert (plain[:, agent] != disturbed[:, agent]).all()


def test_own_critics_share_their_weights_if_the_actors_do(environment):
    state = environment.reset()
    state[OBSERVATION][:] = 1.0
    for shares in (True, False):
        config = NetworksConfig(hidden_sizes=(8,), critic="own", share_policy=shares)
        values = make_networks(config, environment).critic(state.clone())[VALUE]
        assert torch.allclose(values[:, 0], values[:, 1]) == shares


def test_default_networks_have_the_names_and_weights_of_version_0_5(environment, networks):
    """Version 0.5 drew the actor's weights first, then those of the central critic. Checkpoints hold the names."""
    torch.manual_seed(0)
    actor, critic = (
        MLP(in_features=inputs, out_features=outputs, num_cells=[8], activation_class=nn.Tanh)
        for inputs, outputs in ((18, 4), (54, 3))
    )
    expected = {
        **{f"policy.module.0.module.1.{name}": value for name, value in actor.state_dict().items()},
        **{f"critic.module.network.{name}": value for name, value in critic.state_dict().items()},
    }
    tensors = networks.modules().state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_swapping_observations_swaps_actions_when_the_policy_is_shared(environment, networks):
    state = environment.reset()
    swapped = state.clone()
    swapped[OBSERVATION] = state[OBSERVATION].flip(1)
    assert torch.allclose(
        networks.policy.get_dist(swapped).deterministic_sample,
        networks.policy.get_dist(state).deterministic_sample.flip(1),
        atol=1e-6,
    )


def test_actions_and_values_have_the_axes_environments_agents_features(environment, networks):
    state = networks.critic(networks.policy(environment.reset()))
    assert state[ACTION].shape == (5, 3, 2)
    assert state[VALUE].shape == (5, 3, 1)


def test_actions_stay_within_the_bounds_of_the_action_space(environment, networks):
    with torch.no_grad():
        for parameter in networks.policy.parameters():
            parameter.mul_(50)
    actions = networks.policy(environment.reset())[ACTION]
    space = environment.full_action_spec_unbatched[ACTION].space
    assert (actions >= space.low).all()
    assert (actions <= space.high).all()


def test_same_random_stream_gives_the_same_weights(environment):
    def weights():
        torch.manual_seed(3)
        return make_networks(NetworksConfig(hidden_sizes=(8,)), environment).modules().state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=["discrete", "multi-discrete"])
def talking(request):
    """Return an environment whose agents have three moves along each of two axes, and ten words."""
    config = EnvironmentConfig(scenario="simple_reference", actions=request.param)
    return make_environment(config, 5, 0, Stream.TRAINING, CPU)


def test_choices_follow_the_action_space_including_communication(talking):
    networks = make_networks(NetworksConfig(hidden_sizes=(8,)), talking)
    choices = groups_of(talking)[0].choices
    assert choices in [(90,), (3, 3, 10)]
    state = networks.policy(talking.reset())
    assert state["agents", "logits"].shape == (5, 2, sum(choices))
    assert state[ACTION].shape == ((5, 2) if len(choices) == 1 else (5, 2, 3))
    talking.step(state)
    distribution = networks.policy.get_dist(state)
    assert distribution.log_prob(state[ACTION]).shape == (5, 2)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        best = networks.policy(state.clone())[ACTION]
    assert talking.full_action_spec[ACTION].is_in(best)
    assert (distribution.log_prob(best) >= distribution.log_prob(state[ACTION])).all()


def test_multi_categorical_is_the_product_of_its_components():
    """The components have 2 and 3 choices; every probability is computed by hand from the logits."""
    logits = torch.tensor([[0.0, math.log(3.0), 0.0, math.log(2.0), 0.0]], requires_grad=True)
    distribution = MultiCategorical(logits, (2, 3))
    first, second = [0.25, 0.75], [0.25, 0.5, 0.25]
    for choice, other_choice in itertools.product(range(2), range(3)):
        probability = distribution.log_prob(torch.tensor([[choice, other_choice]])).exp().item()
        assert probability == pytest.approx(first[choice] * second[other_choice])
    entropy = -sum(p * math.log(p) for p in first + second)
    assert distribution.entropy().item() == pytest.approx(entropy)
    assert distribution.deterministic_sample.tolist() == [[1, 1]]
    samples = distribution.sample((4_000,)).reshape(-1, 2)
    assert samples.amax(0).tolist() == [1, 2]
    assert samples.float().mean(0).tolist() == pytest.approx([0.75, 1.0], abs=0.05)
    distribution.entropy().sum().backward()
    assert logits.grad.isfinite().all()


def test_running_moments_equal_the_debiased_moments_of_the_papers_code():
    """The code updates moments and a debiasing term as beta x old + (1 - beta) x new; it divides by the term."""
    beta, mean, square, debias = 0.99999, np.zeros(2), np.zeros(2), 0.0
    moments, random = RunningMoments(2, CPU), np.random.default_rng(0)
    values = torch.tensor([[3.0, -1.0]])
    assert torch.equal(moments.standardise(values), values)
    for size in (5, 50, 500):
        batch = random.normal([100.0, 0.0], [10.0, 1e-3], (size, 2))
        mean = beta * mean + (1 - beta) * batch.mean(0)
        square = beta * square + (1 - beta) * (batch**2).mean(0)
        debias = beta * debias + (1 - beta)
        moments.update(torch.as_tensor(batch))
    deviation = np.sqrt(np.clip(square / debias - (mean / debias) ** 2, 1e-2, None))
    expected = (values.numpy() - mean / debias) / deviation
    assert moments.standardise(values).numpy() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(moments.restore(moments.standardise(values)), values, atol=1e-4)


def test_agents_have_different_weights_when_they_share_no_policy(environment):
    networks = make_networks(NetworksConfig(hidden_sizes=(8,), share_policy=False), environment)
    state = environment.reset()
    state[OBSERVATION][:] = 1.0
    actions = networks.policy.get_dist(state).deterministic_sample
    assert not torch.allclose(actions[:, 0], actions[:, 1])
