"""What is recorded and played from fixed memory does what direct calls do. On a CPU, PyTorch's operations are
recorded one by one in place of a CUDA graph; tests/test_gpu.py has the real one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mappo.compute.cuda_graphs import CudaGraphed
from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import DONE
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.fast_simulation.fast_simulation import FastEnvironment, make_fast_simulation
from mappo.learning.networks import make_networks
from tests.conftest import CPU, Operations


class CpuGraph:
    """Operations and their results; played, each writes where its result was when it was recorded."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with _disable_current_modes():  # a host launches all of it by one call
            for function, arguments, named, results in self.operations:
                again = tree_leaves(function(*arguments, **named))
                for result, value in zip(tree_leaves(results), again, strict=True):
                    if result is not None:
                        result.copy_(value)


class Capture(TorchDispatchMode):
    """Draws no random numbers, as what a CUDA graph records is not computed yet."""

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self._graph = graph

    def __enter__(self):
        self._random_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        torch.set_rng_state(self._random_state)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self._graph.operations.append((func, args, kwargs or {}, results))
        return results


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr("mappo.compute.cuda_graphs._WITH_GRAPHS", "cpu")
    monkeypatch.setattr("torch.cuda.CUDAGraph", CpuGraph)
    monkeypatch.setattr("torch.cuda.graph", Capture)


def moved(one, other, third):
    """Results are the next arguments, of which two change places; and one as it was before."""
    return [other, one, one + third, one]


def test_what_goes_on_is_played_from_where_it_is(graphs):
    played, given = CudaGraphed(moved, is_chained=True), [torch.randn(4) for _ in range(3)]
    expected = chained = given
    for _ in range(5):
        expected, chained = moved(*expected[:3]), played(*chained[:3])
        assert all(map(torch.equal, chained, expected))
    assert torch.equal(played(*given)[2], given[0] + given[2])


def test_arguments_are_not_written_over(graphs):
    played, given = CudaGraphed(moved, is_chained=True), [torch.ones(4) for _ in range(3)]
    played(*played(*given)[:3])
    assert all(torch.equal(each, torch.ones(4)) for each in given)


def environment_and_policy(is_played, monkeypatch, scenario, max_episode_frames):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)  # in which Python asks what tensors hold
    config = EnvironmentConfig(
        scenario=f"tests.support.scenarios:{scenario}", max_episode_frames=max_episode_frames
    )
    plain = make_environment(config, 8, 0, Stream.TRAINING, CPU)
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), plain).policy
    simulation = make_fast_simulation(config, plain, is_compiled=False)
    environment = FastEnvironment(simulation, plain, config.max_episode_frames)
    if is_played:
        monkeypatch.setattr(simulation, "_is_waited_for", False)
        environment._plays[policy] = CudaGraphed(environment._make_play(policy), is_chained=True)
    return environment, policy


def collected(is_played, monkeypatch):
    """Three batches in which episodes end at different times, and what is carried before and after each."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment, policy = environment_and_policy(is_played, monkeypatch, "SoundRace", max_episode_frames=12)
        batches, carried = [], [environment.reset()]
        for _ in range(3):
            batch, following = environment.collect(policy, 50, carried[-1])
            batches.append(batch)
            carried.append(following)
    return [torch.cat(batches, 1), *carried]


def test_played_frames_are_those_of_direct_calls(graphs, monkeypatch):
    direct, played = (collected(is_played, monkeypatch) for is_played in (False, True))
    ends = direct[0]["next", DONE].squeeze(-1)
    assert ends.sum() > 10 * len(ends)
    assert ends.any(0).sum() > 6
    for one, other in zip(direct, played, strict=True):
        for key in one.keys(True, True):
            assert torch.equal(one[key], other[key]), key


def test_few_operations_of_a_frame_are_left_to_the_host(graphs, monkeypatch):
    """Copies into the batch, of numbers, counts and flags, and the note of how many fresh states are taken."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment, policy = environment_and_policy(True, monkeypatch, "PushRight", max_episode_frames=100)
        _, carried = environment.collect(policy, 5, environment.reset())
        counts = []
        for frames in (5, 15):
            with Operations() as launched:
                _, carried = environment.collect(policy, frames, carried)
            counts.append(launched.count)
    assert counts[1] - counts[0] == 6 * 10
