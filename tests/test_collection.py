import pytest
import torch

from mappo.collection import NonFiniteObservation, collect
from mappo.config import CollectionConfig, EnvironmentConfig, NetworksConfig
from mappo.environment import DONE, OBSERVATION, STEP_COUNT, Stream, make_environment
from mappo.networks import make_networks
from tests.conftest import CPU


def batches(config, max_episode_frames=7):
    environment = make_environment(
        EnvironmentConfig(scenario="navigation", max_episode_frames=max_episode_frames),
        config.num_envs,
        0,
        Stream.TRAINING,
        CPU,
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    return list(collect(environment, policy, config))


def test_batches_are_environments_by_time_and_cover_the_frames_asked_for():
    collected = batches(CollectionConfig(num_envs=4, rollout_frames=5, total_frames=41))
    assert [batch.shape for batch in collected] == [(4, 5)] * 3


def test_a_batch_continues_the_one_before():
    collected = batches(CollectionConfig(num_envs=4, rollout_frames=5, total_frames=60))
    whole = torch.cat(collected, dim=1)
    ended = whole["next", DONE][:, :-1, 0]
    seen, following = whole["next", OBSERVATION][:, :-1], whole[OBSERVATION][:, 1:]
    assert torch.equal(seen[~ended], following[~ended])
    assert torch.equal(whole[STEP_COUNT][0, :, 0], torch.arange(15) % 7)


def test_an_earlier_batch_is_not_overwritten_by_a_later_one():
    first, second = batches(CollectionConfig(num_envs=4, rollout_frames=5, total_frames=40))
    assert not torch.equal(first[OBSERVATION], second[OBSERVATION])


def test_observation_that_is_not_finite_stops_collection_naming_the_agent():
    environment = make_environment(
        EnvironmentConfig(scenario="tests.scenarios:NanObservation"), 3, 0, Stream.TRAINING, CPU
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    batches = collect(environment, policy, CollectionConfig(num_envs=3, rollout_frames=20, total_frames=60))
    with pytest.raises(NonFiniteObservation, match="feature 0 of the observation of agent 0 is nan"):
        next(batches)
    policy(environment.reset().apply(torch.nan_to_num))  # the guard is gone
    assert not policy._forward_pre_hooks
