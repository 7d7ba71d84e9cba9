"""Checkpoints whose hashes are right and whose content no training made: refused, and the one before is taken."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from mappo.runs.run import Run
from tests.runs.test_checkpoint import LONGER, replace_checkpoint, stopped_run
from tests.support.runs import assert_same_training, last, train_here


def place_in(structure, owner, slot):
    """What the structure says of one slot of an object."""
    content = structure["objects"][owner][1]
    return (dict(content) if isinstance(content, list) else content)[slot]


def with_view(checkpoint, owner, slot, **changes):
    """A tensor that is another view of its memory."""
    structure = json.loads(json.dumps(checkpoint.state.structure))
    structure["views"][place_in(structure, owner, slot)["tensor"]] |= changes
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


def with_value(checkpoint, owner, slot, value):
    """A tensor that holds another value."""
    structure, tensors = checkpoint.state.structure, checkpoint.state.tensors
    memory = structure["views"][place_in(structure, owner, slot)["tensor"]]["memory"]
    changed = {**tensors, memory: torch.full_like(tensors[memory], value)}
    return replace(checkpoint, state=replace(checkpoint.state, tensors=changed))


def without(checkpoint, name):
    structure = json.loads(json.dumps(checkpoint.state.structure))
    del structure["others"][name]
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


NAN, POSITION = float("nan"), ("world._agents[0]._state", "_pos")
HOSTILE = {  # a good checkpoint -> a bad one, and what is said of it
    "shape": (
        lambda good: with_view(good, *POSITION, size=[2], stride=[1]),
        "the restored simulation cannot play",
    ),
    "memory": (lambda good: with_view(good, *POSITION, offset=10**6), "not a captured simulation"),
    "observation": (lambda good: with_value(good, "carried", "agents/observation", NAN), "is not finite"),
    "random states": (lambda good: with_view(good, "random_states", "torch", size=[7], stride=[1]), "RNG state"),
    "nothing carried": (lambda good: without(good, "carried"), "KeyError: 'carried'"),
    "no random states": (lambda good: without(good, "random_states"), "KeyError: 'random_states'"),
    "frames": (lambda good: replace(good, frames=1), "4 iterations of 6 and 1 frames are not possible"),
    "iteration": (lambda good: replace(good, iteration=9), "9 iterations of 6 and 480 frames are not possible"),
    "optimiser": (lambda good: replace(good, optimiser={}), "training cannot go on from the checkpoint"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_here(LONGER, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Not to be changed: tests change copies."""
    return stopped_run(LONGER, tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_is_refused_with_the_reason_and_the_one_before_is_taken(
    kind, whole, stopped, tmp_path, caplog
):
    change, reason = HOSTILE[kind]
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = Run.at(tmp_path)
    newest = run.saved()[0]
    replace_checkpoint(run, newest, change(run.load(newest)))
    reports = []
    with caplog.at_level(logging.WARNING):
        assert_same_training(train_here(LONGER, tmp_path, reports.append), whole)
    assert reports[0].progress.iteration == 4  # which was the newest
    assert_same_training(last(tmp_path), whole)
    (warning,) = [line for line in caplog.messages if "looking for the one before" in line]
    assert reason in warning
