"""Training that stops at any moment ends as if it had not: parameters, optimiser, random states, history."""

import logging
import random
import signal
import time

import pytest
import torch

from mappo.__main__ import main
from mappo.config import ExperimentConfig, from_dict, override
from mappo.errors import CheckpointError
from mappo.recipes import RECIPES, recipe
from mappo.runs.run import Run
from mappo.training.training_state import StartingPoint
from tests.conftest import TINY
from tests.support.runs import (
    assert_same_training,
    finish,
    iterations,
    kill,
    last,
    start_training,
    train_here,
    wait_for,
)


class Stopped(Exception):
    pass


def small(config: ExperimentConfig, **changes) -> ExperimentConfig:
    """Five iterations of half a second in all, with episodes that are longer than a batch."""
    return override(
        config,
        {
            "environment": {"max_episode_frames": 8},
            "networks": {"hidden_sizes": [16]},
            "learner": {"epochs": 2, "minibatch_frames": 25},
            "collection": {"num_envs": 10, "rollout_frames": 6, "total_frames": 300},
            "selection": {"interval_iterations": 2, "episodes_per_seed": 2},
        },
        changes,
    )


def run_training(config, directory, stop_at=None, start=None):
    """Train in this process, dying in the middle of an iteration if asked to."""

    def on_report(report):
        if report.progress.iteration == stop_at:
            raise Stopped

    return train_here(config, directory, on_report, start)


def assert_resumes_exactly(config, tmp_path, stops=(2, 4), start=None):
    whole = run_training(config, tmp_path / "whole", start=start)
    for stop in stops:
        with pytest.raises(Stopped):
            run_training(config, tmp_path / "stopped", stop, start)
        torch.rand(3)  # what the process draws in between does not matter
    resumed = run_training(config, tmp_path / "stopped", start=start)
    assert_same_training(whole, resumed)
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "stopped"))
    assert (tmp_path / "stopped" / "history.csv").read_text() == resumed.history


@pytest.mark.parametrize("name", list(RECIPES))
def test_resumed_run_equals_uninterrupted_run_for_every_recipe(name, tmp_path):
    assert_resumes_exactly(small(recipe(name)), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {"scenario": "balance", "scenario_kwargs": {"n_agents": 3}}},
        {"environment": {"scenario": "simple_reference", "scenario_kwargs": {}, "actions": "multi-discrete"}},
        {"environment": {"scenario": "tests.support.scenarios:ManyKindsOfState", "scenario_kwargs": {}}},
        {"environment": {"max_episode_frames": 5}, "learner": {"target_kl": 1e-4}},
        {"environment": {"max_episode_frames": 1_000}, "selection": {"interval_iterations": 0}},
        {"networks": {"normalise_observations": True, "normalise_values": True, "share_policy": False}},
        {"learner": {"learning_rate_schedule": "constant", "advantage_normalisation": "agent", "epochs": 1}},
    ],
    ids=lambda changes: str(changes).translate(str.maketrans("", "", "{}'\" "))[:60],
)
def test_resumed_run_equals_uninterrupted_run_whatever_is_configured(changes, tmp_path):
    assert_resumes_exactly(small(from_dict(TINY), **changes), tmp_path, stops=(3,))


@pytest.mark.parametrize("kind", ["extend", "warm-start"])
def test_resumed_run_equals_uninterrupted_run_when_it_did_not_start_from_scratch(kind, tmp_path):
    config = small(from_dict(TINY))
    first = run_training(config, tmp_path / "first")
    longer = override(config, {"collection": {"total_frames": 600}}) if kind == "extend" else config
    stops = (6, 9) if kind == "extend" else (1, 4)
    assert_resumes_exactly(longer, tmp_path, stops, StartingPoint(kind, first))


def test_finished_run_is_left_as_it_is(tmp_path):
    config = small(from_dict(TINY))
    whole = run_training(config, tmp_path)
    keys = [entry.key for entry in Run.at(tmp_path).store.entries("checkpoints/")]
    assert_same_training(run_training(config, tmp_path), whole)
    assert [entry.key for entry in Run.at(tmp_path).store.entries("checkpoints/")] == keys


def test_resumed_run_takes_the_number_of_threads_of_before(tmp_path):
    config = small(from_dict(TINY), threads=0, collection={"total_frames": 120})
    torch.set_num_threads(2)
    try:
        with pytest.raises(Stopped):
            run_training(config, tmp_path, 2)
        torch.set_num_threads(1)
        assert run_training(config, tmp_path).platform.threads == 2
    finally:
        torch.set_num_threads(1)


def test_going_on_elsewhere_is_said_to_be_inexact(tmp_path, monkeypatch, caplog):
    config = small(from_dict(TINY))
    monkeypatch.setattr("mappo.__version__", "0.0.1")
    with pytest.raises(Stopped):
        run_training(config, tmp_path, 3)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        run_training(config, tmp_path)
    assert "not bit by bit as it would have: mappo 0.0.1 -> " in caplog.text


KILLED = small(
    from_dict(TINY),
    collection={"total_frames": 60 * 100},
    learner={"target_kl": 0.05},
    networks={"normalise_observations": True, "normalise_values": True},
)


def kill_in_the_middle(config, folder, moments, with_signal=signal.SIGKILL):
    """Kill training at each of these moments, in seconds after it began an attempt; how many kills hit it."""
    hits = 0
    for moment in moments:
        attempts = folder / "killed" / "attempts"
        before = len(list(attempts.glob("????.json")))
        process = start_training(config, folder, "killed", folder)
        if wait_for(lambda: len(list(attempts.glob("????.json"))) > before, process):  # noqa: B023
            time.sleep(moment)
        hits += process.poll() is None
        kill(process, with_signal)
    return hits


def is_saving(run) -> bool:
    """Whether parts of a checkpoint of the newest attempt are there, and not yet its manifest."""
    newest = f"blobs/{max(run._attempts()):04d}-"
    named = {key for saved, manifest in run.readable(run.saved()).items() for key in saved.blobs(manifest)}
    return any(entry.key not in named for entry in run.store.entries("blobs/") if entry.key.startswith(newest))


def go_on(folder):
    """What `start_training` started and what was killed, in this process."""
    arguments = ["--config", str(folder / "config.json"), "--store", str(folder), "--run", "killed"]
    assert main(["train", *arguments]) == 0


def test_run_killed_at_random_moments_and_inside_a_save_equals_uninterrupted_run(tmp_path, capsys):
    whole = train_here(KILLED, tmp_path / "whole")
    moments = random.Random(4)
    assert kill_in_the_middle(KILLED, tmp_path, [moments.uniform(1, 2.5) for _ in range(3)]) == 3
    run = Run.at(tmp_path / "killed")
    process = start_training(KILLED, tmp_path, "killed", tmp_path)
    before = len(list((tmp_path / "killed" / "attempts").glob("????.json")))
    assert wait_for(lambda: len(list((tmp_path / "killed" / "attempts").glob("????.json"))) > before, process)
    assert wait_for(lambda: iterations(tmp_path / "killed"), process)
    assert wait_for(lambda: is_saving(run), process)
    kill(process)
    go_on(tmp_path)
    assert "goes on after" in capsys.readouterr().out
    assert_same_training(whole, last(tmp_path / "killed"))


def test_sigterm_saves_what_is_done_and_says_preempted(tmp_path):
    config = override(KILLED, {"collection": {"total_frames": 60_000}})
    process = start_training(config, tmp_path, "killed", tmp_path)
    assert wait_for(lambda: len(iterations(tmp_path / "killed")) > 2, process)
    output = kill(process, signal.SIGTERM)
    assert process.returncode == 143, output
    assert "[train] preempted: this process was asked to end" in output
    rows = len((tmp_path / "killed" / "history.csv").read_text().splitlines()) - 1
    assert iterations(tmp_path / "killed")[0] in (rows, rows - 1)  # the report of the last may have come, alone


def test_interrupted_training_says_how_to_go_on_and_does(tmp_path, capsys):
    process = start_training(KILLED, tmp_path, "killed", tmp_path)
    assert wait_for(lambda: len(iterations(tmp_path / "killed")) > 2, process)
    output = kill(process, signal.SIGINT)
    assert process.returncode == 130, output
    assert "interrupted; to go on, give the same command with --run killed" in output
    go_on(tmp_path)
    assert "goes on after" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", ["navigation", "balance", "swarm", "seed-document", "benchmarl-base"])
def test_run_killed_again_and_again_equals_uninterrupted_run(name, tmp_path):
    """Twelve kills each, at random moments: 60 in all."""
    config = small(recipe(name), collection={"total_frames": 60 * 400})
    finish(start_training(config, tmp_path, "whole", tmp_path))
    moments = random.Random(name)
    hits = kill_in_the_middle(config, tmp_path, [moments.uniform(0.05, 2.5) for _ in range(12)])
    finish(start_training(config, tmp_path, "killed", tmp_path))
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "killed"))
    print(f"{name}: {hits} of 12 kills hit training")
    assert hits >= 10


def test_resumed_run_equals_uninterrupted_run_when_all_is_fast(tmp_path, caplog):
    """With environments that end at different times, so that sets of fresh states are left half taken.

    The entropy bonus draws random numbers inside the compiled update.
    """
    caplog.set_level(logging.INFO, "mappo")
    environment = {"scenario": "dropout", "scenario_kwargs": {}}
    learner = {"update": "fast", "entropy_coefficient": 0.01, "minibatch_frames": 30}
    config = small(
        recipe("navigation"), environment=environment, learner=learner, collection={"simulation": "fast"}
    )
    assert_resumes_exactly(config, tmp_path)
    assert "the simulation is fast: compiled and checked in" in caplog.text


def test_run_that_cannot_be_fast_is_plain_and_says_why(tmp_path, caplog):
    environment = {"scenario": "tests.support.scenarios:HostBranch", "scenario_kwargs": {}}
    plain = small(recipe("navigation"), environment=environment)
    trained = run_training(plain, tmp_path / "plain")
    fast = run_training(override(plain, {"collection": {"simulation": "fast"}}), tmp_path / "fast")
    assert (
        "the simulation is plain: tests.support.scenarios:HostBranch cannot be compiled: Python depends on"
        in caplog.text
    )
    assert all(torch.equal(value, fast.tensors[name]) for name, value in trained.tensors.items())


@pytest.mark.long
def test_run_does_not_go_on_where_what_was_fast_cannot_be(tmp_path, monkeypatch):
    """Nor the other way round."""
    environment = {"scenario": "tests.support.scenarios:HostBranchIfAsked", "scenario_kwargs": {}}
    config = small(recipe("navigation"), environment=environment, collection={"simulation": "fast"})
    for begun, resumed, ways in (("", "yes", "'fast' and is 'plain'"), ("yes", "", "'plain' and is 'fast'")):
        monkeypatch.setenv("MAPPO_TEST_HOST_BRANCH", begun)
        with pytest.raises(Stopped):
            run_training(config, tmp_path / f"begun{begun}", stop_at=2)
        monkeypatch.setenv("MAPPO_TEST_HOST_BRANCH", resumed)
        with pytest.raises(CheckpointError, match=f"the simulation was {ways} here"):
            run_training(config, tmp_path / f"begun{begun}")
