"""Check that each group of agents learns as if it were alone, from its own rewards, and sees no padding."""

import math

import pytest
import torch
from tensordict import TensorDict

from mappo.config import from_dict, override
from mappo.environment.environment import groups_of, make_environment
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED, next_key
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NonFiniteLoss
from mappo.learning.learner import ADVANTAGE, LOG_PROB, Learner
from mappo.learning.networks import VALUE, make_networks, observed
from tests.conftest import CPU, TINY
from tests.learning.test_learner import make, prepare
from tests.support.runs import batches

TEAMS = "tests.support.scenarios:Teams"


def teams(*changes, **kwargs):
    """Return a configuration of two hunters and their prey, with critics of their own."""
    task = {"scenario": TEAMS, "scenario_kwargs": kwargs}
    return override(from_dict(TINY), {"environment": task, "networks": {"critic": "own"}}, *changes)


def alone(config, batch, part, **kwargs):
    """Return a learner of one team in a task without the other, with its networks and its share of a batch."""
    config = override(config, {"environment": {"scenario_kwargs": kwargs}})
    environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
    assert len(groups_of(environment)) == 1
    networks = make_networks(config.networks, environment)
    networks.modules().load_state_dict(part.modules().state_dict())
    share = TensorDict({}, batch.batch_size)
    for key in (OBSERVATION, next_key(OBSERVATION)):
        share[key] = part.group.observations(batch[key]).clone()
    share[ACTION] = part.group.actions(batch[ACTION]).clone()
    share[next_key(REWARD)] = part.group.rows(batch[next_key(REWARD)]).clone()
    for key in (DONE, TERMINATED):
        share[next_key(key)] = batch[next_key(key)].clone()
    return Learner(config.learner, networks, config.collection.num_iterations), share


@pytest.mark.parametrize(
    "changes",  # the last two average over the whole batch, whose order in memory differs: not bit by bit
    [
        {},
        {"environment": {"actions": "discrete"}, "learner": {"entropy_coefficient": 0.1}},
        {"networks": {"normalise_values": True, "normalise_observations": True, "share_policy": False}},
        {"environment": {"actions": "multi-discrete"}, "learner": {"max_gradient_norm": 0.01}},
        {"learner": {"value_clip_epsilon": 0.1, "advantage_normalisation": "batch"}},
        {"learner": {"advantage_normalisation": "agent"}},
    ],
    ids=["continuous", "discrete", "normalised", "clipped", "batch", "agent"],
)
def test_each_group_learns_bit_by_bit_as_if_it_were_alone(changes):
    """The prey's rewards are 1,000 times as large; neither they nor its number change what the hunters learn."""
    config = teams(changes, prey_scale=1_000.0)
    _, networks, learner, batch = make(config)
    learners = [
        alone(config, batch, part, **{other: False})
        for part, other in zip(networks.parts, ("prey", "hunters"), strict=True)
    ]
    for one, of_one in [(learner, batch), *learners]:
        torch.manual_seed(0)
        one.update(of_one)
    for part, (single, _) in zip(networks.parts, learners, strict=True):
        expected = single.networks.modules().state_dict()
        for name, value in part.modules().state_dict().items():
            tolerance = 1e-6 if "advantage_normalisation" in changes.get("learner", {}) else 0.0
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def test_measures_by_group_are_those_of_a_learner_alone_and_the_rest_sums_them_up():
    config = teams({"environment": {"actions": "discrete"}, "learner": {"entropy_coefficient": 0.1}})
    _, networks, learner, batch = make(config)
    learners = [
        alone(config, batch, part, **{other: False})
        for part, other in zip(networks.parts, ("prey", "hunters"), strict=True)
    ]
    torch.manual_seed(0)
    losses = learner.update(batch)
    results = []
    for single, share in learners:
        torch.manual_seed(0)
        results.append(single.update(share))
    names = [name for name in vars(results[0]) if name not in ("epochs", "learning_rate", "by_group")]
    for group, result in zip(("hunter", "prey"), results, strict=True):
        for name in names:
            assert losses.by_group[f"{name}/{group}"] == pytest.approx(getattr(result, name), rel=1e-6), name
    hunters, prey = results
    assert losses.loss_policy == pytest.approx(hunters.loss_policy + prey.loss_policy, abs=1e-6)
    assert losses.entropy == pytest.approx((2 * hunters.entropy + prey.entropy) / 3)
    assert losses.kl == pytest.approx((2 * hunters.kl + prey.kl) / 3, rel=1e-4)
    assert losses.explained_variance == pytest.approx((hunters.explained_variance + prey.explained_variance) / 2)


def test_agents_in_groups_of_one_learn_like_agents_that_share_nothing():
    """Adam's steps do not depend on the scale of a gradient, and the mean over two agents halves it."""
    changes = {
        "environment": {"scenario": "tests.support.scenarios:PushRight", "scenario_kwargs": {}},
        "networks": {"critic": "own", "share_policy": False},
        "learner": {"advantage_normalisation": "agent", "max_gradient_norm": 1e9},
    }
    config = override(from_dict(TINY), changes)
    _, networks, learner, batch = make(config)
    split = {"groups": {"first": ["agent_0"], "second": ["agent_1"]}}
    environment = make_environment(
        override(config, {"environment": split}).environment, 1, 0, Stream.TRAINING, CPU
    )
    grouped = make_networks(config.networks, environment)
    for agent, part in enumerate(grouped.parts):
        own = {
            name.replace(f"networks.{agent}.", "networks.0."): value
            for name, value in networks.modules().state_dict().items()
            if f"networks.{agent}." in name
        }
        part.modules().load_state_dict(own)
    other = Learner(config.learner, grouped, config.collection.num_iterations)
    copy = batch.clone()
    for one, of_one in ((learner, batch), (other, copy)):
        torch.manual_seed(0)
        one.update(of_one)
    torch.testing.assert_close(copy[VALUE], batch[VALUE])
    torch.testing.assert_close(copy[LOG_PROB], batch[LOG_PROB])
    state = environment.reset()
    torch.testing.assert_close(
        grouped.critic(state.clone())[VALUE], networks.critic(state.clone())[VALUE], rtol=1e-3, atol=1e-4
    )


def test_critics_learn_the_known_values_of_groups_with_other_rewards():
    """A frame pays a hunter 1 and costs the prey 300. With a discount of 0.5, values are 2 and -600.

    Episodes are truncated, after which values bootstrap.
    """
    config = override(
        from_dict(TINY),
        {
            "environment": {"scenario": "tests.support.scenarios:Payday"},
            "networks": {"normalise_values": True},
            "learner": {"discount": 0.5, "gae_lambda": 0.5, "learning_rate": 0.02, "epochs": 5},
            "collection": {"total_frames": 120 * 12},
        },
    )
    environment, networks, _ = trained(config)
    values = networks.critic(environment.reset())[VALUE].squeeze(-1).mean(0)
    torch.testing.assert_close(values, torch.tensor([2.0, -600.0, 2.0]), rtol=0.05, atol=0)


def trained(config):
    """Train from scratch; return the environment, the networks and the last batch."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = make_environment(config.environment, 6, 0, Stream.TRAINING, CPU)
        networks = make_networks(config.networks, environment)
        learner = Learner(config.learner, networks, config.collection.num_iterations)
        for batch in batches(environment, networks.policy, config.collection):
            learner.update(batch)
    return environment, networks, batch


def test_opponents_learn_from_their_own_rewards_whatever_the_scale():
    config = teams(
        {
            "networks": {"normalise_values": True},
            "learner": {"learning_rate": 0.02, "epochs": 4},
            "collection": {"total_frames": 120 * 7},
        },
        prey_scale=100.0,
    )
    _, _, batch = trained(config)
    pushes = batch[ACTION][..., 0].mean((0, 1))
    assert (pushes[[0, 2]] > 0.4).all(), "hunters push to the right, up to 1"
    assert pushes[1] < -0.2, "the prey pushes to the left, up to -0.5"


def test_padding_changes_neither_actions_nor_values_nor_losses():
    for critic in ("own", "central"):
        _, networks, learner, batch = make(teams({"networks": {"critic": critic}}))
        frames = prepare(learner, batch)
        disturbed = frames.clone()
        disturbed[OBSERVATION][:, 1, 2:] = 7.0  # the prey sees two features
        disturbed[ACTION][:, [0, 2], 2:] = 7.0  # the hunters' actions have two components
        for loss in learner._losses:
            for key, value in loss(dict(frames.items(True, True))).items():
                assert torch.equal(value, loss(dict(disturbed.items(True, True)))[key]), key
        for part in networks.parts:
            torch.manual_seed(0)
            actions = part.policy(observed(frames[OBSERVATION]))[ACTION]
            torch.manual_seed(0)
            assert torch.equal(part.policy(observed(disturbed[OBSERVATION]))[ACTION], actions)


def test_central_critic_of_each_group_sees_the_agents_of_all_groups_and_an_own_critic_only_its_agent():
    for critic, sees_all in (("central", True), ("own", False)):
        config = teams({"networks": {"critic": critic}})
        environment = make_environment(config.environment, 5, 0, Stream.TRAINING, CPU)
        networks = make_networks(config.networks, environment)
        state = environment.reset()
        plain = networks.critic(state.clone())[VALUE]
        for agent in range(3):
            disturbed = state.clone()
            disturbed[OBSERVATION][:, agent, 0] += 1.0
            changed = (networks.critic(disturbed)[VALUE] != plain).all(0).squeeze(-1)
            assert changed.tolist() == [sees_all or other == agent for other in range(3)]


def test_largest_divergence_of_a_group_ends_the_epochs():
    """The hunters' policy does not change, since their advantages are 0; so the mean over agents is lower."""
    changes = {"learner": {"epochs": 50, "learning_rate": 0.01, "advantage_normalisation": "none"}}
    _, _, learner, batch = make(teams(changes))
    update = Learner(learner.config, learner.networks, 3)
    update._estimate(batch)
    estimated = batch[ADVANTAGE].clone()
    estimated[..., [0, 2], :] = 0.0

    def run(target_kl):
        config = override(teams(changes), {"learner": {"target_kl": target_kl}}).learner
        _, _, learner, batch = make(teams(changes))
        limited = Learner(config, learner.networks, 3)
        limited._gae = lambda batch: batch.set(ADVANTAGE, estimated).set(("agents", "value_target"), estimated)
        torch.manual_seed(0)
        return limited.update(batch)

    free = run(0.0)
    assert free.epochs == 50
    assert free.by_group["kl/hunter"] < 1e-6
    limit = 0.6 * free.by_group["kl/prey"]
    assert free.kl < limit < free.by_group["kl/prey"]
    assert run(limit).epochs < 50


def test_error_names_the_group_whose_loss_is_not_finite():
    _, _, learner, batch = make(teams())
    batch[next_key(REWARD)][0, 0, 1] = math.inf
    with pytest.raises(NonFiniteLoss, match="loss_critic/prey") as error:
        learner.update(batch)
    assert "hunter" not in str(error.value)
