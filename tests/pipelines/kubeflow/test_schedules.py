"""Schedules on a server that replaces nothing in parameters: the stages put in the time that the driver gives."""

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
    """The inputs of a stage as its driver gives them."""
    kubeflow.reach(run_id, stage)
    return kubeflow.driver_outputs_of(run_id, stage)["inputs"]["parameterValues"]


def names(kubeflow, run_id: str) -> list[str]:
    """The name of the run in each stage of training, the third time in a second attempt of training."""
    found = [inputs(kubeflow, run_id, stage) for stage in ("validate", "train")]
    kubeflow.retry_stage(run_id, "train")
    found += [inputs(kubeflow, run_id, stage) for stage in ("train", "evaluate")]
    return [fill(given["run"], given["scheduled_at"]) for given in found]


def test_a_nightly_training_has_a_legal_name_of_its_own_that_all_its_stages_agree_on(kubeflow, read, config):
    given = ["-p", "run=nightly-[[ScheduledTime]]", "-p", "store=s3://bucket/[[ScheduledTime]]"]
    job = read("schedule", "create", "nightly", "--cron", "30 2 * * *", *SITE, *config, *given)["id"]
    for at, expected in ((FIRST, "nightly-20261128023000"), (SECOND, "nightly-20261129023000")):
        run_id = kubeflow.fire(job, at)
        shown = read("runs", "show", run_id)["parameters"]
        assert shown["run"] == "nightly-[[ScheduledTime]]"
        assert names(kubeflow, run_id) == [expected] * 4
        assert require_run_name(expected)
        assert kubeflow.finish(run_id) == "SUCCEEDED"


def test_a_run_that_is_not_scheduled_is_named_by_the_time_of_its_creation(kubeflow, read, config):
    given = ["-p", "run=now-[[ScheduledTime]]", "-p", "store=s3://bucket/runs"]
    read("schedule", "create", "nightly", "--cron", "30 2 * * *", *SITE, *config, *given)
    for command in (["submit", *SITE, *config, *given], ["schedule", "trigger", "nightly"]):
        made = read(*command)
        (name,) = set(names(kubeflow, made["id"]))
        assert name == f"now-{made['created'].translate(str.maketrans('', '', '-: Z'))}"


def prepared(kubeflow, run_id: str, directory: Path) -> Study:
    """The study that stage prepare makes of the inputs that its driver gives."""
    given = inputs(kubeflow, run_id, "prepare")
    artifact = dsl.Artifact(uri=str(directory / run_id))
    own = {name: value for name, value in given.items() if not name.startswith("pipelinechannel--")}
    name = prepare.python_func(**own, runs=artifact)
    return Study.load(Database(f"sqlite:///{directory}/studies.db"), name)


def test_each_edition_of_a_recurring_study_begins_with_the_best_of_the_last(
    monkeypatch, kubeflow, read, config, tmp_path
):
    monkeypatch.setenv("MAPPO_DATABASE", f"sqlite:///{tmp_path}/studies.db")
    study = ["--study", "weekly", "--edition", "[[ScheduledTime]]", "--trials", "4", "--tuning.pruner=none"]
    create = ["schedule", "create", "tuning", "--cron", "0 3 * * 6", *SITE, *config, *study]
    job = read(*create, "-p", "store=s3://bucket/[[ScheduledTime]]")["id"]

    first = prepared(kubeflow, run_id := kubeflow.fire(job, FIRST), tmp_path)
    assert (first.name, first.num_trials) == ("weekly-20261128023000", 4)
    assert first.place.startswith("s3://bucket/20261128023000/")
    for value, worker in enumerate(["a", "b", "c", "d"]):
        first.claim(worker).finish("complete", float(-((value - 2) ** 2)))
    assert first.best().number == 2
    assert kubeflow.finish(run_id) == "SUCCEEDED"

    second = prepared(kubeflow, kubeflow.fire(job, SECOND), tmp_path)
    assert second.name == "weekly-20261129023000"
    assert [trial.origin for trial in second.trials()][1] == "warm start"
    assert second.trials()[1].values == first.best().values
