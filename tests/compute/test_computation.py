"""The choice of what a run compiles."""

import pytest

from mappo.compute.computation import PLAIN, Computation
from mappo.compute.computation_choice import (
    LEAST_OPTIMISER_STEPS,
    Machine,
    choose_computation,
    kept_computation,
    least_frames_of_each,
    missing_for_compilation,
)
from mappo.config import override
from mappo.errors import ConfigError
from mappo.recipes import recipe

LAPTOP = Machine("cpu", "", multiplies_bfloat16=False)
AMX = Machine("cpu", "", multiplies_bfloat16=True)
GPU = Machine("cuda", "", multiplies_bfloat16=True)
BARE = Machine("cuda", "a C++ compiler", multiplies_bfloat16=True)
COMPILED = Computation("fast", "fast", "fast")


def config_of(iterations=1, **changes):
    """Return a configuration whose iteration has 100 frames of each environment and 100 optimiser steps."""
    base = {
        "collection": {"num_envs": 10, "rollout_frames": 100, "total_frames": 1000 * iterations},
        "learner": {"epochs": 10, "minibatch_frames": 100},
    }
    return override(recipe("navigation"), base, changes)


@pytest.mark.parametrize(
    ("machine", "is_shared", "iterations", "expected"),
    [
        (LAPTOP, False, 1, PLAIN),
        (LAPTOP, False, 1000, COMPILED),
        (LAPTOP, True, 1, COMPILED),
        (AMX, False, 1, PLAIN),
        (AMX, True, 1, Computation("fast", "mixed", "fast")),
        (GPU, False, 1, Computation("fast", "mixed", "fast")),
        (BARE, True, 1000, PLAIN),
    ],
)
def test_auto_compiles_what_pays(machine, is_shared, iterations, expected):
    assert choose_computation(config_of(iterations), machine, is_shared)[0] == expected


def test_auto_compares_with_the_length_at_which_compilation_pays():
    frames = config_of(-(-least_frames_of_each(10) // 100), learner={"epochs": 1, "minibatch_frames": 1000})
    assert choose_computation(frames, LAPTOP)[0] == Computation("fast", "plain")
    steps = config_of(1, learner={"epochs": 1000, "minibatch_frames": 1000 * 1000 // LEAST_OPTIMISER_STEPS})
    assert choose_computation(steps, LAPTOP)[0] == Computation("plain", "fast")


@pytest.mark.parametrize(("num_envs", "expected"), [(1, 3993), (500, 2000), (4500, 400)])
def test_more_environments_make_compilation_pay_earlier(num_envs, expected):
    assert least_frames_of_each(num_envs) == expected


def test_many_environments_are_compiled_where_few_are_not():
    many = {"num_envs": 200, "rollout_frames": 50, "total_frames": 600_000}
    few = {"num_envs": 10, "rollout_frames": 50, "total_frames": 30_000}  # 3,000 frames of each, as above
    assert choose_computation(config_of(collection=many), LAPTOP)[0].simulation == "fast"
    assert choose_computation(config_of(collection=few), LAPTOP)[0].simulation == "plain"


def test_small_layers_are_not_multiplied_in_bfloat16():
    small = config_of(networks={"hidden_sizes": [256, 32]})
    assert choose_computation(small, GPU)[0] == COMPILED


def test_named_values_are_taken_as_they_are_and_without_a_word():
    config = config_of(1000, collection={"simulation": "plain"}, learner={"update": "fast"})
    assert choose_computation(config, LAPTOP) == (Computation("plain", "fast"), "")
    half = config_of(1000, collection={"simulation": "plain"})
    assert choose_computation(half, LAPTOP)[0] == Computation("plain", "fast")


def test_evaluations_that_are_to_be_measured_are_plain_and_nothing_else_changes():
    config = config_of(1000, selection={"simulation": "plain"})
    assert choose_computation(config, LAPTOP)[0] == Computation("fast", "fast", "plain")
    assert kept_computation(config, COMPILED, LAPTOP) == Computation("fast", "fast", "plain")  # of an extended run


def test_the_reason_names_what_is_missing_and_how_to_install_it():
    _, reason = choose_computation(config_of(), BARE)
    assert reason == (
        "simulation plain, update plain (auto: this machine lacks a C++ compiler: "
        "sudo apt install g++ python3-dev)"
    )


def test_a_resumed_run_keeps_what_it_compiles_on_another_machine():
    assert kept_computation(config_of(1), COMPILED, AMX) == COMPILED
    assert kept_computation(config_of(1000), PLAIN, BARE) == PLAIN
    named = config_of(1, collection={"simulation": "fast"}, learner={"update": "fast"})
    assert kept_computation(named, COMPILED, LAPTOP) == COMPILED


def test_a_resumed_run_is_refused_where_it_cannot_go_on():
    with pytest.raises(ConfigError, match=r"this machine cannot compile: it lacks a C\+\+ compiler; install it"):
        kept_computation(config_of(), COMPILED, BARE)
    with pytest.raises(ConfigError, match="collection.simulation = plain: the run began with fast; use auto or"):
        kept_computation(config_of(collection={"simulation": "plain"}), COMPILED, LAPTOP)


def test_missing_compiler_is_found(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert missing_for_compilation() == "the C++ compiler /nowhere/g++"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing_for_compilation() == "a C++ compiler"
