"""Check that traced gradients equal those of TorchRL's loss, which autograd computes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mappo.compute.compiler import _digest, _signature
from mappo.compute.traced_function import TracedFunction
from mappo.config import override
from mappo.environment.groups import merged
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.learning.learner import LOSS_OUTPUTS, standardise
from tests.cli.test_main import TINY
from tests.conftest import CPU
from tests.learning.test_learner import ADVANTAGE, make, prepare, tensors

CASES = {
    "continuous": {},
    "entropy bonus": {"learner": {"entropy_coefficient": 0.1}},
    "clipped values": {"learner": {"value_clip_epsilon": 0.01, "value_loss": "smooth_l1"}},
    "normalised": {"networks": {"normalise_observations": True, "normalise_values": True}},
    "one policy an agent": {"networks": {"share_policy": False, "activation": "relu"}},
    "own critic": {"networks": {"critic": "own", "normalise_observations": True}},
    "own critics": {"networks": {"critic": "own", "share_policy": False}},
    "clipped gradients": {"learner": {"max_gradient_norm": 0.01}},
    "constants": {
        "environment": {"scenario": "tests.support.scenarios:FixedComponent"},
        "learner": {"entropy_coefficient": 0.1},
    },
    "discrete": {"environment": {"actions": "discrete"}, "learner": {"entropy_coefficient": 0.1}},
    "multi-discrete": {"environment": {"actions": "multi-discrete"}, "learner": {"entropy_coefficient": 0.1}},
    "groups": {
        "environment": {"scenario": "tests.support.scenarios:Teams"},
        "networks": {"normalise_observations": True, "normalise_values": True},
    },
    "own critics of discrete groups": {
        "environment": {"scenario": "tests.support.scenarios:Teams", "actions": "discrete"},
        "networks": {"critic": "own", "share_policy": False},
        "learner": {"entropy_coefficient": 0.1},
    },
}


@pytest.fixture(autouse=True)
def _traced_in_the_first_call(monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_traced_gradients_are_bit_identical_to_those_of_autograd(tiny, changes):
    learner, minibatches = learner_after_an_update(override(tiny, changes))
    for minibatch in minibatches:  # the second size is traced here
        for traced, direct in zip(*traced_and_direct(learner, minibatch), strict=True):
            assert torch.equal(traced, direct)
        observation, action, networks = minibatch[OBSERVATION], minibatch[ACTION], learner.networks
        with torch.no_grad():
            values = [networks.critic.module(values) for values in (observation, observation + 1)]
            log_prob = [
                part.policy.get_dist(minibatch.select(OBSERVATION)).log_prob(part.group.actions(action))
                for part in networks.parts
            ]
            direct = [*values, merged(networks.groups, log_prob, -1)]
        estimates = learner._estimates(observation, observation + 1, action)
        assert all(torch.equal(*pair) for pair in zip(estimates, direct, strict=True))


def test_function_is_traced_after_some_direct_calls(monkeypatch):
    """Python runs the function until then. Tracing does not change the order of random numbers."""
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 2)
    module, calls = nn.Linear(3, 2), []

    def noisy(values):
        calls.append(len(values))
        return [module(values) + torch.randn(len(values), 2)]

    traced = TracedFunction(noisy, module, CPU)
    inputs = torch.randn(5, 3)
    torch.manual_seed(0)
    values = [traced(inputs)[0] for _ in range(5)] + [traced(inputs[:4])[0]]
    assert calls == [5, 5, 5, 4], "two direct calls, one call to trace, and one with another shape"
    torch.manual_seed(0)
    expected = [noisy(inputs)[0] for _ in range(5)] + [noisy(inputs[:4])[0]]
    assert all(torch.equal(*pair) for pair in zip(values, expected, strict=True))
    assert not any(value.requires_grad for value in values)


@pytest.mark.long
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_compiled_gradients_agree_with_those_of_autograd(tiny, changes):
    learner, minibatches = learner_after_an_update(override(tiny, changes), "fast")
    for minibatch in minibatches:
        for compiled, direct in zip(*traced_and_direct(learner, minibatch), strict=True):
            torch.testing.assert_close(compiled, direct, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"clip_epsilon": 0.3, "gae_lambda": 0.5, "epochs": 7, "value_coefficient": 0.5}),
        ({"entropy_coefficient": 0.01}, {"entropy_coefficient": 0.02}),
        ({"value_clip_epsilon": 0.1}, {"value_clip_epsilon": 0.2}),
    ],
)
def test_other_coefficients_need_no_other_graph(tiny, monkeypatch, base, change):
    """A study tunes them, and compiles only once."""
    names = []
    monkeypatch.setattr(
        "mappo.compute.traced_function.compile_graph",
        lambda graph, inputs: names.append(_digest(graph, _signature(inputs))) or graph,
    )
    for changes in (base, {**base, **change}):
        environment, _, learner, _ = make(override(tiny, {"learner": changes}), "fast")
        learner.prepare(environment.fake_tensordict(), 100)
    assert len(names) == 2 * len({*names})


@pytest.mark.parametrize("critic", ["central", "own"])
@pytest.mark.parametrize("shares", [True, False])
def test_mixed_gradients_agree_with_those_of_autograd_to_the_precision_of_bfloat16(
    tiny, monkeypatch, shares, critic
):
    monkeypatch.setattr("mappo.compute.traced_function.compile_graph", lambda graph, _: graph)
    assert_mixed_gradients_agree(tiny, shares, critic)


@pytest.mark.long
def test_compiled_mixed_gradients_agree_with_those_of_autograd_to_the_precision_of_bfloat16(tiny):
    assert_mixed_gradients_agree(tiny, shares=True)


def assert_mixed_gradients_agree(tiny, shares, critic="central"):
    networks = {"hidden_sizes": [64, 64], "share_policy": shares, "critic": critic}
    config = override(tiny, {"networks": networks, "learner": {"minibatch_frames": 100}})
    learner, minibatches = learner_after_an_update(config, "mixed")
    minibatch = torch.cat(minibatches)
    assert len(minibatch) >= 64
    ratios = []
    for mixed, direct in zip(*traced_and_direct(learner, minibatch), strict=True):
        assert mixed.dtype == torch.float32
        ratios.append(float((mixed - direct).norm() / direct.norm().clamp_min(1e-3)))
    assert max(ratios) < 0.1, ratios  # the largest are those of kl and of an own critic's bias, which are near 0
    assert max(ratios) > 1e-4, "nothing was multiplied in bfloat16"


def learner_after_an_update(config, update="plain"):
    """Return a learner whose policy differs from the collecting policy, and minibatches of two sizes."""
    _, _, learner, batch = make(config, update)
    torch.manual_seed(0)
    learner.update(batch)
    frames = prepare(learner, batch)
    frames[ADVANTAGE] = standardise(frames[ADVANTAGE])
    return learner, [frames[:50], frames[:40], frames[40:90], frames[100:]]


def measure_of_all(name, outputs, losses):
    """Return the sum of losses, the norm of all gradients, or the mean over agents."""
    values = torch.stack([outputs[f"{name}/{loss.group.name}"] for loss in losses])
    sizes = torch.tensor([len(loss.group.agents) for loss in losses])
    if name.startswith("loss_"):
        return values.sum()
    return values.norm() if name.startswith("gradient_norm") else (values * sizes).sum() / sizes.sum()


def traced_and_direct(learner, minibatch):
    """Return loss terms and gradients, once traced and once computed directly from the same random state."""
    parameters = list(learner.networks.modules().parameters())
    initial_state = torch.get_rng_state()
    values = learner._gradients(*tensors(minibatch, learner._inputs))
    traced = [*values, *(parameter.grad for parameter in parameters)]
    learner.optimiser.zero_grad()
    state_after_traced = torch.get_rng_state()
    torch.set_rng_state(initial_state)
    outputs: dict[str, torch.Tensor] = {}
    for loss in learner._losses:
        output = loss(dict(zip(learner._inputs, tensors(minibatch, learner._inputs), strict=True)))
        sum(value for name, value in output.items() if name.startswith("loss_")).backward()
        norms = {
            f"gradient_norm_{name}": nn.utils.clip_grad_norm_(
                network.parameters(), learner.config.max_gradient_norm
            )
            for name, network in loss.networks.items()
        }
        returned = {name: key for name, key in LOSS_OUTPUTS.items() if key in loss.loss.out_keys}
        named = {**{name: output[key].detach() for name, key in returned.items()}, **norms}
        outputs |= {f"{name}/{loss.group.name}": value for name, value in named.items()}
    names = learner._gradients.names
    if len(learner._losses) == 1:
        names = [f"{name}/agents" for name in names]
    else:
        for name, value in zip(names, values, strict=True):
            if "/" not in name:
                torch.testing.assert_close(value, measure_of_all(name, outputs, learner._losses))
                outputs[name] = value
    direct = [*(outputs[name] for name in names), *(parameter.grad for parameter in parameters)]
    assert torch.equal(state_after_traced, torch.get_rng_state()), "both draw the same random numbers"
    return traced, direct


@pytest.mark.long
def test_error_names_the_missing_compiler(tmp_path):
    variables = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = [*TINY, "--learner.update", "fast", "--run", "first", "--store", str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "-m", "mappo", "train", *options], capture_output=True, text=True, env=variables
    )
    assert process.returncode == 2
    message = "learner.update = fast or mixed need a C++ compiler and Python's headers"
    assert message in process.stdout + process.stderr
