import dataclasses

import pytest
import torch

from mappo.checkpoint import Checkpoint, CheckpointError
from mappo.config import EnvironmentConfig, EvaluationConfig, config_hash, override
from mappo.environment import REWARD, Stream, make_environment, private_random_streams
from mappo.evaluate import NonFiniteReturn, evaluate, play_episodes
from mappo.networks import make_networks
from tests.conftest import CPU, endless

SEEDS = EvaluationConfig(seeds=(1, 2), episodes_per_seed=3)


def make_checkpoint(config):
    with private_random_streams(config.seed, Stream.TRAINING, CPU):
        environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
        networks = make_networks(config.networks, environment)
    return Checkpoint(config, 0, 0, dict(networks.modules().state_dict())), networks.policy


def test_returns_of_the_endless_task_are_its_length():
    returns = play_episodes(None, endless(max_episode_frames=17).environment, SEEDS, CPU)
    assert returns.episode_returns == [17.0] * 6
    assert returns.episode_frames_mean == 17


def test_frames_after_the_end_of_an_episode_do_not_count():
    environment = endless(scenario_kwargs={"terminate_after": 4}).environment
    returns = play_episodes(None, environment, SEEDS, CPU)
    assert returns.episode_returns == [4.0] * 6
    assert returns.episode_frames_mean == 4


def test_rewards_after_the_end_do_not_count_even_if_they_are_nan():
    environment = EnvironmentConfig(
        scenario="tests.scenarios:NanReward", scenario_kwargs={"terminate_after": 9}, max_episode_frames=20
    )
    assert play_episodes(None, environment, SEEDS, CPU).episode_returns == [9.0] * 6


def test_returns_equal_a_rollout_of_the_same_seed(tiny):
    config = override(tiny, {"evaluation": {"seeds": [5], "episodes_per_seed": 4}})
    _, policy = make_checkpoint(config)
    returns = play_episodes(policy, config.environment, config.evaluation, CPU)
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with (
        private_random_streams(5, Stream.EVALUATION, CPU),
        set_exploration_type(ExplorationType.DETERMINISTIC),
        torch.no_grad(),
    ):
        environment = make_environment(config.environment, 4, 5, Stream.EVALUATION, CPU)
        rollout = environment.rollout(10, policy)
    expected = rollout["next", *REWARD].mean(2).sum(1).flatten()
    assert returns.episode_returns == pytest.approx(expected.tolist(), abs=1e-5)


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
    config = endless(scenario="tests.scenarios:StartReward", max_episode_frames=1)
    report = evaluate(config, make_checkpoint(config)[0])
    assert report.trained.episode_returns == report.random.episode_returns
    assert len(set(report.trained.episode_returns)) == len(report.trained.episode_returns)


def test_return_that_is_not_finite_is_an_error_naming_seed_and_episode():
    config = endless(scenario="tests.scenarios:NanReward")
    with pytest.raises(NonFiniteReturn, match="the return of episode 0 of seed 1 is nan"):
        evaluate(config, make_checkpoint(config)[0])


def test_report_tells_the_configuration_evaluated_from_the_one_trained(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    other = override(tiny, {"environment": {"max_episode_frames": 5}})
    report = evaluate(other, checkpoint)
    assert (report.config_hash, report.training_config_hash) == (config_hash(other), config_hash(tiny))


def test_checkpoint_of_another_size_is_refused(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluate(override(tiny, {"networks": {"hidden_sizes": [17]}}), checkpoint)


def test_report_says_what_its_intervals_resample(tiny):
    report = dataclasses.asdict(evaluate(tiny, make_checkpoint(tiny)[0]))
    assert "episodes" in report["resampled"]
    trained = report["trained"]
    assert trained["mean"]["low"] <= trained["mean"]["value"] <= trained["mean"]["high"]
    assert len(trained["episode_returns"]) == 8
