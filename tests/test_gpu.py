"""The fast paths on a GPU: compiled kernels and CUDA graphs compared with plain PyTorch. Skipped without a GPU.

The tests need no fixtures from other files, so that a machine with a GPU needs few packages:

    python -m pytest --noconftest tests/test_gpu.py
"""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mappo.compute.cuda_graphs import CudaGraphed
from mappo.compute.traced_function import TracedFunction
from mappo.config import from_dict, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, OBSERVATION, REWARD
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.making import make_fast_simulation
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and a build of torch for it"),
    pytest.mark.filterwarnings("default"),  # warnings of compilers and drivers are no errors
]

FAST = {"collection": {"simulation": "fast"}, "learner": {"update": "fast"}}
TINY = {
    "environment": {"scenario": "navigation", "scenario_kwargs": {"n_agents": 2}, "max_episode_frames": 30},
    "networks": {"hidden_sizes": [32]},
    "learner": {"epochs": 2, "minibatch_frames": 450},  # a smaller minibatch ends each epoch
    "collection": {"num_envs": 64, "rollout_frames": 25, "total_frames": 6_400},
    "device": "cuda",
}


@pytest.fixture
def gpu():
    return torch.device("cuda", 0)


@pytest.mark.parametrize("scenario", ["navigation", "balance"])
def test_fast_simulation_agrees_with_plain_vmas(scenario, gpu):
    """`make_fast_simulation` compares every frame of a rollout and raises if frames differ."""
    fast, _ = fast_environment({**TINY, "environment": {"scenario": scenario}}, gpu)
    assert fast._simulation.way == "fast"


def test_chained_results_stay_at_the_same_addresses(gpu):
    """The results of the function are its next arguments, moved by one position; its parameters may change."""
    module = nn.Linear(4, 4).to(gpu)
    function = TracedFunction(lambda one, other: [other, module(one), one + other], module, gpu, "fast")
    graphed, inputs = CudaGraphed(function, is_chained=True), [torch.randn(16, 4, device=gpu) for _ in range(2)]
    expected, chained, addresses = inputs, inputs, []
    for _ in range(6):
        expected, chained = function(*expected[:2]), graphed(*chained[:2])
        for result, expected_result in zip(chained, expected, strict=True):
            torch.testing.assert_close(result, expected_result)
        addresses.append([result.data_ptr() for result in chained])
        with torch.no_grad():
            module.weight.mul_(-1)
    assert addresses[1:] == addresses[1:2] * 5
    torch.testing.assert_close(graphed(*inputs)[2], inputs[0] + inputs[1])


def test_cuda_graph_draws_random_numbers_from_the_state_of_the_generator(gpu):
    def noisy(values):
        return [values + torch.randn_like(values)]

    graphed = CudaGraphed(TracedFunction(noisy, nn.Linear(1, 1).to(gpu), gpu, "fast"))
    zeros = torch.zeros(1_000, device=gpu)
    graphed(zeros)
    state = torch.cuda.get_rng_state(gpu)
    first, second = graphed(zeros)[0].clone(), graphed(zeros)[0].clone()
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state, gpu)
    assert torch.equal(graphed(zeros)[0], first)
    torch.testing.assert_close(first.std(), torch.ones((), device=gpu), atol=0.1, rtol=0)


@pytest.mark.parametrize(("way", "tolerance"), [("fast", 1e-4), ("mixed", 2e-2)])
def test_gradients_agree_with_plain_gradients(way, tolerance, gpu):
    losses, changes = {}, []
    for update in ("plain", way):
        learner, batch = learner_and_batch(from_dict(TINY), gpu, update)
        previous = [parameter.clone() for parameter in learner.networks.modules().parameters()]
        torch.manual_seed(0)
        losses[update] = learner.update(batch)
        current = learner.networks.modules().parameters()
        changes.append(torch.cat([(new - old).flatten() for new, old in zip(current, previous, strict=True)]))
    assert losses[way].loss_critic == pytest.approx(losses["plain"].loss_critic, rel=tolerance)
    assert losses[way].gradient_norm_policy == pytest.approx(
        losses["plain"].gradient_norm_policy, rel=10 * tolerance
    )
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 1 - 10 * tolerance


def test_no_frame_waits_for_the_gpu(gpu, monkeypatch):
    """Only resets by VMAS and one check of the whole batch may wait."""
    fast, policy = fast_environment(TINY, gpu)
    make_set = fast._simulation._reset
    with torch.no_grad():
        _, carried = fast.collect(policy, 5, fast.reset())
        counts = []
        for frames in (5, 15):
            with recorded_waits() as waits:
                monkeypatch.setattr(fast._simulation, "_reset", lambda: uncounted(make_set))
                _, carried = fast.collect(policy, frames, carried)
            counts.append(len(waits))
    assert counts == [1, 1]


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_no_optimiser_step_waits_for_the_gpu(way, gpu, monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 1)
    learner, batch = learner_and_batch(from_dict(TINY), gpu, way)
    learner.update(batch.clone())
    counts = []
    for epochs in (2, 6):
        learner.config = override(from_dict(TINY), {"learner": {"epochs": epochs}}).learner
        with recorded_waits() as waits:
            learner.update(batch.clone())
        counts.append(len(waits))
    assert counts[0] == counts[1]


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    config = override(from_dict(TINY), FAST)
    expected = train(config, Run.at(tmp_path / "whole"), HistoryFile(tmp_path / "whole.csv"), lambda _: None)

    class Stop(Exception):
        pass

    def stop(report):
        if report.progress.iteration == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config, Run.at(tmp_path / "halves"), HistoryFile(tmp_path / "first.csv"), stop)
    resumed = train(config, Run.at(tmp_path / "halves"), HistoryFile(tmp_path / "second.csv"), lambda _: None)
    assert resumed.iteration == expected.iteration == 4
    differing = [name for name, value in expected.tensors.items() if not torch.equal(value, resumed.tensors[name])]
    assert not differing


def fast_environment(values, gpu):
    config = from_dict(values)
    with private_random_streams(0, Stream.TRAINING, gpu):
        environment = make_environment(config.environment, config.collection.num_envs, 0, Stream.TRAINING, gpu)
        policy = make_networks(config.networks, environment).policy
        simulation = make_fast_simulation(config.environment, environment)
    return FastEnvironment(simulation, environment, config.environment.max_episode_frames), policy


def learner_and_batch(config, gpu, update="plain"):
    with private_random_streams(0, Stream.TRAINING, gpu):
        environment = make_environment(config.environment, 64, 0, Stream.TRAINING, gpu)
        networks = make_networks(config.networks, environment)
        with torch.no_grad():
            batch = environment.rollout(25, networks.policy, break_when_any_done=False)
    assert {ACTION, OBSERVATION, ("next", *REWARD)} <= set(batch.keys(True, True))
    return Learner(config.learner, networks, num_iterations=10, update=update), batch


@contextmanager
def recorded_waits():
    """Yield a list, which after the block holds a warning for every wait of the host for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        waits = []
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits += [warning for warning in caught if "synchroniz" in str(warning.message)]


def uncounted(function):
    """Call the function and return its result, without a warning for its waits."""
    torch.cuda.set_sync_debug_mode("default")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("warn")
