import pytest
import torch

from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import DONE, EPISODE_RETURN, OBSERVATION, REWARD, STEP_COUNT
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NonFiniteObservation
from mappo.fast_simulation.fast_simulation import FastEnvironment, make_fast_simulation
from mappo.learning.networks import make_networks
from tests.conftest import CPU, counted_waits


def batches(count, max_episode_frames=7):
    """So many of 4 environments and 5 frames."""
    environment = make_environment(
        EnvironmentConfig(scenario="navigation", max_episode_frames=max_episode_frames), 4, 0, Stream.TRAINING, CPU
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    carried, collected = environment.reset(), []
    for _ in range(count):
        batch, carried = PlainSimulation(environment).collect(policy, 5, carried)
        collected.append(batch)
    return collected


def test_batches_are_environments_by_time():
    assert [batch.shape for batch in batches(3)] == [(4, 5)] * 3


def test_a_batch_continues_the_one_before():
    collected = batches(3)
    whole = torch.cat(collected, dim=1)
    ended = whole["next", DONE][:, :-1, 0]
    seen, following = whole["next", OBSERVATION][:, :-1], whole[OBSERVATION][:, 1:]
    assert torch.equal(seen[~ended], following[~ended])
    assert torch.equal(whole[STEP_COUNT][0, :, 0], torch.arange(15) % 7)


def test_an_earlier_batch_is_not_overwritten_by_a_later_one():
    first, second = batches(2)
    assert not torch.equal(first[OBSERVATION], second[OBSERVATION])


def test_observation_that_is_not_finite_stops_collection_naming_the_agent():
    environment = make_environment(
        EnvironmentConfig(scenario="tests.support.scenarios:NanObservation"), 3, 0, Stream.TRAINING, CPU
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    with pytest.raises(NonFiniteObservation, match="feature 0 of the observation of agent 0 is nan"):
        PlainSimulation(environment).collect(policy, 20, environment.reset())


def test_what_is_carried_is_what_a_reset_gives_and_no_more():
    """Values are those of the last frame, but for what is not needed to play on."""
    environment = make_environment(EnvironmentConfig(scenario="navigation"), 3, 0, Stream.TRAINING, CPU)
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    start = environment.reset()
    names = set(start.keys(True, True))
    batch, carried = PlainSimulation(environment).collect(policy, 4, start)
    assert set(carried.keys(True, True)) == names
    assert torch.equal(carried[OBSERVATION], batch["next", OBSERVATION][:, -1])
    assert (carried[STEP_COUNT] == 4).all()


def collected_by(fast, seed=0):
    """Two batches of 4 environments, and what is carried after them."""
    with private_random_streams(seed, Stream.TRAINING, CPU):
        config = EnvironmentConfig(scenario="tests.support.scenarios:PushRight", max_episode_frames=7)
        environment = make_environment(config, 4, seed, Stream.TRAINING, CPU)
        policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
        if fast:
            simulation = make_fast_simulation(config, environment, is_compiled=False)
            played = FastEnvironment(simulation, environment, config.max_episode_frames)
        else:
            played = PlainSimulation(environment)
        first, carried = played.collect(policy, 5, played.reset())
        second, carried = played.collect(policy, 5, carried)
    return torch.cat([first, second], dim=1), carried


def test_frames_of_the_fast_simulation_wait_for_no_gpu(monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)
    with private_random_streams(0, Stream.TRAINING, CPU):
        config = EnvironmentConfig(scenario="tests.support.scenarios:PushRight", max_episode_frames=7)
        plain = make_environment(config, 4, 0, Stream.TRAINING, CPU)
        policy = make_networks(NetworksConfig(hidden_sizes=(8,)), plain).policy
        simulation = make_fast_simulation(config, plain, is_compiled=False)
        monkeypatch.setattr(simulation, "_is_waited_for", False)
        environment = FastEnvironment(simulation, plain, 7)
        _, carried = environment.collect(policy, 1, environment.reset())
        waits = {}
        for frames in (5, 15):
            with counted_waits() as mode:
                _, carried = environment.collect(policy, frames, carried)
            waits[frames] = mode.count
    assert waits[15] == waits[5]


def test_fast_simulation_collects_what_the_plain_environment_does():
    """Bit by bit up to the first reset, as both draw the same numbers until then."""
    plain, _ = collected_by(fast=False)
    fast, _ = collected_by(fast=True)
    assert set(plain.keys(True, True)) == set(fast.keys(True, True))
    for key in fast.keys(True, True):
        assert (fast[key].shape, fast[key].dtype) == (plain[key].shape, plain[key].dtype), key
        assert torch.equal(fast[key][:, :7], plain[key][:, :7]), key
    for key in (STEP_COUNT, ("next", STEP_COUNT), DONE, ("next", DONE)):
        assert torch.equal(fast[key], plain[key]), key
    rewards = fast["next", *REWARD][:, 7:].cumsum(1)
    assert torch.allclose(fast["next", *EPISODE_RETURN][:, 7:], rewards)
