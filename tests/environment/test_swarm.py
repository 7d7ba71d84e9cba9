import math

import pytest
import torch
from vmas import make_env

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream
from mappo.environment.scenarios.swarm import NEIGHBOURS, HeuristicPolicy, Scenario
from mappo.errors import ConfigError
from tests.conftest import CPU


def simulate(num_envs=2, **arguments):
    environment = make_env(Scenario(), num_envs=num_envs, device="cpu", seed=0, **arguments)
    environment.reset()
    return environment, environment.world.agents, environment.world.landmarks


def set_state(entities, positions, velocities=None):
    """Set the same positions and velocities (default: zero) in every environment."""
    velocities = velocities or [(0.0, 0.0)] * len(entities)
    for entity, position, velocity in zip(entities, positions, velocities, strict=True):
        rows = entity.state.pos.shape[0]
        entity.set_pos(torch.tensor([position] * rows), batch_index=None)
        entity.set_vel(torch.tensor([velocity] * rows), batch_index=None)


def rewards(environment):
    return torch.stack([environment.scenario.reward(agent) for agent in environment.world.agents], dim=1)


def test_reward_equals_a_hand_calculation():
    """Agent 0 is on one target and 0.3 m from the other, which moves away at 0.1 m/s; agent 1 is far away.

    Agent 0 earns (1 + exp(-1) - 10 x 0.1 m/s x 0.1 s) x 2 agents / 2 targets; agent 1 earns nothing.
    """
    environment, agents, targets = simulate(n_agents=2, n_targets=2)
    set_state(agents, [(0.0, 0.0), (-0.9, -0.9)])
    set_state(targets, [(0.0, 0.0), (0.3, 0.0)], [(0.0, 0.0), (0.1, 0.0)])
    earned = rewards(environment)
    assert torch.allclose(earned[:, 0], torch.tensor(1 + math.exp(-1) - 0.1), atol=1e-5)
    assert torch.equal(earned[:, 1], torch.zeros(2))


def test_crowding_penalises_both_agents_more_when_they_are_nearer():
    """At half the safe distance both pay half of the penalty of 2; at the safe distance nothing."""
    environment, agents, targets = simulate(n_agents=2, n_targets=1)
    set_state(targets, [(0.0, 0.9)])
    set_state(agents, [(0.9, -0.9), (0.8, -0.9)])
    near = rewards(environment)
    set_state(agents, [(0.9, -0.9), (0.7, -0.9)])
    apart = rewards(environment)
    assert torch.allclose(near[:, 0] - apart[:, 0], torch.tensor(-1.0), atol=1e-4)
    assert (near[:, 1] - apart[:, 1] + 1.0).abs().max() < 0.1  # agent 1's target reward changes a little


def test_shared_reward_is_the_mean_of_the_individual_rewards():
    environment, _, _ = simulate(n_agents=3, n_targets=2)
    individual = rewards(environment)
    environment.scenario.shared_reward = True
    shared = rewards(environment)
    assert torch.allclose(shared, individual.mean(1, keepdim=True).expand(-1, 3))


def test_observation_contains_targets_and_the_nearest_neighbours_in_order():
    environment, agents, targets = simulate(n_agents=5, n_targets=1)
    set_state(
        agents, [(0.0, 0.0), (0.5, 0.0), (0.1, 0.0), (-0.2, 0.0), (0.0, 0.9)], [(0.1, 0.2)] + [(0.0, 0.0)] * 4
    )
    set_state(targets, [(0.4, 0.4)], [(0.05, 0.0)])
    observation = environment.scenario.observation(agents[0])[0]
    expected = [0.0, 0.0, 0.1, 0.2, 0.4, 0.4, 0.05, 0.0, 0.1, 0.0, -0.2, 0.0, 0.5, 0.0]
    assert observation.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("n_agents", [1, 2, 7, 30])
def test_observation_size_does_not_depend_on_the_number_of_agents(n_agents):
    environment, agents, _ = simulate(n_agents=n_agents, n_targets=2, half_width=1.5)
    observation = environment.scenario.observation(agents[-1])
    assert observation.shape == (2, 4 + 4 * 2 + 2 * NEIGHBOURS)
    assert observation.isfinite().all()


def test_agents_start_apart_and_all_entities_start_inside_the_arena():
    _, agents, targets = simulate(num_envs=50, n_agents=20, n_targets=5)
    positions = torch.stack([agent.state.pos for agent in agents], dim=1)
    distances = torch.cdist(positions, positions) + torch.eye(20)
    assert distances.min() >= 0.1 - 1e-5
    assert positions.abs().max() <= 1
    assert torch.stack([target.state.pos for target in targets]).abs().max() <= 1


def test_targets_keep_their_speed_and_stay_inside_the_arena():
    environment, agents, targets = simulate(num_envs=20)
    for _ in range(400):
        environment.step([torch.zeros(20, 2) for _ in agents])
    for target in targets:
        assert target.state.pos.abs().max() <= 1
        assert torch.allclose(target.state.vel.norm(dim=-1), torch.tensor(0.1), atol=1e-4)


def test_heuristic_policy_earns_more_than_random_actions():
    def mean_return(act):
        environment, agents, _ = simulate(num_envs=32)
        observations, total = environment.reset(seed=1), 0.0
        for _ in range(100):
            actions = [
                act(environment, observation, agent)
                for observation, agent in zip(observations, agents, strict=True)
            ]
            observations, agent_rewards, _, _ = environment.step(actions)
            total += torch.stack(agent_rewards).mean().item()
        return total

    policy = HeuristicPolicy(continuous_action=True)
    heuristic = mean_return(lambda _, observation, agent: policy.compute_action(observation, agent.u_range))
    random = mean_return(lambda environment, _, agent: environment.get_random_action(agent))
    assert heuristic > 2 * random > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"n_agents": 0}, "n_agents = 0: must be a number of at least 1"),
        ({"n_agents": 10_000}, "they do not fit an arena"),
        ({"collision_penalty": "high"}, "collision_penalty = 'high'"),
        ({"n_agent": 3}, "n_agent"),
    ],
)
def test_error_names_the_wrong_argument(arguments, reason):
    config = EnvironmentConfig(scenario="swarm", scenario_kwargs=arguments)
    with pytest.raises(ConfigError, match=reason):
        make_environment(config, 2, 0, Stream.TRAINING, CPU)
