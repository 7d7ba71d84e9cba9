"""The equality of resumed and uninterrupted training: parameters, optimiser, random states, history."""

import logging
import random
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from mappo.__main__ import main
from mappo.compute.computation import PLAIN, Computation
from mappo.config import ExperimentConfig, from_dict, override
from mappo.errors import CheckpointError, ConfigError
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
    """Return a configuration of five iterations, half a second in total, with episodes longer than a batch."""
    return override(
        config,
        {
            "environment": {"max_episode_frames": 8},
            "networks": {"hidden_sizes": [16]},
            "learner": {"epochs": 2, "minibatch_frames": 24, "chunk_frames": 3, "update": "plain"},
            "collection": {"num_envs": 10, "rollout_frames": 6, "total_frames": 300, "simulation": "plain"},
            "selection": {"interval_iterations": 2, "episodes_per_seed": 2},
        },
        changes,
    )


def run_training(config, directory, stop_at=None, start=None):
    """Train in this process, and raise `Stopped` in the iteration `stop_at`."""

    def on_report(report):
        if report.progress.iteration == stop_at:
            raise Stopped

    return train_here(config, directory, on_report, start)


def assert_resumes_exactly(config, tmp_path, stops=(2, 4), start=None):
    whole = run_training(config, tmp_path / "whole", start=start)
    for stop in stops:
        with pytest.raises(Stopped):
            run_training(config, tmp_path / "stopped", stop, start)
        torch.rand(3)  # random numbers that the process draws between the attempts must not matter
    resumed = run_training(config, tmp_path / "stopped", start=start)
    assert_same_training(whole, resumed)
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "stopped"))
    assert (tmp_path / "stopped" / "history.csv").read_text() == resumed.history


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("navigation", "swarm") else pytest.mark.long) for name in RECIPES],
)
def test_resumed_run_equals_uninterrupted_run_for_every_recipe(name, tmp_path):
    assert_resumes_exactly(small(recipe(name)), tmp_path)


LONG = partial(pytest.param, marks=pytest.mark.long)  # a case of the same kind is not long


@pytest.mark.parametrize(
    "changes",
    [
        LONG({"environment": {"scenario": "balance", "scenario_kwargs": {"n_agents": 3}}}),
        {"environment": {"scenario": "simple_reference", "scenario_kwargs": {}, "actions": "multi-discrete"}},
        {"environment": {"scenario": "tests.support.scenarios:ManyKindsOfState", "scenario_kwargs": {}}},
        LONG({"environment": {"scenario": "tests.support.scenarios:OddInfo", "scenario_kwargs": {}}}),
        {"environment": {"max_episode_frames": 5}, "learner": {"target_kl": 1e-4}},
        {"environment": {"max_episode_frames": 1_000}, "selection": {"interval_iterations": 0}},
        {"networks": {"normalise_observations": True, "normalise_values": True, "share_policy": False}},
        LONG({"networks": {"critic": "own", "normalise_values": True}}),
        LONG({"networks": {"memory": "gru", "normalise_observations": True, "normalise_values": True}}),
        {"networks": {"memory": "gru", "critic": "own", "share_policy": False}, "learner": {"epochs": 1}},
        {"environment": {"scenario": "tests.support.scenarios:FixedComponent", "scenario_kwargs": {}}},
        {"learner": {"learning_rate_schedule": "constant", "advantage_normalisation": "agent", "epochs": 1}},
    ],
    ids=lambda changes: str(changes).translate(str.maketrans("", "", "{}'\" "))[:60],
)
def test_resumed_run_equals_uninterrupted_run_for_every_configuration(changes, tmp_path):
    assert_resumes_exactly(small(from_dict(TINY), **changes), tmp_path, stops=(3,))


@pytest.mark.parametrize("kind", ["extend", "warm-start"])
def test_resumed_run_equals_uninterrupted_run_when_it_did_not_start_from_scratch(kind, tmp_path):
    config = small(from_dict(TINY))
    first = run_training(config, tmp_path / "first")
    longer = override(config, {"collection": {"total_frames": 600}}) if kind == "extend" else config
    stops = (6, 9) if kind == "extend" else (1, 4)
    assert_resumes_exactly(longer, tmp_path, stops, StartingPoint(kind, first))


def test_finished_run_is_not_changed(tmp_path):
    config = small(from_dict(TINY))
    whole = run_training(config, tmp_path)
    keys = [entry.key for entry in Run.at(tmp_path).store.entries("checkpoints/")]
    assert_same_training(run_training(config, tmp_path), whole)
    assert [entry.key for entry in Run.at(tmp_path).store.entries("checkpoints/")] == keys


def test_resumed_run_uses_the_previous_number_of_threads(tmp_path):
    config = small(from_dict(TINY), threads=0, collection={"total_frames": 120})
    torch.set_num_threads(2)
    try:
        with pytest.raises(Stopped):
            run_training(config, tmp_path, 2)
        torch.set_num_threads(1)
        assert run_training(config, tmp_path).platform.threads == 2
    finally:
        torch.set_num_threads(1)


def test_resuming_with_another_version_logs_that_results_differ(tmp_path, monkeypatch, caplog):
    config = small(from_dict(TINY))
    monkeypatch.setattr("mappo.__version__", "0.0.1")
    with pytest.raises(Stopped):
        run_training(config, tmp_path, 3)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        run_training(config, tmp_path)
    assert "results will not be bit-identical: mappo 0.0.1 -> " in caplog.text


KILLED = small(
    from_dict(TINY),
    collection={"total_frames": 60 * 60},
    learner={"target_kl": 0.05},
    networks={"normalise_observations": True, "normalise_values": True},
)


def kill_in_the_middle(config, folder, moments, with_signal=signal.SIGKILL):
    """Kill training at several moments, in seconds after the start of an attempt; return how many kills hit it."""
    hits = 0
    for moment in moments:
        attempts = folder / "killed" / "attempts"
        num_attempts = len(list(attempts.glob("????.json")))
        process = start_training(config, folder, "killed", folder)
        if wait_for(lambda: len(list(attempts.glob("????.json"))) > num_attempts, process):  # noqa: B023
            time.sleep(moment)
        hits += process.poll() is None
        kill(process, with_signal)
    return hits


def is_saving(run) -> bool:
    """Return whether the newest attempt has saved parts of a checkpoint, but not yet the manifest."""
    newest = f"blobs/{run.attempts.numbers()[0]:04d}-"
    named = {key for saved, manifest in run.readable(run.refs()).items() for key in saved.blobs(manifest)}
    return any(entry.key not in named for entry in run.store.entries("blobs/") if entry.key.startswith(newest))


def resume(folder):
    """Resume in this process the run that `start_training` started and a test killed."""
    arguments = ["--config", str(folder / "config.json"), "--store", str(folder), "--run", "killed"]
    assert main(["train", *arguments]) == 0


def test_run_killed_at_random_moments_and_inside_a_save_equals_uninterrupted_run(tmp_path, capsys):
    whole = train_here(KILLED, tmp_path / "whole")
    moments = random.Random(4)
    assert kill_in_the_middle(KILLED, tmp_path, [moments.uniform(0.4, 1.2) for _ in range(2)]) == 2
    run = Run.at(tmp_path / "killed")
    process = start_training(KILLED, tmp_path, "killed", tmp_path)
    num_attempts = len(list((tmp_path / "killed" / "attempts").glob("????.json")))
    assert wait_for(
        lambda: len(list((tmp_path / "killed" / "attempts").glob("????.json"))) > num_attempts, process
    )
    assert wait_for(lambda: iterations(tmp_path / "killed"), process)
    assert wait_for(lambda: is_saving(run), process)
    kill(process)
    resume(tmp_path)
    assert "resumed after" in capsys.readouterr().out
    assert_same_training(whole, last(tmp_path / "killed"))


def test_training_saves_its_progress_and_logs_preempted_when_it_receives_sigterm(tmp_path):
    config = override(KILLED, {"collection": {"total_frames": 60_000}})
    process = start_training(config, tmp_path, "killed", tmp_path)
    assert wait_for(lambda: len(iterations(tmp_path / "killed")) > 2, process)
    output = kill(process, signal.SIGTERM)
    assert process.returncode == 143, output
    assert "[train] preempted: this process received SIGTERM" in output
    rows = len((tmp_path / "killed" / "history.csv").read_text().splitlines()) - 1
    assert iterations(tmp_path / "killed")[0] in (rows, rows - 1)  # the last row may have no checkpoint yet


def test_interrupted_training_prints_how_to_resume_and_resumes(tmp_path, capsys):
    process = start_training(KILLED, tmp_path, "killed", tmp_path)
    assert wait_for(lambda: len(iterations(tmp_path / "killed")) > 2, process)
    output = kill(process, signal.SIGINT)
    assert process.returncode == 130, output
    assert "interrupted; to resume, give the same command with --run killed" in output
    resume(tmp_path)
    assert "resumed after" in capsys.readouterr().out


def test_process_that_was_stopped_and_overtaken_stops_and_changes_nothing(tmp_path, capsys):
    run = Run.at(tmp_path / "killed")
    process = start_training(KILLED, tmp_path, "killed", tmp_path)
    assert wait_for(lambda: len(iterations(tmp_path / "killed")) > 2, process)
    process.send_signal(signal.SIGSTOP)
    resume(tmp_path)
    assert "resumed after" in capsys.readouterr().out
    history = (tmp_path / "killed" / "history.csv").read_text()
    output = kill(process, signal.SIGCONT)
    assert process.returncode == 1, output
    assert "attempt 2 of this run has begun on" in output
    assert (tmp_path / "killed" / "history.csv").read_text() == history
    rows = history.splitlines()[1:]
    assert [int(row.partition(",")[0]) for row in rows] == list(range(1, 61))
    newest, *_ = run.refs()
    assert (newest.attempt, newest.iteration) == (2, 60)


@pytest.mark.long
@pytest.mark.parametrize("name", ["navigation", "balance", "swarm", "seed-document", "benchmarl-base"])
def test_run_killed_many_times_equals_uninterrupted_run(name, tmp_path):
    """Kill each run twelve times at random moments: 60 kills in total."""
    config = small(recipe(name), collection={"total_frames": 60 * 400})
    finish(start_training(config, tmp_path, "whole", tmp_path))
    moments = random.Random(name)
    hits = kill_in_the_middle(config, tmp_path, [moments.uniform(0.05, 2.5) for _ in range(12)])
    finish(start_training(config, tmp_path, "killed", tmp_path))
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "killed"))
    print(f"{name}: {hits} of 12 kills hit training")
    assert hits >= 10


FAST = small(
    recipe("navigation"),
    environment={"scenario": "dropout", "scenario_kwargs": {"n_agents": 2}},
    learner={"update": "fast", "entropy_coefficient": 0.01, "minibatch_frames": 30},
    collection={"simulation": "fast"},
)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_resumed_run_equals_uninterrupted_run_when_simulation_and_update_are_fast(
    tmp_path, caplog, request, is_compiled
):
    """Environments end at different times, so that the pool of fresh states holds sets of which some are taken.

    The entropy bonus draws random numbers inside the traced update.
    """
    if not is_compiled:
        request.getfixturevalue("traced_only")
    caplog.set_level(logging.INFO, "mappo")
    assert_resumes_exactly(FAST, tmp_path)
    assert "the simulation is fast: compiled and checked in" in caplog.text


@pytest.mark.usefixtures("traced_only")
def test_resumed_run_goes_on_as_it_began_whatever_auto_would_choose_now(tmp_path):
    named = override(FAST, {"collection": {"simulation": "plain"}})
    left_open = override(named, {"learner": {"update": "auto"}, "collection": {"simulation": "auto"}})
    other = override(named, {"learner": {"update": "plain"}})
    whole = run_training(named, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_training(named, tmp_path / "stopped", stop_at=2)
    with pytest.raises(ConfigError, match="learner.update = plain: the run began with fast; use auto or fast"):
        run_training(other, tmp_path / "stopped")
    resumed = run_training(left_open, tmp_path / "stopped")
    assert resumed.computation == whole.computation == Computation(simulation="plain", update="fast")
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


@pytest.mark.long
def test_run_is_plain_and_logs_the_reason_when_the_compiler_fails(tmp_path, monkeypatch, caplog):
    """The compiler is found, and it does not work."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr("mappo.compute.computation_choice.LEAST_OPTIMISER_STEPS", 1)
    auto = {"learner": {"update": "auto"}, "collection": {"simulation": "auto"}}
    environment = {"scenario": "tests.support.scenarios:MaskedWrites", "scenario_kwargs": {}}
    networks = {"hidden_sizes": [17]}  # nothing of it is in the cache
    config = small(recipe("navigation"), environment=environment, networks=networks, **auto)
    trained = run_training(config, tmp_path / "auto")
    assert "simulation plain, update plain, because compilation failed: " in caplog.text
    plain = override(config, {"learner": {"update": "plain"}, "collection": {"simulation": "plain"}})
    expected = run_training(plain, tmp_path / "plain")
    assert trained.computation == PLAIN
    assert all(torch.equal(value, trained.tensors[name]) for name, value in expected.tensors.items())


def test_run_is_plain_and_logs_the_reason_when_it_cannot_be_fast(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mappo")
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
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_that_ends_during_compilation_leaves_no_compiler_and_starts_again(tmp_path, number):
    fast = {"learner": {"update": "fast"}, "collection": {"simulation": "fast"}}
    config = small(recipe("navigation"), environment={"scenario": "dropout", "scenario_kwargs": {}}, **fast)
    libraries = tmp_path / "cache" / "libraries"
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start_training(config, tmp_path, "killed", tmp_path, **variables)
    assert wait_for(lambda: len(list(libraries.glob("building-*"))) > 1, process)
    time.sleep(5)
    kill(process, number)
    deadline = time.monotonic() + 20
    while compilers_in(libraries):
        assert time.monotonic() < deadline, "the compiler works on for a process that has ended"
        time.sleep(0.2)
    finish(start_training(config, tmp_path, "killed", tmp_path, **variables))
    finish(start_training(config, tmp_path, "whole", tmp_path, **variables))
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "killed"))


def compilers_in(directory):
    """Return the processes of the compiler that write below a directory."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(file.read_bytes().decode(errors="replace"))
    return [command for command in commands if "mappo.compute.compiler" in command and str(directory) in command]


@pytest.mark.long
def test_resuming_is_refused_when_the_simulation_would_be_another(tmp_path, monkeypatch):
    environment = {"scenario": "tests.support.scenarios:HostBranchIfAsked", "scenario_kwargs": {}}
    config = small(recipe("navigation"), environment=environment, collection={"simulation": "fast"})
    for first, second, ways in (("", "yes", "'fast' and is 'plain'"), ("yes", "", "'plain' and is 'fast'")):
        monkeypatch.setenv("MAPPO_TEST_HOST_BRANCH", first)
        with pytest.raises(Stopped):
            run_training(config, tmp_path / f"first{first}", stop_at=2)
        monkeypatch.setenv("MAPPO_TEST_HOST_BRANCH", second)
        with pytest.raises(CheckpointError, match=f"the simulation was {ways} here"):
            run_training(config, tmp_path / f"first{first}")
