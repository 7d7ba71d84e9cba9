"""The stage `notify` as its pod runs it, after real failures and results of other stages, with real webhooks."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mappo.config import from_dict
from mappo.evaluation.comparison import compare
from mappo.evaluation.evaluation import EvaluationReport, evaluate
from mappo.promotion.promotion import PromotionSkipped
from mappo.runs.supervisor import AttemptCount
from mappo.stages.notify import notify, run_message, subject_of
from pipelines.compiling import NAMES, compile_pipeline
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import get_run, specification_of, submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.progress import stages_of
from pipelines.kubeflow.submission import Submission
from tests.components.test_components import SITE, Cluster, config
from tests.conftest import TINY
from tests.support.kubeflow_server import KubeflowServer
from tests.support.webhook import receiver

MATRIX = '{"name": "m", "seeds": [0], "algorithms": {"mappo": {}}, "tasks": {"balance": {}}}'
NOTIFYING = replace(SITE, notify_secret="team-webhook", kubeflow_url="https://kubeflow.example.org/pipeline/")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Let stages that a test starts import the repository."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture(scope="module")
def report(checkpoint) -> EvaluationReport:
    return evaluate(from_dict(TINY), checkpoint)


def states(kubeflow: KubeflowServer, run_id: str) -> dict[str, str]:
    api = Api(Connection(endpoint=kubeflow.url))
    run = get_run(api, run_id)
    return {stage.name: stage.state for stage in stages_of(api, run, specification_of(api, run))}


def environment_of(cluster: Cluster, **secrets: str) -> dict[str, str]:
    """Return the environment of the pod: what the pipeline gives, what the secret holds, and the run's ID."""
    executors = cluster.compiled.specification["deploymentSpec"]["executors"]
    given = {variable["name"]: variable["value"] for variable in executors["exec-notify"]["container"]["env"]}
    return {**given, **secrets, "MAPPO_PIPELINE_RUN": cluster.run_id}


def put(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_failed_run_sends_the_reason_that_its_stage_left(kubeflow, tmp_path):
    cluster = Cluster(kubeflow, tmp_path, NOTIFYING, run="first")
    executors = cluster.compiled.documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert [name for name, pod in executors.items() if "team-webhook" in json.dumps(pod)] == ["exec-notify"]
    assert cluster.finish("train")[0] == 1  # a name without a store
    kubeflow.fail_stage(cluster.run_id, "train")
    with receiver() as webhook:
        secret = f"{webhook.url}/secret-path"
        status, log = cluster.finish("notify", **environment_of(cluster, MAPPO_NOTIFY_URL=secret))
        assert (status, "secret-path" in log) == (0, False)
        body = json.loads(webhook.requests[0].body)
    assert (body["subject"], body["outcome"], body["results"]) == ("run first", "failed", {})
    assert body["reason"].startswith("train: run = 'first': a name needs a store")
    link = f"https://kubeflow.example.org/pipeline/#/runs/details/{cluster.run_id}"
    assert body["links"]["Kubeflow"] == link
    assert kubeflow.finish(cluster.run_id) == "FAILED"
    expected = {"validate": "SUCCEEDED", "train": "FAILED", "evaluate": "NOT REACHED", "notify": "SUCCEEDED"}
    assert states(kubeflow, cluster.run_id) == expected


def test_successful_run_sends_its_headline_numbers(tmp_path, report, monkeypatch):
    put(tmp_path / "evaluate/1/report", asdict(report))
    with receiver() as webhook:
        monkeypatch.setenv("MAPPO_NOTIFY_URL", webhook.url)
        result = notify("training", "run first", str(tmp_path), tmp_path / "message")
        body = json.loads(webhook.requests[0].body)
    assert result.metadata == {"outcome": "succeeded"}
    assert (body["subject"], body["outcome"]) == ("run first", "succeeded")
    assert body["results"]["mean return, trained"].startswith(f"{report.trained.mean.value:.4g} [")
    assert json.loads((tmp_path / "message").read_text())["outcome"] == "succeeded"


@pytest.mark.parametrize("url", ["", "no URL", "http://127.0.0.1:9/secret-path"])
def test_stage_succeeds_without_a_webhook_that_works(tmp_path, url, monkeypatch, capsys):
    monkeypatch.setenv("MAPPO_NOTIFY_URL", url)
    monkeypatch.setattr("mappo.reporting.webhook._RETRY_SECONDS", (0.0, 0.0))
    notify("training", "run first", str(tmp_path), tmp_path / "message")
    output = capsys.readouterr().out
    assert "[notify] warning: " in output
    assert "secret-path" not in output


def test_message_about_a_study_has_the_gain_and_the_promotion(tmp_path, report):
    put(tmp_path / "report/1/comparison", asdict(compare([report])))
    put(tmp_path / "promote/2/decision", asdict(PromotionSkipped("first")))
    message = run_message("tuning", "study first", str(tmp_path))
    assert message.outcome == "succeeded"
    assert message.results["gain of the best over the default"] == "0"


CELLS = "task,algorithm,seed,state,reason\nbalance,mappo,0,done,\nbalance,mappo,1,{}\n"


@pytest.mark.parametrize(
    ("second", "outcome", "reason", "done"),
    [
        ("done,", "succeeded", "", "2 of 2"),
        ("failed,train: loss is nan", "failed", "balance-mappo-1: failed: train: loss is nan", "1 of 2"),
        ("begun,", "failed", "balance-mappo-1: begun", "1 of 2"),  # its pod was lost, and left no reason
    ],
)
def test_message_about_a_matrix_counts_its_cells_and_names_those_that_are_missing(
    tmp_path, second, outcome, reason, done
):
    """An earlier failure of a cell that was done later, in a retry of the run, does not count."""
    (tmp_path / "summarise/1").mkdir(parents=True)
    (tmp_path / "summarise/1/cells").write_text(CELLS.format(second))
    put(tmp_path / "cell/attempts-0123456789ab.json", asdict(AttemptCount(3, {}, "an earlier failure")))
    message = run_message("matrix", "matrix m", str(tmp_path))
    assert (message.outcome, message.reason, message.results) == (outcome, reason, {"cells done": done})


def test_message_about_a_matrix_without_a_table_has_the_reasons_of_its_stages(tmp_path):
    put(
        tmp_path / "summarise/attempts-0123456789ab.json", asdict(AttemptCount(1, {}, "none of the cells is done"))
    )
    message = run_message("matrix", subject_of("matrix", MATRIX, ""), str(tmp_path))
    assert (message.subject, message.outcome) == ("matrix m", "failed")
    assert message.reason == "summarise: none of the cells is done"


def test_failure_counts_even_if_an_earlier_execution_left_a_result(tmp_path, report):
    put(tmp_path / "evaluate/1/report", asdict(report))
    put(tmp_path / "evaluate/attempts-0123456789ab.json", asdict(AttemptCount(3, {}, "out of memory")))
    message = run_message("training", "run first", str(tmp_path))
    assert (message.outcome, message.reason) == ("failed", "evaluate: out of memory")


def test_run_that_left_nothing_has_failed(tmp_path):
    message = run_message("seeds", "run first", str(tmp_path))
    assert message.outcome == "failed"
    assert message.reason.startswith("no stage left a reason")


def test_outcome_is_unknown_if_the_store_cannot_be_read():
    assert run_message("seeds", "run first", "gs://bucket/a").outcome == "ended"


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_site_with_a_webhook_adds_one_stage_and_changes_no_other(kubeflow: KubeflowServer, name):
    """Run both pipelines on the test server: the stages have the same names, and notify is the last."""
    api, found = Api(Connection(endpoint=kubeflow.url)), []
    for site in (SITE, NOTIFYING):
        seeds = {"seeds": ["0", "1"]} if name == "seeds" else {}
        cells = {"matrix": MATRIX, "cells": ["balance-mappo-0"], "store": "s3://bucket/runs"}
        compiled = compile_pipeline(name, site, cells if name == "matrix" else {"config": config(), **seeds})
        parameters = {"study": "first"} if name == "tuning" else {}
        run_id = submit(api, Submission(compiled, parameters)).run_id
        assert kubeflow.finish(run_id) == "SUCCEEDED"
        found.append(states(kubeflow, run_id))
    assert found[1] == found[0] | {"notify": "SUCCEEDED"}
    assert list(found[1])[-1] == "notify"
