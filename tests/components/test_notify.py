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
from mappo.stages.notify import run_message
from pipelines.compiling import compile_pipeline
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import get_run, specification_of, submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.progress import stages_of
from pipelines.kubeflow.submission import Submission
from tests.components.test_components import SITE, Cluster, config
from tests.conftest import TINY
from tests.support.kubeflow_server import KubeflowServer
from tests.support.webhook import receiver

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


def put(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_failed_run_sends_the_reason_that_its_stage_left(kubeflow, tmp_path):
    cluster = Cluster(kubeflow, tmp_path, NOTIFYING, run="first")
    assert cluster.finish("train")[0] == 1  # a name without a store
    kubeflow.fail_stage(cluster.run_id, "train")
    with receiver() as webhook:
        secret = f"{webhook.url}/secret-path"
        status, log = cluster.finish("notify", MAPPO_NOTIFY_URL=secret, MAPPO_PIPELINE_RUN=cluster.run_id)
        assert (status, "secret-path" in log) == (0, False)
        body = json.loads(webhook.requests[0].body)
    assert (body["subject"], body["outcome"], body["results"]) == ("run first", "failed", {})
    assert body["reason"].startswith("train: run = 'first': a name needs a store")
    link = f"https://kubeflow.example.org/pipeline/#/runs/details/{cluster.run_id}"
    assert body["links"]["Kubeflow"] == link
    assert kubeflow.finish(cluster.run_id) == "FAILED"
    expected = {"validate": "SUCCEEDED", "train": "FAILED", "evaluate": "NOT REACHED", "notify": "SUCCEEDED"}
    assert states(kubeflow, cluster.run_id) == expected


def test_successful_run_sends_its_headline_numbers(kubeflow, tmp_path, report):
    cluster = Cluster(kubeflow, tmp_path, NOTIFYING)
    kubeflow.reach(cluster.run_id, "notify")
    put(cluster.artifact("evaluate", "report"), asdict(report))
    with receiver() as webhook:
        status, log = cluster.finish("notify", MAPPO_NOTIFY_URL=webhook.url, MAPPO_PIPELINE_RUN=cluster.run_id)
        assert status == 0, log
        body = json.loads(webhook.requests[0].body)
    assert (body["subject"], body["outcome"]) == (f"run {cluster.run_id}", "succeeded")
    assert body["results"]["mean return, trained"].startswith(f"{report.trained.mean.value:.4g} [")
    kept = json.loads(cluster.artifact("notify", "message").read_text())
    assert kept["outcome"] == "succeeded"
    assert kubeflow.finish(cluster.run_id) == "SUCCEEDED"


@pytest.mark.parametrize("url", ["", "no URL", "http://127.0.0.1:9/secret-path"])
def test_stage_succeeds_without_a_webhook_that_works(kubeflow, tmp_path, url):
    cluster = Cluster(kubeflow, tmp_path, NOTIFYING)
    kubeflow.reach(cluster.run_id, "notify")
    status, log = cluster.finish("notify", MAPPO_NOTIFY_URL=url)
    assert (status, "secret-path" in log) == (0, False)
    assert "[notify] warning: " in log


def test_message_about_a_study_has_the_gain_and_the_promotion(tmp_path, report):
    put(tmp_path / "report/1/comparison", asdict(compare([report])))
    put(tmp_path / "promote/2/decision", asdict(PromotionSkipped("first")))
    message = run_message("tuning", "study first", str(tmp_path))
    assert message.outcome == "succeeded"
    assert message.results["gain of the best over the default"] == "0"


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


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_site_with_a_webhook_adds_one_stage_and_changes_no_other(kubeflow: KubeflowServer, name):
    """Run both pipelines on the test server: the stages have the same names, and notify is the last."""
    api, found = Api(Connection(endpoint=kubeflow.url)), []
    for site in (SITE, NOTIFYING):
        seeds = {"seeds": ["0", "1"]} if name == "seeds" else {}
        compiled = compile_pipeline(name, site, {"config": config(), **seeds})
        parameters = {"study": "first"} if name == "tuning" else {}
        run_id = submit(api, Submission(compiled, parameters)).run_id
        assert kubeflow.finish(run_id) == "SUCCEEDED"
        found.append(states(kubeflow, run_id))
    assert found[1] == found[0] | {"notify": "SUCCEEDED"}
    assert list(found[1])[-1] == "notify"
    executors = compiled.documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert [key for key, value in executors.items() if "team-webhook" in json.dumps(value)] == ["exec-notify"]
