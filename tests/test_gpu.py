"""The fast paths on a GPU: kernels and CUDA graphs against plain PyTorch there. Skipped where there is none.

It needs no fixture of the others, so that a machine with a GPU needs little:

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
from mappo.fast_simulation.fast_simulation import FastEnvironment, make_fast_simulation
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and a build of torch for it"),
    pytest.mark.filterwarnings("default"),  # of compilers and drivers
]

FAST = {"collection": {"simulation": "fast"}, "learner": {"update": "fast"}}
TINY = {
    "environment": {"scenario": "navigation", "scenario_kwargs": {"n_agents": 2}, "max_episode_frames": 30},
    "networks": {"hidden_sizes": [32]},
    "learner": {"epochs": 2, "minibatch_frames": 450},  # and a smaller one at the end of an epoch
    "collection": {"num_envs": 64, "rollout_frames": 25, "total_frames": 6_400},
    "device": "cuda",
}


@pytest.fixture
def gpu():
    return torch.device("cuda", 0)


@pytest.mark.parametrize("scenario", ["navigation", "balance"])
def test_fast_simulation_agrees_with_plain_vmas(scenario, gpu):
    """Its own check compares each frame of a trial, and refuses where they differ."""
    fast, _ = fast_environment({**TINY, "environment": {"scenario": scenario}}, gpu)
    assert fast._simulation.way == "fast"


def test_what_goes_on_stays_where_it_is(gpu):
    """Of a function whose results are its next arguments, moved by one place; and parameters may change."""
    module = nn.Linear(4, 4).to(gpu)
    function = TracedFunction(lambda one, other: [other, module(one), one + other], module, gpu, "fast")
    launched, given = CudaGraphed(function, is_chained=True), [torch.randn(16, 4, device=gpu) for _ in range(2)]
    expected, chained, places = given, given, []
    for _ in range(6):
        expected, chained = function(*expected[:2]), launched(*chained[:2])
        for each, other in zip(chained, expected, strict=True):
            torch.testing.assert_close(each, other)
        places.append([each.data_ptr() for each in chained])
        with torch.no_grad():
            module.weight.mul_(-1)
    assert places[1:] == places[1:2] * 5
    torch.testing.assert_close(launched(*given)[2], given[0] + given[1])


def test_random_numbers_of_a_graph_go_on_from_the_generator(gpu):
    def noisy(values):
        return [values + torch.randn_like(values)]

    compiled = CudaGraphed(TracedFunction(noisy, nn.Linear(1, 1).to(gpu), gpu, "fast"))
    zeros = torch.zeros(1_000, device=gpu)
    compiled(zeros)
    state = torch.cuda.get_rng_state(gpu)
    first, second = compiled(zeros)[0].clone(), compiled(zeros)[0].clone()
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state, gpu)
    assert torch.equal(compiled(zeros)[0], first)
    torch.testing.assert_close(first.std(), torch.ones((), device=gpu), atol=0.1, rtol=0)


@pytest.mark.parametrize(("way", "tolerance"), [("fast", 1e-4), ("mixed", 2e-2)])
def test_gradients_agree_with_plain_ones(way, tolerance, gpu):
    losses, changes = {}, []
    for each in ("plain", way):
        learner, batch = learner_and_batch(override(from_dict(TINY), {"learner": {"update": each}}), gpu)
        before = [parameter.clone() for parameter in learner.networks.modules().parameters()]
        torch.manual_seed(0)
        losses[each] = learner.update(batch)
        after = learner.networks.modules().parameters()
        changes.append(torch.cat([(one - other).flatten() for one, other in zip(after, before, strict=True)]))
    assert losses[way].loss_critic == pytest.approx(losses["plain"].loss_critic, rel=tolerance)
    assert losses[way].gradient_norm_policy == pytest.approx(
        losses["plain"].gradient_norm_policy, rel=10 * tolerance
    )
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 1 - 10 * tolerance


def test_no_frame_waits_for_the_gpu(gpu, monkeypatch):
    """But for VMAS, when it makes a set of fresh states, and for a look at the whole batch."""
    fast, policy = fast_environment(TINY, gpu)
    make_set = fast._simulation._reset
    with torch.no_grad():
        _, carried = fast.collect(policy, 5, fast.reset())
        counts = []
        for frames in (5, 15):
            with waits() as found:
                monkeypatch.setattr(fast._simulation, "_reset", lambda: uncounted(make_set))
                _, carried = fast.collect(policy, frames, carried)
            counts.append(len(found))
    assert counts == [1, 1]


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_no_optimiser_step_waits_for_the_gpu(way, gpu, monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 1)
    learner, batch = learner_and_batch(override(from_dict(TINY), {"learner": {"update": way}}), gpu)
    learner.update(batch.clone())
    counts = []
    for epochs in (2, 6):
        learner.config = override(from_dict(TINY), {"learner": {"epochs": epochs}}).learner
        with waits() as found:
            learner.update(batch.clone())
        counts.append(len(found))
    assert counts[0] == counts[1]


def test_training_that_goes_on_ends_as_if_it_had_never_stopped(tmp_path):
    config = override(from_dict(TINY), FAST)
    expected = train(config, Run.at(tmp_path / "whole"), HistoryFile(tmp_path / "whole.csv"), lambda _: None)

    class Stop(Exception):
        pass

    def stop(report):
        if report.progress.iteration == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config, Run.at(tmp_path / "halves"), HistoryFile(tmp_path / "first.csv"), stop)
    found = train(config, Run.at(tmp_path / "halves"), HistoryFile(tmp_path / "second.csv"), lambda _: None)
    assert found.iteration == expected.iteration == 4
    differing = [name for name, value in expected.tensors.items() if not torch.equal(value, found.tensors[name])]
    assert not differing


def fast_environment(values, gpu):
    config = from_dict(values)
    with private_random_streams(0, Stream.TRAINING, gpu):
        environment = make_environment(config.environment, config.collection.num_envs, 0, Stream.TRAINING, gpu)
        policy = make_networks(config.networks, environment).policy
        simulation = make_fast_simulation(config.environment, environment)
    return FastEnvironment(simulation, environment, config.environment.max_episode_frames), policy


def learner_and_batch(config, gpu):
    with private_random_streams(0, Stream.TRAINING, gpu):
        environment = make_environment(config.environment, 64, 0, Stream.TRAINING, gpu)
        networks = make_networks(config.networks, environment)
        with torch.no_grad():
            batch = environment.rollout(25, networks.policy, break_when_any_done=False)
    assert {ACTION, OBSERVATION, ("next", *REWARD)} <= set(batch.keys(True, True))
    return Learner(config.learner, networks, num_iterations=10), batch


@contextmanager
def waits():
    """Each time that the host waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [each for each in caught if "synchroniz" in str(each.message)]


def uncounted(function):
    """What it returns; that it waits is not told."""
    torch.cuda.set_sync_debug_mode("default")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("warn")
