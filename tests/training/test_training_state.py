"""The refusal of checkpoints with correct hashes and impossible content; the previous checkpoint replaces them."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from mappo.runs.run import Run
from tests.runs.test_checkpoint import LONGER, replace_checkpoint, stopped_run
from tests.support.runs import assert_same_training, last, train_here


def captured_slot(structure, owner, slot):
    """Return the captured value of one slot of an object."""
    content = structure["objects"][owner][1]
    return (dict(content) if isinstance(content, list) else content)[slot]


def with_view(checkpoint, owner, slot, **changes):
    """Return the checkpoint with another view for the tensor of a slot."""
    structure = json.loads(json.dumps(checkpoint.state.structure))
    structure["views"][captured_slot(structure, owner, slot)["tensor"]] |= changes
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


def with_value(checkpoint, owner, slot, value):
    """Return the checkpoint with another value in the tensor of a slot."""
    structure, tensors = checkpoint.state.structure, checkpoint.state.tensors
    memory = structure["views"][captured_slot(structure, owner, slot)["tensor"]]["memory"]
    changed = {**tensors, memory: torch.full_like(tensors[memory], value)}
    return replace(checkpoint, state=replace(checkpoint.state, tensors=changed))


def without(checkpoint, name):
    structure = json.loads(json.dumps(checkpoint.state.structure))
    del structure["others"][name]
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


NAN, POSITION = float("nan"), ("world._agents[0]._state", "_pos")
HOSTILE = {  # function from a good checkpoint to a bad one, and the reason in the warning
    "shape": (
        lambda good: with_view(good, *POSITION, size=[2], stride=[1]),
        "the restored simulation cannot compute a frame",
    ),
    "memory": (lambda good: with_view(good, *POSITION, offset=10**6), "not a captured simulation"),
    "observation": (lambda good: with_value(good, "carried", "agents/observation", NAN), "is not finite"),
    "random states": (lambda good: with_view(good, "random_states", "torch", size=[7], stride=[1]), "RNG state"),
    "nothing carried": (lambda good: without(good, "carried"), "KeyError: 'carried'"),
    "no random states": (lambda good: without(good, "random_states"), "KeyError: 'random_states'"),
    "frames": (lambda good: replace(good, frames=1), "4 iterations of 6 and 1 frames are not possible"),
    "iteration": (lambda good: replace(good, iteration=9), "9 iterations of 6 and 480 frames are not possible"),
    "optimiser": (lambda good: replace(good, optimiser={}), "training cannot resume from the checkpoint"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_here(LONGER, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Make a stopped run. Tests must change only copies of it."""
    return stopped_run(LONGER, tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_is_refused_with_the_reason_and_the_previous_one_is_used(
    kind, whole, stopped, tmp_path, caplog
):
    change, reason = HOSTILE[kind]
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = Run.at(tmp_path)
    newest = run.refs()[0]
    replace_checkpoint(run, newest, change(run.load(newest)))
    reports = []
    with caplog.at_level(logging.WARNING):
        assert_same_training(train_here(LONGER, tmp_path, reports.append), whole)
    assert reports[0].progress.iteration == 4  # the iteration of the refused checkpoint, done again
    assert_same_training(last(tmp_path), whole)
    (warning,) = [line for line in caplog.messages if "trying the previous checkpoint" in line]
    assert reason in warning
