"""Check which agents form a group, and that padding reaches neither VMAS nor a group."""

import pytest
import torch

from mappo.config import EnvironmentConfig
from mappo.environment.environment import groups_of, make_environment
from mappo.environment.groups import Group, find_groups, mean_reward, merged
from mappo.environment.keys import ACTION, OBSERVATION, REWARD
from mappo.environment.random_streams import Stream
from mappo.errors import ConfigError
from tests.conftest import CPU

WIDE, NARROW = (3, 2, ()), (2, 4, ())
TEAMS = {"hunter_0": WIDE, "prey_0": NARROW, "hunter_1": WIDE}


def make(scenario="tests.support.scenarios:Teams", num_envs=4, **fields):
    config = EnvironmentConfig(scenario=scenario, **fields)
    return make_environment(config, num_envs, 0, Stream.TRAINING, CPU)


def names(groups):
    return {group.name: group.agents for group in groups}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (dict.fromkeys(["red_0", "blue_0"], WIDE), {"agents": (0, 1)}),
        (TEAMS, {"hunter": (0, 2), "prey": (1,)}),
        ({"a_0": WIDE, "a_1": NARROW, "b_0": WIDE, "a_2": WIDE}, {"a": (0, 3), "a_2": (1,), "b": (2,)}),
        ({"agent 0": WIDE, "agent 1": WIDE, "leader": NARROW}, {"agent": (0, 1), "leader": (2,)}),
        ({"Größe-1": WIDE, "_x": NARROW, "7": (1, 1, ())}, {"Gr__e": (0,), "team_x": (1,), "7": (2,)}),
        ({f"{'n' * 40}_0": WIDE, "b": NARROW}, {"n" * 32: (0,), "b": (1,)}),
    ],
    ids=["equal agents", "teams", "shapes within a team", "other names", "characters", "long name"],
)
def test_groups_are_found_by_shapes_and_names(shapes, expected):
    assert names(find_groups(shapes, {})) == expected


def test_two_actions_of_equal_size_and_other_choices_are_two_groups():
    shapes = {"a_0": (3, 2, (3, 3)), "a_1": (3, 2, (3, 5))}
    assert names(find_groups(shapes, {})) == {"a": (0,), "a_2": (1,)}


def test_configured_groups_replace_those_that_are_found():
    requested = {"second": ["hunter_1"], "prey": ["prey_0"], "first": ["hunter_0"]}
    groups = find_groups(TEAMS, requested)
    assert [(group.name, group.agents) for group in groups] == [("first", (0,)), ("prey", (1,)), ("second", (2,))]
    equal = dict.fromkeys(["a_0", "a_1"], WIDE)
    assert names(find_groups(equal, {"x": ["a_1", "a_0"]})) == {"x": (0, 1)}


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"all": ["hunter_0", "prey_0", "hunter_1"]}, "groups.all: .*prey_0: 2 observation features and 4 action"),
        ({"x": ["hunter_0", "hunter_1"]}, "groups: prey_0 is in no group"),
        (
            {"x": ["hunter_0", "hunter_9"]},
            "groups.x: there is no agent 'hunter_9'; agents: hunter_0, prey_0, hunter_1",
        ),
        ({"x": ["hunter_0"], "y": ["hunter_0"]}, "groups.y: hunter_0 is in x, too"),
        ({"x": ["hunter_0", "hunter_0"]}, "groups.x: hunter_0 is in x, too"),
    ],
)
def test_configured_groups_that_do_not_fit_the_agents_are_refused(requested, message):
    with pytest.raises(ConfigError, match=f"^environment.{message}"):
        find_groups(TEAMS, requested)


def test_more_groups_than_labels_of_metrics_are_refused():
    with pytest.raises(ConfigError, match="form 9 groups"):
        find_groups({f"a_{number}": (number, 2, ()) for number in range(9)}, {})


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "-a", "x" * 33])
def test_name_of_a_group_has_few_characters(name):
    with pytest.raises(ValueError, match="environment.groups|pattern"):
        EnvironmentConfig(groups={name: ("a",)})


def test_return_is_the_mean_over_the_groups_that_count():
    rewards = torch.tensor([[1.0, -30.0, 2.0]])
    assert mean_reward(find_groups(TEAMS, {}), rewards).tolist() == [-9.0]
    assert mean_reward(find_groups(TEAMS, {}, ["hunter"]), rewards).tolist() == [1.5]
    assert mean_reward(find_groups(TEAMS, {}, ["prey"]), rewards).tolist() == [-30.0]
    with pytest.raises(ConfigError, match="return_groups: there is no group wolf; groups: hunter, prey"):
        find_groups(TEAMS, {}, ["wolf"])


def test_shares_of_groups_merge_into_what_they_were_cut_from():
    groups = find_groups(TEAMS, {})
    values, log_prob = torch.rand(5, 3, 1), torch.rand(5, 3)
    assert torch.equal(merged(groups, [group.rows(values) for group in groups]), values)
    assert torch.equal(merged(groups, [group.rows(log_prob, -1) for group in groups], -1), log_prob)
    observation = torch.rand(5, 3, 3)
    shares = [group.observations(observation) for group in groups]
    assert [share.shape for share in shares] == [(5, 2, 3), (5, 1, 2)]
    assert torch.equal(shares[0], observation[:, [0, 2]])
    observation[:, 1, 2] = 0.0  # padding
    assert torch.equal(merged(groups, shares), observation)


def test_single_group_gets_the_tensor_itself():
    group = Group("agents", (0, 1), 3, 2)
    tensor = torch.rand(4, 2, 3)
    assert group.observations(tensor) is tensor
    assert group.rows(tensor) is tensor
    assert merged([group], [tensor]) is tensor


@pytest.mark.parametrize(
    ("actions", "shapes"),
    [
        ("continuous", [(4, 2), (4, 4), (4, 2)]),
        ("discrete", [(4, 1)] * 3),
        ("multi-discrete", [(4, 2), (4, 3), (4, 2)]),
    ],
)
def test_vmas_gets_actions_without_padding_and_agents_get_padded_observations(actions, shapes):
    environment = make(actions=actions)
    received = []
    simulator = environment.base_env._env
    step = simulator.step
    simulator.step = lambda actions: received.append([action.shape for action in actions]) or step(actions)
    frame = environment.rand_step(environment.reset())
    assert received == [shapes]
    hunters, prey = (group.observations(frame["next", *OBSERVATION]) for group in groups_of(environment))
    agents = {agent.name: agent for agent in simulator.agents}
    assert torch.equal(prey[:, 0], agents["prey_0"].state.pos)
    assert torch.equal(hunters[:, 1, :2], agents["hunter_1"].state.pos)
    assert not frame["next", *OBSERVATION][:, 1, 2:].any()
    assert torch.equal(frame["next", *REWARD][:, 1, 0], -agents["prey_0"].action.u[:, 0])


@pytest.mark.parametrize(
    ("actions", "choices"), [("discrete", [9, 18, 9]), ("multi-discrete", [[3, 3, 1], [3, 3, 2], [3, 3, 1]])]
)
def test_random_actions_are_possible_choices_of_each_agent(actions, choices):
    environment = make(actions=actions, num_envs=500)
    spec = environment.full_action_spec[ACTION]
    drawn = environment.rand_action(environment.reset())[ACTION]
    assert spec.is_in(drawn)
    assert torch.equal(drawn.amax(0), torch.tensor(choices) - 1), "the last choice of each is drawn, and no other"
    assert not spec.is_in(drawn + 1)


def test_random_continuous_actions_stay_in_each_agents_range_and_padding_is_zero():
    drawn = make(num_envs=500).rand_action()[ACTION]
    low, high = drawn.amin(0), drawn.amax(0)
    bounds = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(high, bounds, atol=0.05, rtol=0)
    torch.testing.assert_close(low, -bounds * torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=0.05, rtol=0)


def test_unequal_agents_of_vmas_form_the_groups_of_torchrl():
    environment = make("simple_tag")
    expected = environment.base_env._get_default_group_map(environment.base_env.agent_names)
    agents = environment.base_env.agent_names
    assert {group.name: [agents[agent] for agent in group.agents] for group in groups_of(environment)} == expected
    assert [group.num_features for group in groups_of(environment)] == [16, 14]


def test_observations_of_other_axes_are_refused():
    with pytest.raises(ConfigError, match=r"observation\(\) must return one tensor \[envs, features\]"):
        make("tests.support.scenarios:DictionaryObservation")
