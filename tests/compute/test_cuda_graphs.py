"""Check that a replayed CUDA graph gives the results of direct calls.

These tests run on a CPU: instead of a CUDA graph, a list records PyTorch's operations one by one.
tests/test_gpu.py tests real CUDA graphs.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mappo.compute.cuda_graphs import CudaGraphed
from mappo.config import EnvironmentConfig, NetworksConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import DONE
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.making import make_fast_simulation
from mappo.learning.networks import make_networks
from tests.conftest import CPU, Operations


class CpuGraph:
    """A list of captured operations; in a replay, each one writes into the memory of its first result."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with _disable_current_modes():  # a host launches a graph by one call, so that its operations do not count
            for function, arguments, options, results in self.operations:
                values = tree_leaves(function(*arguments, **options))
                for result, value in zip(tree_leaves(results), values, strict=True):
                    if result is not None:
                        result.copy_(value)


class Capture(TorchDispatchMode):
    """The capture of operations, which leaves the random state unchanged like the capture of a CUDA graph."""

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self._graph = graph

    def __enter__(self):
        self._random_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        torch.set_rng_state(self._random_state)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self._graph.operations.append((func, args, kwargs or {}, results))
        return results


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr("mappo.compute.cuda_graphs._GRAPH_DEVICE", "cpu")
    monkeypatch.setattr("torch.cuda.CUDAGraph", CpuGraph)
    monkeypatch.setattr("torch.cuda.graph", Capture)


def swap_and_add(first, second, third):
    """Return the next three arguments, the first two of which are swapped, and the old first argument."""
    return [second, first, first + third, first]


def test_chained_calls_give_the_results_of_direct_calls(graphs):
    graphed, arguments = CudaGraphed(swap_and_add, is_chained=True), [torch.randn(4) for _ in range(3)]
    expected = chained = arguments
    for _ in range(5):
        expected, chained = swap_and_add(*expected[:3]), graphed(*chained[:3])
        assert all(map(torch.equal, chained, expected))
    assert torch.equal(graphed(*arguments)[2], arguments[0] + arguments[2])


def test_arguments_of_the_caller_are_not_overwritten(graphs):
    graphed, arguments = CudaGraphed(swap_and_add, is_chained=True), [torch.ones(4) for _ in range(3)]
    graphed(*graphed(*arguments)[:3])
    assert all(torch.equal(argument, torch.ones(4)) for argument in arguments)


def environment_and_policy(is_replayed, monkeypatch, scenario, max_episode_frames):
    # Direct calls read values of tensors in Python, which a CUDA graph cannot capture: trace the policy at once.
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)
    config = EnvironmentConfig(
        scenario=f"tests.support.scenarios:{scenario}", max_episode_frames=max_episode_frames
    )
    plain = make_environment(config, 8, 0, Stream.TRAINING, CPU)
    policy = make_networks(NetworksConfig(hidden_sizes=(8,)), plain).policy
    simulation = make_fast_simulation(config, plain, is_compiled=False)
    environment = FastEnvironment(simulation, plain, config.max_episode_frames)
    if is_replayed:
        monkeypatch.setattr(simulation, "_is_on_cpu", False)
        environment._frame_functions[policy] = CudaGraphed(
            environment._make_frame_function(policy), is_chained=True
        )
    return environment, policy


def collect(is_replayed, monkeypatch):
    """Return three batches whose episodes end at different times, and all values of `carried`."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment, policy = environment_and_policy(is_replayed, monkeypatch, "SoundRace", max_episode_frames=12)
        batches, carried = [], [environment.reset()]
        for _ in range(3):
            batch, next_carried = environment.collect(policy, 50, carried[-1])
            batches.append(batch)
            carried.append(next_carried)
    return [torch.cat(batches, 1), *carried]


def test_replayed_frames_equal_those_of_direct_calls(graphs, monkeypatch):
    direct, replayed = (collect(is_replayed, monkeypatch) for is_replayed in (False, True))
    ends = direct[0]["next", DONE].squeeze(-1)
    assert ends.sum() > 10 * len(ends)
    assert ends.any(0).sum() > 6
    for expected, actual in zip(direct, replayed, strict=True):
        for key in expected.keys(True, True):
            assert torch.equal(expected[key], actual[key]), key


def test_host_launches_six_operations_for_each_frame(graphs, monkeypatch):
    """The host copies numbers, counts and flags into the batch, and reads how many fresh states were used."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment, policy = environment_and_policy(True, monkeypatch, "PushRight", max_episode_frames=100)
        _, carried = environment.collect(policy, 5, environment.reset())
        counts = []
        for frames in (5, 15):
            with Operations() as launched:
                _, carried = environment.collect(policy, frames, carried)
            counts.append(launched.count)
    assert counts[1] - counts[0] == 6 * 10
