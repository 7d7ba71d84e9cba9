"""Check actions whose ranges differ by agent and by component, from the policy's distribution to its export.

In `FixedComponent`, the agents' ranges are (1, 0) and (0.5, 2). The policy of most tests has the location
atanh(0.5) and the deviation 1 for every component, so its most likely actions are half of each range. Numbers in
comments are computed by hand.
"""

import io
import math

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import EvaluationConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, OBSERVATION, REWARD, next_key
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.evaluation.episodes import _fast_steps, _first_episodes, play_episodes
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.making import make_fast_simulation
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.promotion.export import export_policy, trace_policy
from tests.conftest import CPU, endless
from tests.evaluation.test_evaluation import make_checkpoint

HALF = torch.tensor([[0.5, 0.0], [0.25, 1.0]])  # half of each range
CONFIG = override(
    endless(scenario="tests.support.scenarios:FixedComponent"),
    {"environment": {"max_episode_frames": 10}, "learner": {"entropy_coefficient": 1e-3}},
)


def halve(policy):
    """Give a policy the location atanh(0.5) and the deviation 1, whatever it observes."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy.module[0].module[1][-1].bias[:2] = math.atanh(0.5)


@pytest.fixture
def environment():
    with private_random_streams(0, Stream.TRAINING, CPU):
        return make_environment(CONFIG.environment, 3, 0, Stream.TRAINING, CPU)


@pytest.fixture
def policy(environment):
    policy = make_networks(CONFIG.networks, environment).policy
    halve(policy)
    return policy


def test_log_probability_leaves_out_the_component_that_cannot_move(environment, policy):
    distribution = policy.get_dist(environment.reset())
    assert torch.allclose(distribution.deterministic_sample, HALF)
    # The density of a normal distribution at its mean is exp(-0.918939); the slope of tanh is 1 - 0.5 ** 2.
    # strong: -0.918939 - log(1 * 0.75) = -0.631256
    # weak: 2 * -0.918939 - log(0.5 * 0.75) - log(2 * 0.75) = -1.262513
    log_prob = distribution.log_prob(HALF.expand(3, 2, 2))
    assert torch.allclose(log_prob, torch.tensor([-0.631256, -1.262513]), atol=1e-5)


def test_component_that_cannot_move_is_constant_and_the_others_keep_their_ranges(environment, policy):
    distribution = policy.get_dist(environment.reset())
    for sample in (distribution.sample((2_000,)), distribution.rsample((2_000,))):
        largest, smallest = sample.amax((0, 1)), sample.amin((0, 1))
        assert largest[0, 1] == smallest[0, 1] == 0
        assert (largest <= 2 * HALF).all()
        assert (smallest >= -2 * HALF).all()
        assert torch.allclose(largest, 2 * HALF, rtol=0.05)
    sample, log_prob = distribution.rsample_and_log_prob((5,))
    assert torch.allclose(log_prob, distribution.log_prob(sample), atol=1e-4)
    assert (sample[..., 0, 1] == 0).all()


def test_gradients_do_not_depend_on_the_component_that_cannot_move(environment, policy):
    """The second outputs of the network are those of the upward force: only `weak` has one."""
    state = environment.reset()
    distribution = policy.get_dist(state)
    log_prob = distribution.log_prob(torch.tensor([[[0.9, 0.0], [0.1, 0.5]]] * 3))
    bias = policy.module[0].module[1][-1].bias
    strong, weak = (torch.autograd.grad(log_prob[:, agent].sum(), bias, retain_graph=True)[0] for agent in (0, 1))
    assert (strong != 0).tolist() == [True, False, True, False]
    assert (weak != 0).all()


@pytest.mark.parametrize("simulation", ["plain", "fast"])
def test_returns_of_half_the_ranges_are_those_computed_by_hand(policy, simulation):
    """The rewards of a frame are 0.5 + 0 and 0.25 + 1, so ten frames return 8.75 on average over agents."""
    if simulation == "plain":
        episodes = EvaluationConfig(seeds=(1,), episodes_per_seed=3)
        returns, lengths = play_episodes(lambda _: policy, CONFIG, episodes, Stream.EVALUATION)
    else:
        with private_random_streams(1, Stream.EVALUATION, CPU):
            environment = make_environment(CONFIG.environment, 3, 1, Stream.EVALUATION, CPU)
            fast = make_fast_simulation(CONFIG.environment, environment, is_compiled=False)
            returns, lengths = (values.tolist() for values in _first_episodes(_fast_steps(fast, 10), policy, True))
    assert returns == pytest.approx([8.75] * 3)
    assert lengths == [10] * 3


def test_exported_policy_acts_within_the_ranges():
    checkpoint, policy = make_checkpoint(CONFIG)
    halve(policy)  # the checkpoint holds these parameters
    traced = trace_policy(checkpoint)
    actions = torch.export.load(io.BytesIO(export_policy(traced))).module()(torch.zeros(4, 2, 1))
    assert actions.shape == (4, 2, 2)
    assert torch.allclose(actions, HALF)


@pytest.mark.parametrize("is_fast", [False, True], ids=["plain", "fast"])
def test_agents_with_ranges_of_their_own_learn_to_push_with_all_they_have(environment, is_fast):
    """The most that a frame can pay is 1 + 0 and 0.5 + 2, which is 1.75 on average over agents."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        networks = make_networks(CONFIG.networks, environment)
    learner = Learner(CONFIG.learner, networks, num_iterations=8)
    simulation = PlainSimulation(environment)
    if is_fast:
        fast = make_fast_simulation(CONFIG.environment, environment, is_compiled=False)
        simulation = FastEnvironment(fast, environment, CONFIG.environment.max_episode_frames)
    with private_random_streams(0, Stream.TRAINING, CPU):
        carried = simulation.reset()
        for _ in range(8):
            batch, carried = simulation.collect(networks.policy, 100, carried)
            learner.update(batch)
            assert (batch[ACTION][..., 0, 1] == 0).all()
    assert batch[next_key(REWARD)].mean() > 1.0
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        state = networks.policy(environment.reset().select(OBSERVATION))
    assert torch.allclose(state[ACTION], 2 * HALF, rtol=0.4)
