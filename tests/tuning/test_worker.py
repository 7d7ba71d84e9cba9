"""The workers in separate processes, which the tests kill; the results are those of an undisturbed study."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from mappo.__main__ import main
from mappo.compute.computation import Computation
from mappo.compute.library_cache import cache_directory
from mappo.config import from_dict, override
from mappo.environment.random_streams import Stream
from mappo.errors import StoreError
from mappo.evaluation.constraints import Constraint
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.evaluation.measurements import Measurer
from mappo.evaluation.statistics import mean
from mappo.runs.locations import joined
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import IntRange, applied, default_space
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig
from mappo.tuning.worker import RunListeners, TrialListeners, fresh_seeds, trial_run, work
from tests.conftest import TINY
from tests.support.services import free_ports, postgres, wait

CONFIG = override(from_dict(TINY), {"collection": {"total_frames": 720}, "selection": {"interval_iterations": 1}})
TUNING = TuningConfig(evaluation_seeds=(5, 6), episodes_per_seed=4, grace_seconds=4, pruner="none")
PLAN = Plan(CONFIG, default_space(CONFIG), TUNING)
LONG = replace(PLAN, config=override(CONFIG, {"collection": {"total_frames": 1440}}))  # a few seconds a trial


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/studies.db")
    yield database
    database.close()


def trial_listeners(tmp_path: Path, ended: list) -> TrialListeners:
    """Return listeners that add the end of each trial to `ended`."""

    def run(claim, config, _):
        history = HistoryFile(tmp_path / "histories" / f"{claim.number}-{config.seed}.csv")
        return nullcontext(RunListeners(history, lambda _: None, lambda _: None, lambda _: None))

    return TrialListeners(run, lambda claim, outcome, reason: ended.append((claim.number, outcome, reason)))


def summary(study: Study) -> list[tuple]:
    """Return the results of a study, which must not depend on how often workers were killed."""
    return [(trial.number, trial.state, trial.value, trial.values, trial.curve) for trial in study.trials()]


def test_a_trials_value_is_the_mean_return_of_its_runs_on_tuning_seeds(database, tmp_path):
    plan = replace(PLAN, tuning=replace(TUNING, training_seeds=(3, 4)))
    study = Study.prepare(database, "s", plan, 2, store=str(tmp_path))
    ended: list = []
    assert work(study, "w", trial_listeners(tmp_path, ended)) == 2
    assert [(number, outcome) for number, outcome, _ in ended] == [(0, "complete"), (1, "complete")]
    for trial in study.trials():
        config = applied(CONFIG, trial.values)
        returns = []
        for seed in (3, 4):
            run = Run.at(joined(study.store, trial_run(trial.number, trial.values, seed)))
            best = run.load(run.choose("best"))
            assert best.config == replace(config, seed=seed)
            episodes = replace(config.evaluation, seeds=(5, 6), episodes_per_seed=4)
            returns += play_episodes(trained_policy(config, best), config, episodes, Stream.TUNING)[0]
        assert trial.value == pytest.approx(sum(returns) / len(returns))
        frames = CONFIG.collection.frames_per_batch
        assert list(trial.curve) == [frames * iteration for iteration in range(1, 13)]


def test_constraints_of_a_trial_are_measured_in_the_episodes_that_give_its_value(database, tmp_path):
    constraints = {"agent_collisions": Constraint(at_least=0.0), "final_rew": Constraint(at_most=9.0)}
    plan = replace(PLAN, tuning=replace(TUNING, training_seeds=(3, 4), constraints=constraints))
    study = Study.prepare(database, "s", plan, 1, store=str(tmp_path))
    ended: list = []
    work(study, "w", trial_listeners(tmp_path, ended))
    (trial,) = study.trials()
    returns, measured = [], []
    for seed in (3, 4):
        config = replace(CONFIG, seed=seed)
        best = Run.at(joined(study.store, trial_run(0, trial.values, seed)))
        episodes, measurer = replace(config.evaluation, seeds=(5, 6), episodes_per_seed=4), Measurer()
        policy = trained_policy(config, best.load(best.choose("best")))
        returns += play_episodes(policy, config, episodes, Stream.TUNING, measurer.measure_frame)[0]
        measured.append(measurer.measurements(mean))
    assert trial.value == pytest.approx(sum(returns) / len(returns))
    for name in constraints:
        values = [value for of_seed in measured for value in of_seed[name].episode_values]
        assert trial.measured[name] == pytest.approx(sum(values) / len(values))
    is_hit = trial.measured["agent_collisions"] < 0
    assert trial.broken == ["agent_collisions"] * is_hit
    assert ("infeasible: agent_collisions = -" in ended[0][2]) == is_hit


@pytest.mark.long
def test_trials_compile_once_however_short_they_are(database, tmp_path, monkeypatch):
    monkeypatch.setattr("mappo.compute.computation_choice._multiplies_bfloat16", lambda _: False)
    auto = override(CONFIG, {"collection": {"simulation": "auto"}, "learner": {"update": "auto"}})
    study = Study.prepare(database, "s", replace(PLAN, config=auto), 3, store=str(tmp_path))
    libraries, counts = cache_directory() / "libraries", list[int]()

    def ended(*_: object) -> None:
        counts.append(len([path for path in libraries.iterdir() if path.suffix != ".lock"]))

    work(study, "w", replace(trial_listeners(tmp_path, []), on_end=ended))
    assert len(counts) == 3
    assert len({*counts}) == 1, "a later trial compiled"
    for trial in study.trials():
        run = Run.at(joined(study.store, trial_run(trial.number, trial.values, 0)))
        assert run.load(run.choose("best")).computation == Computation("fast", "fast", "fast")


def test_a_trial_with_impossible_values_fails_with_the_reason_and_the_others_continue(database, tmp_path):
    small = override(CONFIG, {"learner": {"minibatch_frames": 20}, "collection": {"total_frames": 120}})
    space = {
        "learner.minibatch_frames": IntRange("int", 10, 100),
        "collection.rollout_frames": IntRange("int", 4, 20),
    }
    study = Study.prepare(database, "s", Plan(small, space, TUNING), 8, store=str(tmp_path))
    work(study, "w", trial_listeners(tmp_path, []))
    failed = [trial for trial in study.trials() if trial.state == "failed"]
    assert failed
    assert {trial.state for trial in study.trials()} == {"complete", "failed"}
    for trial in failed:
        batch = 6 * trial.values["collection.rollout_frames"]
        assert trial.values["learner.minibatch_frames"] > batch
        assert f"a batch has only {batch} frames" in trial.reason


@pytest.mark.parametrize(
    ("scenario", "reason"), [("Crashing", "RuntimeError: on purpose"), ("MissingFile", "FileNotFoundError")]
)
def test_a_crash_in_a_scenario_fails_the_trial_and_not_the_worker(database, tmp_path, scenario, reason):
    config = override(
        CONFIG, {"environment": {"scenario": f"tests.support.scenarios:{scenario}", "scenario_kwargs": {}}}
    )
    study = Study.prepare(database, "s", replace(PLAN, config=config), 2, store=str(tmp_path))
    assert work(study, "w", trial_listeners(tmp_path, [])) == 2
    assert [trial.state for trial in study.trials()] == ["failed", "failed"]
    assert study.trials()[0].reason.startswith(reason)
    assert "(scenarios.py:" in study.trials()[0].reason


def test_a_store_that_fails_releases_the_trial_and_ends_the_worker(database, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    study = Study.prepare(database, "s", PLAN, 2, store=str(blocked))
    with pytest.raises(StoreError, match="Not a directory"):
        work(study, "w", trial_listeners(tmp_path, []))
    (trial,) = study.trials()
    assert (trial.state, trial.attempts[0].outcome) == ("waiting", "released")


def test_a_trial_that_hangs_fails_and_the_worker_goes_on_with_the_next(database, tmp_path):
    config = override(CONFIG, {"collection": {"total_frames": 120}})
    plan = replace(PLAN, config=config, tuning=replace(TUNING, grace_seconds=2, trial_hours=5 / 3600))
    study = Study.prepare(database, "s", plan, 2, store=str(tmp_path))
    ended: list = []
    listeners = trial_listeners(tmp_path, ended)

    @contextmanager
    def run(claim, config, run):
        with listeners.run(claim, config, run) as run_listeners:
            yield replace(run_listeners, on_report=lambda _: claim.number or time.sleep(600))

    assert work(study, "w", replace(listeners, run=run)) == 2
    reason = "took longer than tuning.trial_hours = 0.00138889, or hung"
    assert ended[0] == (0, "failed", reason)
    assert [(trial.state, trial.reason) for trial in study.trials()] == [("failed", reason), ("complete", "")]
    assert [len(trial.attempts) for trial in study.trials()] == [1, 1]


class PruneAt(optuna.pruners.BasePruner):
    """A pruner that ends every other trial at one step."""

    def __init__(self, step: int):
        self.step = step

    def prune(self, study, trial) -> bool:
        return trial.number % 2 == 1 and trial.last_step == self.step


@pytest.mark.parametrize("rung", range(1, 3))
def test_a_pruned_trial_ends_at_its_rung_and_the_study_continues(database, tmp_path, rung):
    config = override(CONFIG, {"collection": {"total_frames": 360}})
    study = Study.prepare(database, "s", replace(PLAN, config=config), 3, store=str(tmp_path))
    study._study.pruner = PruneAt(120 * rung)
    ended: list = []
    work(study, "w", trial_listeners(tmp_path, ended))
    assert [trial.state for trial in study.trials()] == ["complete", "pruned", "complete"]
    assert list(study.trials()[1].curve) == [120 * iteration for iteration in range(1, rung + 1)]
    assert ended[1] == (1, "pruned", f"after {120 * rung} frames, by none")


def test_a_trial_that_was_trained_to_its_end_is_never_pruned(database, tmp_path):
    config = override(CONFIG, {"collection": {"total_frames": 360}})
    study = Study.prepare(database, "s", replace(PLAN, config=config), 2, store=str(tmp_path))
    study._study.pruner = PruneAt(360)
    work(study, "w", trial_listeners(tmp_path, []))
    assert [trial.state for trial in study.trials()] == ["complete", "complete"]
    assert 360 in study.trials()[1].curve


def test_a_trial_reports_one_value_per_training_seed_when_the_pruner_is_wilcoxon(database, tmp_path):
    tuning = replace(TUNING, pruner="wilcoxon", training_seeds=(3, 4, 5, 6))
    config = override(CONFIG, {"collection": {"total_frames": 120}})
    study = Study.prepare(database, "s", Plan(config, default_space(config), tuning), 1, store=str(tmp_path))
    work(study, "w", trial_listeners(tmp_path, []))
    (trial,) = study.trials()
    assert list(trial.curve) == [0, 1, 2, 3]
    assert trial.value == pytest.approx(sum(trial.curve.values()) / 4)


def test_fresh_seeds_differ_from_training_seeds_and_are_the_same_for_a_study(database, tmp_path):
    study = Study.prepare(database, "s", PLAN, 2, store=str(tmp_path))
    seeds = fresh_seeds(study, 5)
    assert len(set(seeds)) == 5
    assert seeds == fresh_seeds(Study.load(database, "s"), 5)
    assert not set(seeds) & set(PLAN.tuning.training_seeds)
    assert fresh_seeds(study, 3) == seeds[:3]


@contextmanager
def worker(url: str, directory: Path, name: str = "s") -> Iterator[subprocess.Popen]:
    """Run `mappo study work` in a separate process."""
    environment = {**os.environ, "MAPPO_DATABASE": url}
    with (directory / "worker.log").open("a") as log:
        command = [sys.executable, "-m", "mappo", "study", "work", name]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def reports(study: Study) -> int:
    return sum(len(trial.curve) for trial in study.trials())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    """Return the results of a study of two trials that no test disturbs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    database = Database(f"sqlite:///{directory}/studies.db")
    study = Study.prepare(database, "s", LONG, 2, store=str(directory))
    work(study, "w", trial_listeners(directory, []))
    results = summary(study)
    database.close()
    return results


def finish_here(url: str, capfd, monkeypatch) -> str:
    """Run `mappo study work` in this process to the end of the study; return what it printed."""
    monkeypatch.setenv("MAPPO_DATABASE", url)
    monkeypatch.setattr("mappo.tuning.worker._POLL_SECONDS", 0.5)
    status, printed = main(["study", "work", "s"]), "".join(capfd.readouterr())
    assert status == 0, printed
    return printed


def test_another_worker_continues_the_trial_of_a_killed_worker_from_its_checkpoint(
    server, tmp_path, undisturbed, capfd, monkeypatch
):
    url = server.create("killed")
    database = Database(url)
    study = Study.prepare(database, "s", LONG, 2, store=str(tmp_path))
    with worker(url, tmp_path) as first:
        wait(lambda: reports(study) > 5, 60, "no report")
        first.kill()
    printed = finish_here(url, capfd, monkeypatch)
    assert summary(study) == undisturbed
    outcomes = [[turn.outcome for turn in trial.attempts] for trial in study.trials()]
    assert sorted(outcomes, key=len)[-1] == ["lost", "complete"]
    assert sum(len(turns) for turns in outcomes) == 3
    assert "resumed after" in printed
    database.close()


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_worker_releases_its_trial_at_once_when_it_receives_a_signal(
    tmp_path, database, undisturbed, capfd, monkeypatch, signal_number, status
):
    study = Study.prepare(database, "s", LONG, 2, store=str(tmp_path))
    url = f"sqlite:///{tmp_path}/studies.db"
    with worker(url, tmp_path) as process:
        wait(lambda: reports(study) > 3, 60, "no report")
        process.send_signal(signal_number)
        assert process.wait(timeout=30) == status
    assert "running" not in {trial.state for trial in study.trials()}
    finish_here(url, capfd, monkeypatch)
    assert summary(study) == undisturbed
    assert {turn.outcome for trial in study.trials() for turn in trial.attempts} == {"released", "complete"}


def test_a_worker_whose_database_dies_ends_with_one_line_and_loses_nothing(
    server, tmp_path, undisturbed, monkeypatch, capfd
):
    """The database dies while a trial is trained, and answers again when the worker has given up."""
    url = server.create("dies")
    database = Database(url)
    study = Study.prepare(database, "s", LONG, 2, store=str(tmp_path))
    monkeypatch.setenv("MAPPO_DATABASE", url)
    monkeypatch.setattr("mappo.tuning.database._PATIENCE_SECONDS", 2.0)

    def stop_database() -> None:
        wait(lambda: reports(study) > 3, 60, "no report")
        server.stop()

    try:
        with ThreadPoolExecutor(1) as threads:
            stopped = threads.submit(stop_database)
            started = time.monotonic()
            assert main(["study", "work", "s"]) == 1
            stopped.result()
            assert time.monotonic() - started < 60
    finally:
        server.start()
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown
    assert len(re.findall(r"failed: postgresql.*mappo:\*\*\*@127.0.0.1", shown)) == 1, shown
    assert shown.count("trying again for 2 s") <= 2, shown
    finish_here(url, capfd, monkeypatch)
    assert summary(study) == undisturbed
    database.close()


def test_a_worker_without_a_database_ends_with_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("mappo.tuning.database._CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("MAPPO_DATABASE", f"postgresql://mappo:a-password@127.0.0.1:{free_ports(1)[0]}/name")
    assert main(["study", "work", "s"]) == 1
    lines = "".join(capfd.readouterr()).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["[tune] warning", "[tune] failed"]
    assert "trying again for 1 s" in lines[0]


@pytest.mark.long
def test_two_workers_survive_a_restart_of_the_database(server, tmp_path, undisturbed):
    url = server.create("restarted_below_workers")
    database = Database(url)
    study = Study.prepare(database, "s", LONG, 2, store=str(tmp_path))
    with worker(url, tmp_path) as first, worker(url, tmp_path) as second:
        wait(lambda: reports(study) > 5, 60, "no report")
        server.stop("immediate")
        time.sleep(1)
        server.start()
        for process in (first, second):
            assert process.wait(timeout=120) == 0, (tmp_path / "worker.log").read_text()
    assert summary(study) == undisturbed
    database.close()


@pytest.mark.long
def test_a_study_survives_kills_of_workers_and_database_at_random(server, tmp_path):
    """A worker or the database is killed every few seconds; every trial still ends once, with the same results."""
    url, generator = server.create("random_kills"), random.Random(1)
    database = Database(url)
    tuning = replace(TUNING, max_losses=1000)
    plan = replace(LONG, tuning=tuning)
    study = Study.prepare(database, "s", plan, 10, store=str(tmp_path))
    kills = {"worker": 0, "database": 0}
    processes: list[subprocess.Popen] = []
    command = [sys.executable, "-m", "mappo", "study", "work", "s"]
    environment = {**os.environ, "MAPPO_DATABASE": url}
    deadline = time.monotonic() + 900
    with (tmp_path / "worker.log").open("a") as log:
        while not (study.is_settled() and all(trial.state == "complete" for trial in study.trials())):
            assert time.monotonic() < deadline, summary(study)
            processes = [process for process in processes if process.poll() is None]
            while len(processes) < 2:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            time.sleep(generator.uniform(3, 8))
            if sum(kills.values()) >= 24:
                continue
            if generator.random() < 0.25:
                server.stop("immediate")
                time.sleep(generator.uniform(0, 3))
                server.start()
                kills["database"] += 1
            else:
                generator.choice(processes).kill()
                kills["worker"] += 1
    for process in processes:
        process.kill()
        process.wait()
    calm_database = Database(f"sqlite:///{tmp_path}/calm.db")
    reference = Study.prepare(calm_database, "s", plan, 10, store=str(tmp_path / "calm"))
    work(reference, "w", trial_listeners(tmp_path / "calm", []))
    assert summary(study) == summary(reference)
    print(kills, [len(trial.attempts) for trial in study.trials()])
    calm_database.close()
    database.close()
