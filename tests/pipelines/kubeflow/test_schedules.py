"""The schedules on a server that replaces nothing in parameters: stages fill in the time."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from kfp import dsl

from components.placeholders import fill
from components.prepare import prepare
from mappo.config import from_dict, require_run_name, to_json
from mappo.tuning.database import Database
from mappo.tuning.study import Study
from tests.conftest import TINY

SITE = ["--site", str(Path("k8s/site.yaml").absolute())]
FIRST, SECOND = (datetime(2026, 11, day, 2, 30, tzinfo=UTC).timestamp() for day in (28, 29))


@pytest.fixture
def config(kubeflow, tmp_path) -> list[str]:
    (tmp_path / "tiny.json").write_text(to_json(from_dict(TINY)))
    return ["--config", str(tmp_path / "tiny.json")]


def inputs(kubeflow, run_id: str, stage: str) -> dict:
    """Return the inputs that a stage's driver passes to the stage."""
    kubeflow.reach(run_id, stage)
    return kubeflow.executor_input_of(run_id, stage)["inputs"]["parameterValues"]


def names(kubeflow, run_id: str) -> list[str]:
    """Return the run's name in validation, in two attempts of training, and in evaluation."""
    stage_inputs = [inputs(kubeflow, run_id, stage) for stage in ("validate", "train")]
    kubeflow.retry_stage(run_id, "train")
    stage_inputs += [inputs(kubeflow, run_id, stage) for stage in ("train", "evaluate")]
    return [fill(parameters["run"], parameters["scheduled_at"]) for parameters in stage_inputs]


def test_all_stages_of_a_scheduled_training_use_the_same_legal_unique_name(kubeflow, read, config):
    flags = ["-p", "run=nightly-[[ScheduledTime]]", "-p", "store=s3://bucket/[[ScheduledTime]]"]
    job = read("schedule", "create", "nightly", "--cron", "30 2 * * *", *SITE, *config, *flags)["id"]
    for at, expected in ((FIRST, "nightly-20261128023000"), (SECOND, "nightly-20261129023000")):
        run_id = kubeflow.fire(job, at)
        parameters = read("runs", "show", run_id)["parameters"]
        assert parameters["run"] == "nightly-[[ScheduledTime]]"
        assert names(kubeflow, run_id) == [expected] * 4
        assert require_run_name(expected)
        assert kubeflow.finish(run_id) == "SUCCEEDED"


def test_the_name_of_an_unscheduled_run_contains_the_time_of_its_creation(kubeflow, read, config):
    flags = ["-p", "run=now-[[ScheduledTime]]", "-p", "store=s3://bucket/runs"]
    read("schedule", "create", "nightly", "--cron", "30 2 * * *", *SITE, *config, *flags)
    for command in (["submit", *SITE, *config, *flags], ["schedule", "trigger", "nightly"]):
        run = read(*command)
        (name,) = set(names(kubeflow, run["id"]))
        assert name == f"now-{run['created'].translate(str.maketrans('', '', '-: Z'))}"


def prepared(kubeflow, run_id: str, directory: Path) -> Study:
    """Run stage prepare with the inputs that its driver passes; return the study that the stage creates."""
    stage_inputs = inputs(kubeflow, run_id, "prepare")
    artifact = dsl.Artifact(uri=str(directory / run_id))
    arguments = {name: value for name, value in stage_inputs.items() if not name.startswith("pipelinechannel--")}
    name = prepare.python_func(**arguments, runs=artifact)
    return Study.load(Database(f"sqlite:///{directory}/studies.db"), name)


def test_each_edition_of_a_recurring_study_starts_with_the_best_trial_of_the_last_edition(
    monkeypatch, kubeflow, read, config, tmp_path
):
    monkeypatch.setenv("MAPPO_DATABASE", f"sqlite:///{tmp_path}/studies.db")
    study = ["--study", "weekly", "--edition", "[[ScheduledTime]]", "--trials", "4", "--tuning.pruner=none"]
    create = ["schedule", "create", "tuning", "--cron", "0 3 * * 6", *SITE, *config, *study]
    job = read(*create, "-p", "store=s3://bucket/[[ScheduledTime]]")["id"]

    first = prepared(kubeflow, run_id := kubeflow.fire(job, FIRST), tmp_path)
    assert (first.name, first.num_trials) == ("weekly-20261128023000", 4)
    assert first.store.startswith("s3://bucket/20261128023000/")
    for value, worker in enumerate(["a", "b", "c", "d"]):
        first.claim(worker).finish("complete", float(-((value - 2) ** 2)))
    assert first.best().number == 2
    assert kubeflow.finish(run_id) == "SUCCEEDED"

    second = prepared(kubeflow, kubeflow.fire(job, SECOND), tmp_path)
    assert second.name == "weekly-20261129023000"
    assert [trial.origin for trial in second.trials()][1] == "warm start"
    assert second.trials()[1].values == first.best().values
