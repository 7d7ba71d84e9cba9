import pytest
import torch

from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment import ACTION, OBSERVATION, Stream, make_environment
from mappo.networks import VALUE, make_networks
from tests.conftest import CPU


@pytest.fixture
def environment():
    config = EnvironmentConfig(scenario="navigation", scenario_kwargs={"n_agents": 3})
    return make_environment(config, 5, 0, Stream.TRAINING, CPU)


@pytest.fixture
def networks(environment):
    torch.manual_seed(0)
    return make_networks(NetworksConfig(hidden_sizes=(8,)), environment)


def disturbed(state, agent):
    other = state.clone()
    other[OBSERVATION][:, agent] += 1
    return other


def test_actor_is_blind_to_the_observations_of_other_agents(environment, networks):
    state = environment.reset()
    before = networks.policy.get_dist(state).deterministic_sample
    after = networks.policy.get_dist(disturbed(state, agent=1)).deterministic_sample
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_critic_of_each_agent_sees_the_observations_of_all(environment, networks):
    state = environment.reset()
    before = networks.critic(state.clone())[VALUE]
    for agent in range(3):
        after = networks.critic(disturbed(state, agent))[VALUE]
        assert (before != after).all()


def test_policy_is_shared_so_that_swapping_agents_swaps_their_actions(environment, networks):
    state = environment.reset()
    swapped = state.clone()
    swapped[OBSERVATION] = state[OBSERVATION].flip(1)
    assert torch.allclose(
        networks.policy.get_dist(swapped).deterministic_sample,
        networks.policy.get_dist(state).deterministic_sample.flip(1),
        atol=1e-6,
    )


def test_shapes_are_environments_agents_features(environment, networks):
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

    one, other = weights(), weights()
    assert all(torch.equal(one[name], other[name]) for name in one)
