import pytest
import torch

from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import DONE, EPISODE_RETURN, OBSERVATION, REWARD, STEP_COUNT
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NonFiniteObservation
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.making import make_fast_simulation
from mappo.learning.networks import make_networks
from tests.conftest import CPU, counted_waits


def batches(count, max_episode_frames=7):
    """Return batches of 4 environments and 5 frames."""
    environment = make_environment(
        EnvironmentConfig(scenario="navigation", max_episode_frames=max_episode_frames), 4, 0, Stream.TRAINING, CPU
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    carried, collected = environment.reset(), []
    for _ in range(count):
        batch, carried = PlainSimulation(environment).collect(policy, 5, carried)
        collected.append(batch)
    return collected


def test_batches_have_the_shape_environments_by_time():
    assert [batch.shape for batch in batches(3)] == [(4, 5)] * 3


def test_batch_continues_the_previous_batch():
    collected = batches(3)
    whole = torch.cat(collected, dim=1)
    done = whole["next", DONE][:, :-1, 0]
    results, starts = whole["next", OBSERVATION][:, :-1], whole[OBSERVATION][:, 1:]
    assert torch.equal(results[~done], starts[~done])
    assert torch.equal(whole[STEP_COUNT][0, :, 0], torch.arange(15) % 7)


def test_later_batch_does_not_overwrite_an_earlier_one():
    first, second = batches(2)
    assert not torch.equal(first[OBSERVATION], second[OBSERVATION])


def test_collection_stops_and_names_the_agent_when_an_observation_is_not_finite():
    environment = make_environment(
        EnvironmentConfig(scenario="tests.support.scenarios:NanObservation"), 3, 0, Stream.TRAINING, CPU
    )
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    with pytest.raises(NonFiniteObservation, match="feature 0 of the observation of agent 0 is nan"):
        PlainSimulation(environment).collect(policy, 20, environment.reset())


def test_carried_tensors_have_the_keys_of_a_reset_and_the_values_of_the_last_frame():
    environment = make_environment(EnvironmentConfig(scenario="navigation"), 3, 0, Stream.TRAINING, CPU)
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
    start = environment.reset()
    names = set(start.keys(True, True))
    batch, carried = PlainSimulation(environment).collect(policy, 4, start)
    assert set(carried.keys(True, True)) == names
    assert torch.equal(carried[OBSERVATION], batch["next", OBSERVATION][:, -1])
    assert (carried[STEP_COUNT] == 4).all()


def collected_by(fast, seed=0):
    """Return two batches of 4 environments and the tensors carried after them."""
    with private_random_streams(seed, Stream.TRAINING, CPU):
        config = EnvironmentConfig(scenario="tests.support.scenarios:PushRight", max_episode_frames=7)
        environment = make_environment(config, 4, seed, Stream.TRAINING, CPU)
        policy = make_networks(NetworksConfig(hidden_sizes=(8,)), environment).policy
        if fast:
            simulation = make_fast_simulation(config, environment, is_compiled=False)
            collecting = FastEnvironment(simulation, environment, config.max_episode_frames)
        else:
            collecting = PlainSimulation(environment)
        first, carried = collecting.collect(policy, 5, collecting.reset())
        second, carried = collecting.collect(policy, 5, carried)
    return torch.cat([first, second], dim=1), carried


def test_frames_of_the_fast_simulation_do_not_wait_for_the_gpu(monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)
    with private_random_streams(0, Stream.TRAINING, CPU):
        config = EnvironmentConfig(scenario="tests.support.scenarios:PushRight", max_episode_frames=7)
        plain = make_environment(config, 4, 0, Stream.TRAINING, CPU)
        policy = make_networks(NetworksConfig(hidden_sizes=(8,)), plain).policy
        simulation = make_fast_simulation(config, plain, is_compiled=False)
        monkeypatch.setattr(simulation, "_is_on_cpu", False)
        environment = FastEnvironment(simulation, plain, 7)
        _, carried = environment.collect(policy, 1, environment.reset())
        waits = {}
        for frames in (5, 15):
            with counted_waits() as mode:
                _, carried = environment.collect(policy, frames, carried)
            waits[frames] = mode.count
    assert waits[15] == waits[5]


def test_fast_simulation_collects_the_same_batch_as_the_plain_environment():
    """Frames are bit-identical up to the first reset, because both draw the same numbers until then."""
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
