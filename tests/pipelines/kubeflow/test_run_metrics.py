"""The metrics of pipeline runs, from recorded answers of a real Kubeflow and from runs of the test server."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mappo.monitoring import metrics
from pipelines.compiling import read_compiled
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.reasons import category_of, explain
from pipelines.kubeflow.schedules import Schedule, apply_schedule
from pipelines.kubeflow.submission import Submission
from pipelines.run_metrics import RunMetrics
from tests.conftest import read_json
from tests.pipelines.test_commands import GOLDEN
from tests.support.exported_runs import exported_runs
from tests.support.kubeflow_server import FaultyServer, KubeflowServer
from tests.support.prometheus import ROOT, eventually, get, prometheus, query, require, status
from tests.support.recordings import DATA, recording
from tests.support.services import free_ports

UTC_ZONE = ZoneInfo("UTC")
SUBMIT = ["submit", "--file", str(GOLDEN)]
CREATE = ["schedule", "create", "nightly", "--cron", "30 2 * * *", "--file", str(GOLDEN)]
Samples = Mapping[tuple[str, ...], float]


class Clock:
    """A clock that a test sets."""

    def __init__(self, text: str | None = None):
        self.now = datetime.fromisoformat(text) if text else datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **duration: float) -> None:
        self.now += timedelta(**duration)


def values(run_metrics: RunMetrics) -> Samples:
    """Return every sample that is not 0, by its name and the values of its sorted labels, without buckets."""
    families = text_string_to_metric_families(run_metrics.text().decode())
    return {
        (sample.name.removeprefix("mappo_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.value and not sample.name.endswith("_bucket")
    }


def of(samples: Samples, prefix: str) -> dict[Any, float]:
    """Return the samples of the metrics whose names begin with a prefix, by the rest of their keys."""
    chosen = {key: value for key, value in samples.items() if key[0].startswith(prefix)}
    return {(key[1:] if len(key) > 2 else key[-1]): value for key, value in chosen.items()}


def api(server: FaultyServer) -> Api:
    return Api(Connection(endpoint=server.url), patience_seconds=0.1)


# --- recorded answers ---


class RecordedServer(FaultyServer):
    """A server that answers about recorded runs as the real Kubeflow did."""

    def __init__(self, *names: str):
        super().__init__()
        self.recordings = {recording(name)["run"]["run_id"]: recording(name) for name in names}
        self.schedules: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Any:
        run_id = path.rpartition("/")[2]
        if path.startswith("/apis/v1beta1/runs/"):
            workflow = self.recordings[run_id]["workflow"]
            manifest = {"metadata": {"name": workflow["name"]}, "status": {"nodes": workflow["nodes"]}}
            content: Any = {"pipeline_runtime": {"workflow_manifest": json.dumps(manifest)}}
        elif path.endswith("/healthz"):
            content = {"multi_user": False}
        elif path.endswith("/recurringruns"):
            content = {"recurringRuns": self.schedules}
        else:  # the recordings of runs lack the pipeline, which the server does return
            pipeline = {"pipelineInfo": {"name": "mappo-training"}}
            runs = [{**kept["run"], "pipeline_spec": pipeline} for kept in self.recordings.values()]
            runs.sort(key=lambda run: run["created_at"], reverse=True)
            content = {"runs": runs} if run_id == "runs" else next(run for run in runs if run["run_id"] == run_id)
        return 200, "application/json", json.dumps(content).encode(), {}


def polled(server: FaultyServer, start: str, now: str) -> RunMetrics:
    """Return the metrics of an exporter that starts at one time and polls for the first time at another."""
    clock = Clock(start)
    run_metrics = RunMetrics(UTC_ZONE, clock)
    clock.now = datetime.fromisoformat(now)
    run_metrics.poll(api(server), 60)
    return run_metrics


def test_recorded_success_has_the_times_of_its_stages():
    """The times are those of the recorded nodes: from the pod's creation to the end of the task."""
    with RecordedServer("training-succeeded") as server:
        samples = values(polled(server, "2026-11-28T20:00:00Z", "2026-11-28T21:00:00Z"))
    assert of(samples, "pipeline_runs") == {"succeeded": 1}
    assert of(samples, "pipeline_stage_seconds_count") == {"validate": 1, "train": 1, "evaluate": 1}
    nodes = recording("training-succeeded")["workflow"]["nodes"].values()
    ends = {node["name"].rpartition(".")[2]: datetime.fromisoformat(node["finishedAt"]) for node in nodes}
    starts = {"validate": "20:12:58", "train": "20:13:46", "evaluate": "20:14:51"}
    expected = {
        stage: (ends[f"{stage}(0)"] - datetime.fromisoformat(f"2026-11-28T{start}Z")).total_seconds()
        for stage, start in starts.items()
    }
    assert of(samples, "pipeline_stage_seconds_sum") == expected
    assert 30 < expected["validate"] < 60


@pytest.mark.parametrize(
    ("name", "state", "failure"),
    [
        ("training-out-of-memory", "failed", ("out_of_memory", "train")),
        ("training-failed-container", "failed", ("error", "train")),
        ("schedule-first-run", "failed", ("error", "train")),
        ("training-forbidden-secret", "failed", ("error", "validate")),
        ("training-cancelled-pending", "cancelled", None),
        ("training-pod-deleted-succeeded", "succeeded", None),
    ],
)
def test_recorded_failure_is_counted_by_stage_and_reason(name, state, failure):
    with RecordedServer(name) as server:
        samples = values(polled(server, "2026-11-28T20:00:00Z", "2026-11-28T22:00:00Z"))
    assert of(samples, "pipeline_runs_ended") == {state: 1}
    assert of(samples, "pipeline_stage_failures") == ({failure: 1} if failure else {})


@pytest.mark.parametrize(
    ("name", "stage", "created", "now"),
    [
        ("training-unschedulable", "train", "21:32:16", "21:40:16"),
        ("image-not-found", "validate", "21:33:08", "21:41:08"),
        ("kueue-gated", "train", "21:46:54", "21:54:54"),
    ],
)
def test_recorded_wait_lasts_since_the_creation_of_the_pod(name, stage, created, now):
    with RecordedServer(name) as server:
        samples = values(polled(server, "2026-11-28T20:00:00Z", f"2026-11-28T{now}Z"))
    assert of(samples, "pipeline_waiting") == {stage: 480}
    assert of(samples, "pipeline_runs") == {"running": 1}
    assert stage not in of(samples, "pipeline_queue")


def test_recorded_runs_of_before_the_start_are_shown_and_not_counted():
    names = ("training-succeeded", "training-out-of-memory", "seeds-succeeded")
    with RecordedServer(*names) as server:
        samples = values(polled(server, "2026-11-28T22:00:00Z", "2026-11-28T22:01:00Z"))
        assert not [path for _, path, *_ in server.requests if "v1beta1" in path], "no workflow is read"
        assert of(samples, "pipeline_runs") == {"succeeded": 2, "failed": 1}
        assert of(samples, "pipeline_stage") == {}
        samples = values(polled(server, "2026-11-28T20:00:00Z", "2026-11-28T22:01:00Z"))
    counts = of(samples, "pipeline_stage_seconds_count")
    assert counts == {"validate": 3, "train": 3, "evaluate": 3, "compare": 1}


def test_every_recording_can_be_read():
    names = [path.stem for path in DATA.glob("*.json") if "run" in (read_json(path) or {})]
    assert len(names) > 15
    with RecordedServer(*names) as server:
        samples = values(polled(server, "2026-11-28T20:00:00Z", "2026-11-28T22:30:00Z"))
    assert samples["kubeflow_up",] == 1
    assert ("kubeflow_unreadable_runs",) not in samples


def test_recorded_run_of_a_schedule_is_on_time_until_the_next_time():
    run = recording("schedule-first-run")["run"]
    schedule = {
        "recurring_run_id": run["recurring_run_id"],
        "display_name": "every two minutes",
        "created_at": "2026-11-28T20:33:00Z",
        "status": "ENABLED",
        "trigger": {"cron_schedule": {"cron": "0 */2 * * * *"}},
        "pipeline_spec": {"pipelineInfo": {"name": "mappo-training"}},
    }
    with RecordedServer("schedule-first-run") as server:
        server.schedules.append(schedule)
        for now, late in (("20:35:30", 0), ("20:36:00", 0), ("20:36:20", 20), ("20:50:00", 840)):
            samples = values(polled(server, "2026-11-28T20:00:00Z", f"2026-11-28T{now}Z"))
            assert of(samples, "schedule_late").get("every two minutes", 0) == late
            assert of(samples, "schedules") == {"enabled": 1}


# --- the test server ---


@pytest.fixture
def poll(kubeflow) -> Callable[..., Samples]:
    """Return a function that polls the test server and returns the samples; each call counts on."""
    run_metrics = RunMetrics(UTC_ZONE)

    def poll() -> Samples:
        run_metrics.poll(api(kubeflow), 60)
        return values(run_metrics)

    return poll


def test_each_stage_and_run_is_counted_once_however_often_it_is_polled(kubeflow, read, poll):
    run = read(*SUBMIT)["id"]
    assert of(poll(), "pipeline_runs") == {"pending": 1}
    kubeflow.reach(run, "train")
    for _ in range(3):
        samples = poll()
        assert of(samples, "pipeline_runs") == {"running": 1}
        assert of(samples, "pipeline_stage_seconds_count") == {"validate": 1}
        assert of(samples, "pipeline_queue_seconds_count") == {"validate": 1, "train": 1}
    kubeflow.finish(run)
    for _ in range(3):
        samples = poll()
        assert of(samples, "pipeline_runs_ended") == {"succeeded": 1}
        assert of(samples, "pipeline_stage_seconds_count") == {"validate": 1, "train": 1, "evaluate": 1}


def test_run_that_is_retried_counts_its_new_failure_and_no_stage_twice(kubeflow, read, poll):
    run = read(*SUBMIT)["id"]
    kubeflow.fail_stage(run, "train", reason="OOMKilled")
    assert of(poll(), "pipeline_stage_failures") == {("out_of_memory", "train"): 1}
    read("runs", "retry", run)
    poll()
    kubeflow.finish(run)
    samples = poll()
    assert of(samples, "pipeline_stage_failures") == {("out_of_memory", "train"): 1}
    assert of(samples, "pipeline_stage_seconds_count") == {"validate": 1, "train": 1, "evaluate": 1}
    assert of(samples, "pipeline_runs_ended") == {"failed": 1, "succeeded": 1}


def test_driver_that_fails_and_cancelled_runs_have_reasons_of_their_own(kubeflow, read, poll):
    failed, cancelled = (read(*SUBMIT)["id"] for _ in range(2))
    kubeflow.fail_driver(failed, "train")
    kubeflow.reach(cancelled, "train")
    read("runs", "cancel", cancelled)
    kubeflow.advance(cancelled)
    samples = poll()
    assert of(samples, "pipeline_runs") == {"failed": 1, "cancelled": 1}
    assert of(samples, "pipeline_stage_failures") == {("driver", "train"): 1, ("cancelled", "train"): 1}


def test_stage_that_waits_is_queued_until_it_is_seen_to_run(kubeflow, read):
    clock = Clock()
    run_metrics = RunMetrics(UTC_ZONE, clock)
    run = read(*SUBMIT)["id"]
    kubeflow.reach(run, "train")
    kubeflow.wait_stage(run, "train", "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu.")
    clock.pass_(minutes=30)
    run_metrics.poll(api(kubeflow), 60)
    assert of(values(run_metrics), "pipeline_waiting")["train"] == pytest.approx(1800, abs=5)
    kubeflow.reach(run, "train")
    clock.pass_(minutes=30)
    run_metrics.poll(api(kubeflow), 60)
    samples = values(run_metrics)
    assert of(samples, "pipeline_waiting") == {}
    assert of(samples, "pipeline_queue_seconds_sum")["train"] == pytest.approx(3600, abs=5)


def test_schedule_is_late_from_its_time_until_a_run_starts(kubeflow, read):
    job = read(*CREATE)["id"]
    kubeflow.recurring_runs[job]["created_at"] = "2026-11-30T12:00:00Z"
    clock = Clock("2026-12-01T02:29:00Z")
    run_metrics = RunMetrics(UTC_ZONE, clock)

    def late() -> dict[str, float]:
        run_metrics.poll(api(kubeflow), 60)
        return of(values(run_metrics), "schedule_late")

    assert late() == {}
    clock.pass_(minutes=11)
    assert late() == {"nightly": 600}
    run = kubeflow.fire(job, datetime(2026, 12, 1, 2, 30, tzinfo=UTC).timestamp())
    kubeflow.runs[run]["created_at"] = "2026-12-01T02:40:00Z"
    assert late() == {}
    clock.pass_(days=1)
    assert late() == {"nightly": 600}, "the run of the day before counts for its own time only"
    clock.pass_(days=6)
    assert late() == {"nightly": pytest.approx(600)}, "times of before the window do not count"


def test_paused_schedule_is_not_late_and_starts_anew_when_it_is_resumed(kubeflow, read):
    job = read(*CREATE)["id"]
    kubeflow.recurring_runs[job]["created_at"] = "2026-11-30T12:00:00Z"
    clock = Clock("2026-12-01T02:00:00Z")
    run_metrics = RunMetrics(UTC_ZONE, clock)
    read("schedule", "pause", "nightly")
    clock.pass_(hours=1)
    run_metrics.poll(api(kubeflow), 60)
    assert of(values(run_metrics), "schedules") == {"paused": 1}
    read("schedule", "resume", "nightly")
    clock.pass_(hours=1)
    run_metrics.poll(api(kubeflow), 60)
    samples = values(run_metrics)
    assert of(samples, "schedules") == {"enabled": 1}
    assert of(samples, "schedule_late") == {}


def test_schedules_and_runs_of_other_pipelines_do_not_count(kubeflow, read, poll):
    read(*SUBMIT)
    (run,) = kubeflow.runs.values()
    run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] = "somebody-elses"
    assert of(poll(), "pipeline_runs") == {}


def test_runs_and_schedules_of_a_users_namespace_are_read_with_the_users_token():
    with KubeflowServer(multi_user=True, namespaces={"team"}, tokens={"t"}) as server:
        connection = Connection(endpoint=server.url, namespace="team", token="t")
        kubeflow, submission = Api(connection, patience_seconds=0.1), Submission(read_compiled(GOLDEN))
        server.reach(submit(kubeflow, submission).run_id, "train")
        apply_schedule(kubeflow, Schedule("nightly", Cron.parse("@daily")), submission)
        run_metrics = RunMetrics(UTC_ZONE)
        run_metrics.poll(kubeflow, 60)
    samples = values(run_metrics)
    assert of(samples, "pipeline_runs") == {"running": 1}
    assert of(samples, "schedules") == {"enabled": 1}


def test_promtool_accepts_the_metrics():
    with exported_runs() as (run_metrics, happen):
        happen()
        page = run_metrics.text()
    check = [require("promtool"), "check", "metrics"]
    result = subprocess.run(check, input=page, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    names = set(re.findall(r"^(mappo_\w+?)(?:_bucket|_sum|_count)?(?:\{| )", page.decode(), re.MULTILINE))
    assert names == {metric.name for metric in metrics.PIPELINES}


def test_run_of_an_uploaded_version_counts(kubeflow, read, poll):
    read(*SUBMIT, "--upload")
    assert of(poll(), "pipeline_runs") == {"pending": 1}


def test_all_pages_are_read_and_a_long_training_of_before_the_window_is_kept(kubeflow, read):
    first = kubeflow.runs[read(*SUBMIT)["id"]]
    for number in range(130):
        ended = {"state": "SUCCEEDED", "finished_at": "2026-11-01T00:00:00Z"}
        kubeflow.runs[f"ended-{number}"] = {**first, "run_id": f"ended-{number}", **ended}
    run_metrics = RunMetrics(UTC_ZONE)

    def counts() -> dict[str, float]:
        run_metrics.poll(api(kubeflow), 60)
        return of(values(run_metrics), "pipeline_runs")

    first["created_at"] = (datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert counts() == {"pending": 1, "succeeded": 130}, "the first poll looks back for a week"
    assert counts() == {"pending": 1, "succeeded": 130}, "later polls remember the run"
    del kubeflow.runs[first["run_id"]]
    assert counts() == {"succeeded": 130}


def test_failed_poll_sets_up_to_0_hides_gauges_and_keeps_counters(kubeflow, read):
    run_metrics = RunMetrics(UTC_ZONE)
    kubeflow.fail_stage(read(*SUBMIT)["id"], "train")
    read(*CREATE)
    run_metrics.poll(api(kubeflow), 60)
    before = values(run_metrics)
    assert before["kubeflow_up",] == 1
    kubeflow.stop()
    with pytest.raises(ApiError):
        run_metrics.poll(api(kubeflow), 60)
    after = values(run_metrics)
    assert ("kubeflow_up",) not in after
    assert "mappo_pipeline_runs{" not in run_metrics.text().decode()
    assert "mappo_schedule_late_seconds{" not in run_metrics.text().decode()
    assert of(after, "pipeline_stage_failures") == of(before, "pipeline_stage_failures") != {}
    assert of(after, "kubeflow_last_poll") == of(before, "kubeflow_last_poll")
    kubeflow.start()
    run_metrics.poll(api(kubeflow), 60)
    assert of(values(run_metrics), "pipeline") == of(before, "pipeline")


def test_poll_ends_at_its_deadline(kubeflow, read):
    for _ in range(3):
        kubeflow.reach(read(*SUBMIT)["id"], "train")
    kubeflow.delay(2.5, times=10, path="v1beta1")
    with pytest.raises(ApiError, match="did not end before its deadline"):
        RunMetrics(UTC_ZONE).poll(api(kubeflow), 2.0)
    assert kubeflow.count("GET", "v1beta1") == 1


def test_one_run_that_cannot_be_read_hides_no_other(kubeflow, read, poll):
    for _ in range(2):
        kubeflow.reach(read(*SUBMIT)["id"], "train")
    kubeflow.fail(400, path="v1beta1")
    samples = poll()
    assert samples["kubeflow_unreadable_runs",] == 1
    assert of(samples, "pipeline_runs") == {"running": 2}
    assert of(samples, "pipeline_stage_seconds_count") == {"validate": 1}


# --- the declared values ---


def test_stages_of_all_pipelines_are_declared():
    components = {path.stem for path in (ROOT / "components").glob("[a-z]*.py")} - {"executor", "placeholders"}
    assert set(metrics.PIPELINE_STAGES) == components | {"other"}


@pytest.mark.parametrize(
    ("message", "category"),
    [
        ("main: OOMKilled (exit code 137)", "out_of_memory"),
        ("main: Error (exit code 1)", "error"),
        ("", "error"),
        ("pod deleted", "pod_lost"),
        ("The node was low on resource: memory.", "pod_lost"),
        ("retry exceeded workflow deadline 2026-11-28 20:09:19", "deadline"),
        ("something new", "other"),
    ],
)
def test_every_kind_of_failure_has_a_declared_category(message, category):
    assert category_of(explain(message, "train", "1Gi")) == category
    assert category in metrics.FAILURES


# --- the process ---


def test_prometheus_sees_runs_through_the_exporter_and_when_kubeflow_is_gone(kubeflow, read, tmp_path):
    """Start the real command as a process, and a real Prometheus that scrapes it."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "pipelines", "export-metrics", "--port", str(port), "--interval", "1"]
    target = {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "n"}}
    with (tmp_path / "errors").open("w") as errors:
        exporter = subprocess.Popen(command, cwd=ROOT, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        with prometheus(tmp_path / "prometheus", [{"job_name": "e", "static_configs": [target]}]) as url:

            def value(expression: str) -> float | None:
                series = query(url, expression)
                return float(series[0]["value"][1]) if series else None

            eventually(lambda: value("mappo_kubeflow_up") == 1, 60, "the exporter does not poll")
            read(*CREATE)
            kubeflow.fail_stage(read(*SUBMIT)["id"], "train", reason="OOMKilled")
            failures = 'mappo_pipeline_stage_failures_total{stage="train", reason="out_of_memory"}'
            eventually(lambda: value(failures) == 1, 30, "the failure is not counted")
            assert value('mappo_schedule_late_seconds{schedule="nightly"}') == 0
            assert value(f"increase({failures}[1m])") > 0, "Prometheus saw the 0 before the failure"
            kubeflow.stop()
            eventually(lambda: value("mappo_kubeflow_up") == 0, 60, "the exporter hides that Kubeflow is gone")
            assert value(failures) == 1
            assert value("up") == 1
            assert status(f"http://127.0.0.1:{port}/healthz") == 200
            kubeflow.start()
            eventually(lambda: value("mappo_kubeflow_up") == 1, 60, "the exporter does not recover")
            rules = get(f"{url}/api/v1/rules")["data"]["groups"]
            health = {rule["name"]: rule["health"] for group in rules for rule in group["rules"]}
            assert health["MappoScheduleLate"] == health["MappoKubeflowUnreachable"] == "ok"
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait(10) == 0
    finally:
        exporter.kill()
        exporter.wait()
    text = (tmp_path / "errors").read_text()
    assert "poll failed: " in text
    assert "poll succeeded again, after" in text
    assert "Traceback" not in text


def test_wrong_settings_of_the_exporter_are_refused(kubeflow, cli):
    for flags in (["--interval", "0"], ["--port", "70000"], ["--time-zone", "Mars/Base"], ["--endpoint", "x"]):
        status, _, err = cli("export-metrics", *flags)
        assert status == 2
        assert flags[0].strip("-") in err


def test_a_taken_port_is_reported(kubeflow, cli):
    with KubeflowServer() as taken:
        code, _, err = cli("export-metrics", "--port", str(taken.port))
    assert code == 2
    assert "in use" in err
