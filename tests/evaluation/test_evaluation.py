import dataclasses

import pytest
import torch

from mappo.config import EvaluationConfig, config_hash, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import REWARD
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.simulation_state import SimulationState
from mappo.errors import CheckpointError, NonFiniteObservation, NonFiniteReturn
from mappo.evaluation.episodes import _fast_steps, _first_episodes, _plain_steps, play_episodes
from mappo.evaluation.evaluation import evaluate
from mappo.fast_simulation.making import make_fast_simulation
from mappo.learning.networks import make_networks
from mappo.runs.checkpoint import Checkpoint, Platform
from tests.conftest import CPU, endless

SEEDS = EvaluationConfig(seeds=(1, 2), episodes_per_seed=3)


def play_randomly(config):
    return play_episodes(lambda environment: environment.rand_action, config, SEEDS, Stream.EVALUATION)


def make_checkpoint(config):
    with private_random_streams(config.seed, Stream.TRAINING, CPU):
        environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
        networks = make_networks(config.networks, environment)
    tensors = dict(networks.modules().state_dict())
    return Checkpoint(config, 0, 0, tensors, {}, SimulationState(), "", Platform.current(CPU)), networks.policy


def test_return_of_an_episode_of_the_endless_task_is_its_length():
    assert play_randomly(endless(max_episode_frames=17)) == ([17.0] * 6, [17.0] * 6)


def test_frames_after_the_end_of_an_episode_do_not_count():
    assert play_randomly(endless(scenario_kwargs={"terminate_after": 4})) == ([4.0] * 6, [4.0] * 6)


def test_rewards_after_the_end_do_not_count_even_if_they_are_nan():
    config = endless(scenario="tests.support.scenarios:NanReward", scenario_kwargs={"terminate_after": 9})
    assert play_randomly(config)[0] == [9.0] * 6


@pytest.mark.parametrize("scenario", ["navigation", "dropout"])
def test_returns_and_lengths_are_the_same_in_the_traced_simulation(tiny, scenario):
    config = override(tiny, {"environment": {"scenario": scenario, "max_episode_frames": 40}})
    _, policy = make_checkpoint(config)
    results = []
    for steps_of in (
        _plain_steps,
        lambda environment: _fast_steps(
            make_fast_simulation(config.environment, environment, is_compiled=False), 40
        ),
    ):
        with private_random_streams(5, Stream.EVALUATION, CPU):
            steps = steps_of(make_environment(config.environment, 8, 5, Stream.EVALUATION, CPU))
            results.append(_first_episodes(steps, policy, True))
    plain, traced = results
    assert torch.allclose(plain[0], traced[0], atol=1e-5)
    assert torch.equal(plain[1], traced[1])


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["navigation", "balance", "passage"])
def test_evaluation_in_the_compiled_simulation_gives_the_same_returns(tiny, scenario):
    config = override(tiny, {"environment": {"scenario": scenario, "max_episode_frames": 40}})
    _, policy = make_checkpoint(config)
    plain, fast = (
        play_episodes(lambda _: policy, config, config.evaluation, Stream.EVALUATION, simulation=simulation)
        for simulation in ("plain", "fast")
    )
    assert fast[0] == pytest.approx(plain[0], rel=1e-3, abs=1e-3)
    assert fast[1] == plain[1]


def test_returns_equal_a_rollout_of_the_same_seed(tiny):
    config = override(tiny, {"evaluation": {"seeds": [5], "episodes_per_seed": 4}})
    _, policy = make_checkpoint(config)
    returns, lengths = play_episodes(lambda _: policy, config, config.evaluation, Stream.EVALUATION)
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with (
        private_random_streams(5, Stream.EVALUATION, CPU),
        set_exploration_type(ExplorationType.DETERMINISTIC),
        torch.no_grad(),
    ):
        environment = make_environment(config.environment, 4, 5, Stream.EVALUATION, CPU)
        rollout = environment.rollout(10, policy)
    expected = rollout["next", *REWARD].mean(2).sum(1).flatten()
    assert returns == pytest.approx(expected.tolist(), abs=1e-5)
    assert lengths == [10.0] * 4


def test_report_is_the_same_every_time_and_depends_on_the_seeds(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    report = evaluate(tiny, checkpoint)
    assert evaluate(tiny, checkpoint) == report
    other = evaluate(override(tiny, {"evaluation": {"seeds": [3, 4]}}), checkpoint)
    assert other.trained.episode_returns != report.trained.episode_returns


def test_seeds_do_not_influence_each_other(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    both = evaluate(tiny, checkpoint)
    second = evaluate(override(tiny, {"evaluation": {"seeds": [2]}}), checkpoint)
    for policy in ("trained", "random"):
        assert getattr(both, policy).episode_returns[4:] == getattr(second, policy).episode_returns


def test_sampled_actions_differ_from_the_mode_and_are_repeatable(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    sampled = override(tiny, {"evaluation": {"deterministic": False}})
    report = evaluate(sampled, checkpoint)
    assert report == evaluate(sampled, checkpoint)
    assert report.trained.episode_returns != evaluate(tiny, checkpoint).trained.episode_returns


def test_policies_meet_the_same_initial_states_which_differ_between_seeds():
    config = endless(scenario="tests.support.scenarios:StartReward", max_episode_frames=1)
    report = evaluate(config, make_checkpoint(config)[0])
    assert report.trained.episode_returns == report.random.episode_returns
    assert len(set(report.trained.episode_returns)) == len(report.trained.episode_returns)


def test_return_that_is_not_finite_is_an_error_naming_seed_and_episode():
    config = endless(scenario="tests.support.scenarios:NanReward")
    with pytest.raises(NonFiniteReturn, match="the return of episode 0 of seed 1 is nan"):
        evaluate(config, make_checkpoint(config)[0])


def test_report_distinguishes_the_configurations_of_evaluation_and_training(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    other = override(tiny, {"environment": {"max_episode_frames": 5}})
    report = evaluate(other, checkpoint)
    assert (report.config_hash, report.training_config_hash) == (config_hash(other), config_hash(tiny))


def test_checkpoint_of_another_size_is_refused(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluate(override(tiny, {"networks": {"hidden_sizes": [17]}}), checkpoint)


def test_report_names_the_values_that_its_intervals_resample(tiny):
    report = dataclasses.asdict(evaluate(tiny, make_checkpoint(tiny)[0]))
    assert "episodes" in report["resampled"]
    trained = report["trained"]
    assert trained["mean"]["low"] <= trained["mean"]["value"] <= trained["mean"]["high"]
    assert len(trained["episode_returns"]) == 8


def test_heuristic_policy_of_the_scenario_is_evaluated_on_the_same_episodes():
    """Check that VMAS's heuristic for wheel beats random actions, and that its returns are repeatable."""
    config = endless(scenario="wheel", max_episode_frames=100)
    report = evaluate(config, make_checkpoint(config)[0])
    assert list(report.policies()) == ["random", "heuristic", "trained"]
    assert report.heuristic.mean.value > report.random.mean.high
    assert report.no_heuristic == ""
    assert evaluate(config, make_checkpoint(config)[0]).heuristic == report.heuristic


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"scenario": "dispersion"}, "vmas.scenarios.dispersion defines no HeuristicPolicy"),
        ({"scenario": "swarm", "actions": "discrete"}, "continuous actions"),
        ({"scenario": "tests.support.scenarios:Endless"}, "HeuristicPolicy: ZeroDivisionError: no idea"),
    ],
)
def test_missing_heuristic_is_explained_in_the_report(environment, reason):
    config = endless(max_episode_frames=5, **environment)
    report = evaluate(config, make_checkpoint(config)[0])
    assert report.heuristic is None
    assert reason in report.no_heuristic
    assert list(report.policies()) == ["random", "trained"]


def test_observations_after_the_end_of_an_episode_do_not_reach_the_policy():
    """The observations of SoundRace are NaN after the end, which comes at another time in each environment."""
    config = endless(scenario="tests.support.scenarios:SoundRace", max_episode_frames=40)
    report = evaluate(config, make_checkpoint(config)[0])
    assert len(set(report.trained.episode_returns)) > 1


def test_observation_that_is_not_finite_before_the_end_is_an_error():
    config = endless(scenario="tests.support.scenarios:NanObservation")
    with pytest.raises(NonFiniteObservation, match="of agent 0 is nan in environment 0"):
        evaluate(config, make_checkpoint(config)[0])


@pytest.mark.parametrize(("scenario", "reason"), [("TooFewActions", "actions [64, 2, 1] do not fit")])
def test_heuristic_whose_actions_do_not_fit_is_explained(scenario, reason):
    config = endless(scenario=f"tests.support.heuristics:{scenario}", max_episode_frames=5)
    assert reason in evaluate(config, make_checkpoint(config)[0]).no_heuristic
