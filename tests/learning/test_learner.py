import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from mappo.config import LearnerConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.groups import Group
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NonFiniteLoss
from mappo.learning.learner import (
    ADVANTAGE,
    LOG_PROB,
    LOSS_INPUTS,
    VALUE_TARGET,
    Learner,
    explained_variance,
    standardise,
)
from mappo.learning.networks import VALUE, Critic, GroupNetworks, Networks, make_networks
from tests.conftest import CPU, counted_waits, endless
from tests.support.runs import batches


def make(config, update="plain"):
    """Return the environment, the networks, the learner and the first batch of a configuration."""
    with private_random_streams(config.seed, Stream.TRAINING, CPU):
        environment = make_environment(
            config.environment, config.collection.num_envs, config.seed, Stream.TRAINING, CPU
        )
        networks = make_networks(config.networks, environment)
        batch = next(batches(environment, networks.player, config.collection))
    learner = Learner(config.learner, networks, config.collection.num_iterations, update=update)
    return environment, networks, learner, batch


def make_policy(num_features):
    """Return a shared policy for observations of `num_features` features and two action values."""
    environment = make_environment(endless().environment, 1, 0, Stream.TRAINING, CPU)
    assert environment.full_observation_spec_unbatched[OBSERVATION].shape[-1] == num_features
    return make_networks(endless().networks, environment).policy


def prepare(learner, batch):
    """Return the frames that `learner.update` makes from a batch before it shuffles them."""
    learner._estimate(batch)
    return learner._prepare_frames(batch)


def tensors(minibatch, keys=LOSS_INPUTS):
    """Return the arguments of a step."""
    return [minibatch[key].clone() for key in keys]


def numbered(frames):
    """Replace the observations of frames by the frames' numbers."""
    return frames.set(OBSERVATION, torch.arange(len(frames)))


def observation_is_value():
    """Return a critic that uses the only feature of an agent's observation as the agent's value."""
    critic = Critic(torch.nn.Identity(), torch.nn.Identity(), moments=None, is_central=True)
    return TensorDictModule(critic, in_keys=[OBSERVATION], out_keys=[VALUE])


def test_advantages_equal_a_hand_calculation_with_truncation_and_termination(tiny):
    """The batch has one environment, two agents and five frames; discount and lambda are 0.5.

    The values of agent 0 are V = 1, 2, 3, 4, 5, and its rewards are 1; those of agent 1 are twice as large.
    Frame 2 terminates (no bootstrap, trace cut). Frame 3 is truncated (bootstrap from the last value 10,
    trace cut). The batch ends after frame 5 (bootstrap from 6).
    """
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    next_value = torch.tensor([2.0, 9.0, 10.0, 5.0, 6.0])
    terminated = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool)
    done = torch.tensor([0, 1, 1, 0, 0], dtype=torch.bool)
    scale = torch.tensor([1.0, 2.0])

    def per_agent(values):
        return (values[:, None] * scale).reshape(1, 5, 2, 1)

    batch = TensorDict(
        {
            OBSERVATION: per_agent(value),
            ACTION: torch.zeros(1, 5, 2, 2),
            "next": {
                "agents": {"observation": per_agent(next_value), "reward": per_agent(torch.ones(5))},
                DONE: done.reshape(1, 5, 1),
                TERMINATED: terminated.reshape(1, 5, 1),
            },
        },
        batch_size=[1, 5],
    )
    critic = observation_is_value()
    policy = make_policy(num_features=1)
    networks = Networks.of([GroupNetworks(Group("agents", (0, 1), 1, 2), policy, critic)])
    config = LearnerConfig(discount=0.5, gae_lambda=0.5, advantage_normalisation="none")
    frames = prepare(Learner(config, networks, num_iterations=1), batch)

    # delta = reward + 0.5 next V (0 after a termination) - V
    # advantage = delta + 0.25 next advantage (0 after the end of an episode)
    delta = [1 + 1.0 - 1, 1 - 2.0, 1 + 5.0 - 3, 1 + 2.5 - 4, 1 + 3.0 - 5]
    advantage = [
        delta[0] + 0.25 * delta[1],
        delta[1],
        delta[2],
        delta[3] + 0.25 * delta[4],
        delta[4],
    ]
    expected = torch.tensor(advantage)[:, None, None] * scale[:, None]
    assert torch.allclose(frames[ADVANTAGE], expected)
    assert torch.allclose(frames[VALUE_TARGET], expected + per_agent(value)[0])


def weights_of(module):
    """Return the weights and biases of the layers of a network, as numpy arrays of 64 bits."""
    return [
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in module.modules()
        if isinstance(layer, torch.nn.Linear)
    ]


@pytest.mark.parametrize("share_policy", [True, False])
def test_own_critic_learns_what_numpy_computes_from_one_agents_observations(tiny, share_policy):
    """Values, advantages, targets and the critic's loss are computed again, agent by agent and frame by frame."""
    config = override(
        tiny,
        {
            "networks": {"critic": "own", "share_policy": share_policy},
            "learner": {
                "discount": 0.9,
                "gae_lambda": 0.8,
                "advantage_normalisation": "none",
                "minibatch_frames": 120,
            },
        },
    )
    _, networks, learner, batch = make(config)
    network = networks.critic.module.network

    def value_of(agent, observations):
        values = observations.double().numpy()
        *hidden, last = weights_of(network if share_policy else network.networks[agent])
        for weight, bias in hidden:
            values = np.tanh(values @ weight.T + bias)
        return (values @ last[0].T + last[1])[..., 0]

    advantages, targets = np.zeros((2, 6, 20, 2))
    for agent in range(2):
        value = value_of(agent, batch[OBSERVATION][:, :, agent])  # [envs, time]
        next_value = value_of(agent, batch["next", *OBSERVATION][:, :, agent])
        reward = batch["next", *REWARD][:, :, agent, 0].double().numpy()
        done, terminated = (batch["next", key][..., 0].numpy() for key in (DONE, TERMINATED))
        following = np.zeros(6)
        for time in reversed(range(20)):
            bootstrap = 0.9 * np.where(terminated[:, time], 0, next_value[:, time])
            delta = reward[:, time] + bootstrap - value[:, time]
            following = delta + 0.9 * 0.8 * np.where(done[:, time], 0, following)
            advantages[:, time, agent] = following
        targets[:, :, agent] = value + advantages[:, :, agent]
    frames = prepare(learner, batch)
    assert done.any()
    assert frames[ADVANTAGE][..., 0].numpy() == pytest.approx(advantages.reshape(120, 2), abs=1e-5)
    assert frames[VALUE_TARGET][..., 0].numpy() == pytest.approx(targets.reshape(120, 2), abs=1e-5)
    loss = learner._losses[0].loss(frames)["loss_critic"]
    assert loss.item() == pytest.approx((advantages**2).mean(), rel=1e-4)


def test_losses_equal_the_formulas_of_the_paper_on_a_changed_policy(tiny):
    """The formulas are the clipped surrogate (Schulman et al. 2017, equation 7) and the values' squared error."""
    config = override(tiny, {"learner": {"clip_epsilon": 0.1, "value_coefficient": 0.5}})
    _, networks, learner, batch = make(config)
    frames = prepare(learner, batch)
    with torch.no_grad():
        for parameter in networks.modules().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        log_prob = networks.policy.get_dist(frames.select(OBSERVATION)).log_prob(frames[ACTION])
        ratio = (log_prob - frames[LOG_PROB]).exp().unsqueeze(-1)
        values = networks.critic(frames.select(OBSERVATION))[VALUE]
        output = learner._losses[0].loss(frames)
    advantage = frames[ADVANTAGE]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
    assert output["loss_objective"].item() == pytest.approx(-surrogate.mean().item(), rel=1e-4)
    squared = (values - frames[VALUE_TARGET]).square().mean().item()
    assert output["loss_critic"].item() == pytest.approx(0.5 * squared, rel=1e-4)
    outside = ((ratio < 0.9) | (ratio > 1.1)).float().mean().item()
    assert outside > 0.1
    assert output["clip_fraction"].item() == pytest.approx(outside, abs=0.01)


def test_first_minibatch_has_ratio_one(tiny):
    config = override(tiny, {"learner": {"epochs": 1, "minibatch_frames": 120, "learning_rate": 1e-9}})
    _, _, learner, batch = make(config)
    losses = learner.update(batch)
    assert losses.clip_fraction == 0
    assert losses.kl == pytest.approx(0, abs=1e-6)
    assert losses.loss_policy == pytest.approx(0, abs=1e-5)  # minus the mean of standardised advantages


def test_first_minibatch_has_ratio_one_when_actions_saturate(tiny):
    """For large means, tanh rounds to its bounds in float32, so its argument cannot be found from the action."""
    config = override(tiny, {"learner": {"epochs": 1, "minibatch_frames": 120, "learning_rate": 1e-9}})
    environment, networks, learner, _ = make(config)
    with torch.no_grad():
        for parameter in networks.policy.parameters():
            parameter.mul_(20)
    batch = next(batches(environment, networks.policy, config.collection))
    losses = learner.update(batch)
    assert losses.clip_fraction == 0
    assert losses.kl == pytest.approx(0, abs=1e-4)


def values_after_training(config):
    environment, networks, learner, _ = make(config)
    with private_random_streams(0, Stream.TRAINING, CPU):
        for batch in batches(environment, networks.policy, config.collection):
            learner.update(batch)
    return networks.critic(environment.reset())[VALUE]


@pytest.mark.parametrize("critic", ["central", "own"])
def test_endless_task_is_worth_one_over_one_minus_discount(critic):
    """An endless reward of 1 is worth 10 at discount 0.9 if values bootstrap at the time limit of 20 frames."""
    config = override(endless(), {"networks": {"critic": critic}})
    assert torch.allclose(values_after_training(config), torch.tensor(10.0), rtol=0.03)


def test_terminating_task_is_worth_the_rewards_before_its_end():
    """Every episode terminates after one frame, so the value is the reward of this frame."""
    config = endless(scenario_kwargs={"terminate_after": 1})
    config = override(config, {"collection": {"total_frames": 4_000}})
    assert torch.allclose(values_after_training(config), torch.tensor(1.0), rtol=0.03)


@pytest.mark.parametrize("minibatch_frames", [120, 50, 7, 1])
def test_every_epoch_visits_every_frame_once_including_the_remainder(tiny, minibatch_frames):
    config = override(tiny, {"learner": {"epochs": 2, "minibatch_frames": minibatch_frames}})
    _, _, learner, batch = make(config)
    frames = numbered(prepare(learner, batch))
    for _ in range(2):
        minibatches = [minibatch[0] for minibatch in learner._shuffled(frames)]
        assert torch.equal(torch.cat(minibatches).sort().values, torch.arange(120))
        assert {len(numbers) for numbers in minibatches[:-1]} <= {minibatch_frames}
    assert len(minibatches) == math.ceil(120 / minibatch_frames)


def test_epochs_are_shuffled_differently(tiny):
    _, _, learner, batch = make(tiny)
    frames = numbered(prepare(learner, batch))
    first, second = ([minibatch[0].tolist() for minibatch in learner._shuffled(frames)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("key", "term"), [(("next", *REWARD), "loss_critic"), (ACTION, "loss_policy")])
def test_non_finite_loss_raises_before_the_optimiser_steps_and_names_the_term(tiny, key, term):
    _, networks, learner, batch = make(tiny)
    batch[key][0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=f"{term} = nan"):
        learner.update(batch)
    assert all(value.isfinite().all() for value in networks.modules().state_dict().values())


def test_non_finite_loss_in_the_only_minibatch_changes_no_parameter(tiny):
    config = override(tiny, {"learner": {"minibatch_frames": 120}})
    _, networks, learner, batch = make(config)
    initial = {name: value.clone() for name, value in networks.modules().state_dict().items()}
    batch["next", *REWARD][0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss):
        learner.update(batch)
    parameters = networks.modules().state_dict()
    assert all(torch.equal(initial[name], parameters[name]) for name in initial)


def test_parameters_stay_those_of_the_last_finite_step(tiny):
    """Later steps with finite losses change nothing either, because the check comes after all steps."""
    _, networks, learner, batch = make(tiny)
    frames = prepare(learner, batch)
    finite, non_finite = frames[:40], frames[40:80].clone()
    non_finite[VALUE_TARGET][0] = float("nan")
    learner._step(*tensors(finite))
    parameters = {name: value.clone() for name, value in networks.modules().state_dict().items()}
    optimiser_state = {name: value.clone() for name, value in learner.optimiser_tensors().items()}
    steps = [learner._step(*tensors(minibatch))[0] for minibatch in (non_finite, finite)]
    assert all(torch.equal(value, parameters[name]) for name, value in networks.modules().state_dict().items())
    assert all(torch.equal(value, optimiser_state[name]) for name, value in learner.optimiser_tensors().items())
    with pytest.raises(NonFiniteLoss, match="loss_critic = nan, gradient_norm_critic = nan; training stopped"):
        learner._require_finite(steps)


def test_number_of_waits_for_a_gpu_does_not_depend_on_the_number_of_steps(tiny, monkeypatch):
    """Once its functions are traced, every update reads the same number of values from the device."""
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)
    waits = {}
    for minibatch_frames in (20, 40, 120):
        _, _, learner, batch = make(override(tiny, {"learner": {"minibatch_frames": minibatch_frames}}))
        learner.update(batch.clone())  # traces the functions, which also reads numbers
        with counted_waits() as mode:
            learner.update(batch)
        waits[minibatch_frames] = mode.count
    assert len(set(waits.values())) == 1, waits


def test_entropy_equals_that_of_the_distribution(tiny):
    """The estimate -log pi(a|o) over many frames agrees with an estimate from fresh samples."""
    config = override(tiny, {"collection": {"num_envs": 100, "rollout_frames": 20, "total_frames": 1}})
    _, networks, learner, batch = make(config)
    with torch.no_grad():
        distribution = networks.policy.get_dist(batch.select(OBSERVATION))
        fresh = -distribution.log_prob(distribution.sample()).mean().item()
    assert learner.update(batch).entropy == pytest.approx(fresh, abs=0.05)


def test_entropy_bonus_keeps_the_policy_more_random():
    def last_losses(coefficient):
        learner = {"entropy_coefficient": coefficient, "learning_rate": 0.002}
        config = override(endless(), {"learner": learner, "collection": {"total_frames": 2_400}})
        environment, networks, learner, _ = make(config)
        with private_random_streams(0, Stream.TRAINING, CPU):
            for batch in batches(environment, networks.policy, config.collection):
                losses = learner.update(batch)
        return losses

    without_bonus, with_bonus = last_losses(0.0), last_losses(0.1)
    assert with_bonus.entropy > without_bonus.entropy
    assert with_bonus.loss_entropy == pytest.approx(-0.1 * with_bonus.entropy, abs=0.05)
    assert without_bonus.loss_entropy == 0


def test_gradients_of_actor_and_critic_are_clipped_separately(tiny):
    config = override(tiny, {"learner": {"max_gradient_norm": 1e-3, "minibatch_frames": 120, "epochs": 1}})
    _, networks, learner, batch = make(config)
    losses = learner.update(batch)
    assert losses.gradient_norm_policy > 1e-3
    for network in (networks.policy, networks.critic):
        norm = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm()
        assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [0.8, 0.8, 0.8, 0.8]), ("linear", [0.8, 0.6, 0.4, 0.2])]
)
def test_learning_rate_follows_its_schedule_over_the_run(tiny, schedule, expected):
    changes = {"learning_rate": 8e-5, "learning_rate_schedule": schedule}
    config = override(tiny, {"learner": changes, "collection": {"total_frames": 480}})
    _, _, learner, batch = make(config)
    for rate in expected:
        losses = learner.update(batch.clone())
        assert learner.optimiser.param_groups[0]["lr"] == losses.learning_rate == pytest.approx(rate * 1e-4)


@pytest.mark.parametrize("kind", ["none", "minibatch", "batch", "agent"])
def test_advantages_are_standardised_over_the_configured_group(tiny, kind):
    config = override(tiny, {"learner": {"advantage_normalisation": kind, "epochs": 1}})
    _, _, learner, batch = make(config)
    unchanged = override(config, {"learner": {"advantage_normalisation": "none"}}).learner
    raw = Learner(unchanged, learner.networks, num_iterations=1)
    plain = prepare(raw, batch.clone())[ADVANTAGE]
    prepared = prepare(learner, batch.clone())[ADVANTAGE]
    minibatches = []
    gradients, index = learner._gradients, LOSS_INPUTS.index(ADVANTAGE)
    differentiate = gradients._differentiate

    def record_advantages(*minibatch):
        minibatches.append(minibatch[index].clone())
        return differentiate(*minibatch)

    gradients._differentiate = record_advantages
    learner.update(batch.clone())
    groups = {"none": [], "minibatch": minibatches, "batch": [prepared], "agent": list(prepared.unbind(-2))}
    for values in groups[kind]:
        assert values.mean().item() == pytest.approx(0, abs=1e-5)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    if kind in ("none", "minibatch"):
        assert torch.equal(prepared, plain)


def test_standardise_of_one_value_is_zero():
    assert standardise(torch.full((1, 1, 1), 3.0)).item() == 0


def test_explained_variance_is_one_for_perfect_and_zero_for_constant_values():
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.zeros(3), target) == pytest.approx(0)
    assert explained_variance(-target, target) == pytest.approx(-3)
    assert math.isnan(explained_variance(target, torch.ones(3)))


def test_critic_with_standardised_values_predicts_in_units_of_the_reward():
    """An endless reward of 1000 is worth 10,000, which a critic without standardised values does not reach."""
    config = override(
        endless(scenario_kwargs={"reward": 1_000.0}),
        {"networks": {"normalise_values": True}, "collection": {"total_frames": 12_000}},
    )
    assert torch.allclose(values_after_training(config), torch.tensor(10_000.0), rtol=0.05)
    plain = override(config, {"networks": {"normalise_values": False}, "collection": {"total_frames": 2_000}})
    assert (values_after_training(plain) < 5_000).all()


def test_critic_learns_targets_standardised_by_moments_that_include_them(tiny):
    """Yu et al. (2022) estimate advantages in reward units, update the moments, and then standardise both."""
    config = override(tiny, {"networks": {"normalise_values": True}, "learner": {"value_loss": "l2"}})
    _, networks, learner, batch = make(config)
    with torch.no_grad():
        estimated = batch.clone()
        learner._estimate(estimated)
    target = estimated[VALUE_TARGET]
    frames = prepare(learner, batch)
    standardised = (target - target.mean()) / target.std(correction=0).clamp_min(0.1)
    assert torch.allclose(frames[VALUE_TARGET], standardised.flatten(0, 1), atol=1e-4)
    prediction = networks.critic.module.predict(frames[OBSERVATION])
    expected = (prediction - frames[VALUE_TARGET]).square().mean().item()
    assert learner._losses[0].loss(frames)["loss_critic"].item() == pytest.approx(expected, rel=1e-4)
    restored = networks.critic(frames.select(OBSERVATION))[VALUE]
    deviation = target.std(correction=0).clamp_min(0.1)
    assert torch.allclose(restored, prediction * deviation + target.mean(), atol=1e-4)


def test_observations_are_standardised_by_the_moments_of_all_previous_batches(tiny):
    config = override(tiny, {"networks": {"normalise_observations": True}})
    environment, networks, learner, _ = make(config)
    observations = []
    with private_random_streams(0, Stream.TRAINING, CPU):
        for batch in batches(environment, networks.policy, config.collection):
            observations.append(batch[OBSERVATION].flatten(0, 2))
            losses = learner.update(batch)
    values = torch.cat(observations)
    for network in (networks.policy.module[0].module[0], networks.critic.module.observation_normaliser):
        expected = (values - values.mean(0)) / values.var(0, correction=0).clamp_min(1e-2).sqrt()
        standardised = network(values.unflatten(0, (-1, 2))).flatten(0, 1)
        assert torch.allclose(standardised, expected, atol=1e-3)
    assert losses.kl != 0


@pytest.mark.parametrize(
    "networks", [{"normalise_observations": True}, {"normalise_values": True}, {"share_policy": False}]
)
def test_first_minibatch_of_a_later_batch_has_ratio_one(tiny, networks):
    learner = {"epochs": 1, "minibatch_frames": 120, "learning_rate": 1e-9}
    config = override(tiny, {"networks": networks, "learner": learner})
    environment, networks, learner, _ = make(config)
    for batch in batches(environment, networks.policy, config.collection):
        losses = learner.update(batch)
        assert losses.clip_fraction == 0
        assert losses.kl == pytest.approx(0, abs=1e-6)


def test_clipped_values_equal_the_formula_of_the_paper(tiny):
    """The loss takes the larger error of the value and of the value clipped around the old one.

    Every target is 1 above the old value. A new value that is 0.5 above the old one has an error of 0.5, its
    clipped value an error of 0.95. Source: Yu et al. (2022), section 3.
    """
    config = override(tiny, {"learner": {"value_clip_epsilon": 0.05}})
    _, networks, learner, batch = make(config)
    frames = prepare(learner, batch)
    frames[VALUE_TARGET] = frames[VALUE] + 1
    with torch.no_grad():
        networks.critic.module.network[-1].bias.add_(0.5)
        assert learner._losses[0].loss(frames)["loss_critic"].item() == pytest.approx(0.95**2, rel=1e-4)
        networks.critic.module.network[-1].bias.sub_(1.0)
        assert learner._losses[0].loss(frames)["loss_critic"].item() == pytest.approx(1.5**2, rel=1e-4)


def test_values_are_clipped_around_the_critics_own_predictions(tiny):
    """The predictions are in standardised units, also when the moments have changed since the prediction."""
    config = override(tiny, {"networks": {"normalise_values": True}, "learner": {"value_clip_epsilon": 0.2}})
    environment, networks, learner, _ = make(config)
    for batch in batches(environment, networks.policy, config.collection):
        with torch.no_grad():
            predicted = networks.critic.module.predict(batch[OBSERVATION])
        frames = prepare(learner, batch.clone())
        assert torch.allclose(frames[VALUE], predicted.flatten(0, 1), atol=1e-5)
        networks.critic.module.moments.update(torch.full((10, 1), 100.0))


def test_target_kl_has_the_effect_of_fewer_epochs(tiny):
    def update(**learner):
        _, networks, learner, batch = make(override(tiny, {"learner": {"learning_rate": 0.01, **learner}}))
        with private_random_streams(1, Stream.TRAINING, CPU):
            losses = learner.update(batch)
        return losses, networks.modules().state_dict()

    stopped, parameters = update(epochs=5, target_kl=1e-6)
    short, expected = update(epochs=1)
    full, _ = update(epochs=5, target_kl=100.0)
    assert (stopped.epochs, short.epochs, full.epochs) == (1, 1, 5)
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_policy_learns_only_from_its_agent_when_policies_are_not_shared(tiny):
    config = override(tiny, {"networks": {"share_policy": False}})
    _, networks, learner, batch = make(config)
    frames = prepare(learner, batch)
    with torch.no_grad():
        frames[ADVANTAGE][:, 0] = 0
    learner._losses[0].loss(frames)["loss_objective"].backward()
    gradients = [
        sum(parameter.grad.abs().sum().item() for parameter in actor.parameters())
        for actor in networks.policy.module[0].module[1].networks
    ]
    assert gradients[0] == 0
    assert gradients[1] > 0


@pytest.mark.parametrize(
    ("actions", "share_policy"),
    [("continuous", True), ("discrete", True), ("multi-discrete", True), ("continuous", False)],
)
def test_learns_to_move_right_and_to_say_the_second_word(actions, share_policy):
    """The task rewards force to the right and the second of three words; random actions earn about 1/3."""
    config = override(
        endless(),
        {
            "environment": {"scenario": "tests.support.scenarios:MoveAndSpeak", "actions": actions},
            "networks": {"share_policy": share_policy},
            "learner": {"advantage_normalisation": "minibatch", "entropy_coefficient": 1e-3},
            "collection": {"total_frames": 6_000},
        },
    )
    environment, networks, learner, batch = make(config)
    initial_reward = batch["next", *REWARD].mean().item()
    with private_random_streams(0, Stream.TRAINING, CPU):
        for batch in batches(environment, networks.policy, config.collection):
            assert learner.update(batch).entropy < 10
    final_reward = batch["next", *REWARD].mean().item()
    assert initial_reward < 0.6
    assert final_reward > 0.85
