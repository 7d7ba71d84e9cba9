"""The refusal of checkpoints with correct hashes and impossible content; the previous checkpoint replaces them."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from mappo.compute.computation import Computation
from mappo.config import override
from mappo.runs.checkpoint import manifest_bytes
from mappo.runs.run import Run
from mappo.training import forked_trial
from tests.runs.test_checkpoint import LONGER, put_manifest, replace_checkpoint, stopped_run
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


def with_slot(checkpoint, owner, slot, value):
    """Return the checkpoint with another value in a slot of an object."""
    structure = json.loads(json.dumps(checkpoint.state.structure))
    content = structure["objects"][owner][1]
    assert slot in content
    content[slot] = value
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


def with_numpy_position(checkpoint, position):
    """Return the checkpoint with another position in the state from which VMAS draws from numpy."""
    structure = json.loads(json.dumps(checkpoint.state.structure))
    path = captured_slot(structure, "random_states", "vmas")["object"]
    structure["objects"][path][1][1]["tuple"][1][2] = position
    return replace(checkpoint, state=replace(checkpoint.state, structure=structure))


def with_optimiser(checkpoint, part, value):
    tensors = checkpoint.optimiser.items()
    changed = {name: torch.full_like(tensor, value) if name.endswith(part) else tensor for name, tensor in tensors}
    return replace(checkpoint, optimiser=changed)


def with_history(checkpoint, change):
    return replace(checkpoint, history="".join(change(checkpoint.history.splitlines(keepends=True))))


NAN, POSITION = float("nan"), ("world._agents[0]._state", "_pos")
HOSTILE = {  # function from a good checkpoint to a bad one, and the reason in the warning
    "shape": (
        lambda good: with_view(good, *POSITION, size=[2], stride=[1]),
        "the restored simulation cannot be played",
    ),
    "memory": (lambda good: with_view(good, *POSITION, offset=10**6), "not a captured simulation"),
    "observation": (lambda good: with_value(good, "carried", "agents/observation", NAN), "is not finite"),
    "random states": (lambda good: with_view(good, "random_states", "torch", size=[7], stride=[1]), "RNG state"),
    "nothing carried": (lambda good: without(good, "carried"), "KeyError: 'carried'"),
    "no random states": (lambda good: without(good, "random_states"), "KeyError: 'random_states'"),
    "frames": (lambda good: replace(good, frames=1), "4 iterations of 6 and 1 frames are not possible"),
    "iteration": (lambda good: replace(good, iteration=9), "9 iterations of 6 and 480 frames are not possible"),
    "optimiser": (lambda good: replace(good, optimiser={}), "training cannot resume from the checkpoint"),
    "mean squares": (lambda good: with_optimiser(good, "exp_avg_sq", -1.0), "or impossible"),
    "float": (lambda good: with_slot(good, "world", "_dt", {"float": "abc"}), "could not convert string to float"),
    "kind of value": (
        lambda good: with_slot(good, "world", "_dt", {"eval": "1"}),
        "'eval' is not a kind of value",
    ),
    "class": (lambda good: with_slot(good, "world", "_dt", {"kept": "os.system"}), "has a os.system, this one"),
    "text": (lambda good: with_slot(good, "world", "_sub_dt", "abc"), "the restored simulation cannot be played"),
    "used by resets": (lambda good: with_slot(good, "scenario", "world_spawning_x", "abc"), "TypeError"),
    "endless": (lambda good: with_slot(good, "world", "_substeps", 10**9), "cannot be played: it takes more than"),
    "position": (lambda good: with_value(good, *POSITION, NAN), "the pos of agent_0 is not finite"),
    "numpy": (lambda good: with_numpy_position(good, 10**6), "the random states cannot be used"),
    "seed": (lambda good: replace(good, config=override(good.config, {"seed": 1})), "another configuration"),
    "start": (lambda good: replace(good, started_from="x"), "has the start 'x'"),
    "update": (lambda good: replace(good, computation=Computation("plain", "fast")), "the run began with fast"),
    "weights": (lambda good: replace(good, tensors={n: t + 1e38 for n, t in good.tensors.items()}), "not finite"),
    "returns": (lambda good: replace(good, selection_return=3e9), "is above the highest return"),
    "row": (lambda good: with_history(good, lambda rows: [*rows[:-1], "abc,def\n"]), "row 4 of the history"),
    "rows": (lambda good: with_history(good, lambda rows: rows[:-1]), "the history ends after iteration 3"),
    "columns": (lambda good: with_history(good, lambda rows: rows[1:]), "the history has other columns"),
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
    kind, whole, stopped, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(forked_trial, "SECONDS", 1.0)
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
    assert "\n" not in warning


def test_manifest_under_the_name_of_another_iteration_is_refused(whole, stopped, tmp_path, caplog):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = Run.at(tmp_path)
    newest, older = run.refs()[:2]
    put_manifest(run, manifest_bytes(run.manifest(older)), newest)
    with caplog.at_level(logging.WARNING):
        assert_same_training(train_here(LONGER, tmp_path), whole)
    assert "its name says iteration 4, and its manifest iteration 3" in caplog.text
