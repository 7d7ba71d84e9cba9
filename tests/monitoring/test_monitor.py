import math
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mappo.config import from_dict, to_json
from mappo.environment.validation import Check, ValidationReport
from mappo.errors import ConfigError, KeyMissing, KeyTaken, Preempted, StoreError, StoreUnavailable
from mappo.evaluation.evaluation import evaluate
from mappo.monitoring import metrics
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.locations import open_store
from mappo.runs.saver import SaveResult
from mappo.stages.validate import validate
from mappo.training.history import IterationReport, Progress, TrainingStarted
from tests.conftest import TINY
from tests.support.runs import train_here
from tests.support.services import free_ports, wait

RUN = {"study": "s", "run": "r"}


def monitor_of(stage: str = "train", *, messages: list | None = None, **options) -> Monitor:
    settings = MonitorSettings(**{"study": "s", "linger_seconds": 0.5, **options.pop("settings", {})})
    announce: Callable[[str], object] = messages.append if messages is not None else lambda _: None
    return Monitor(stage, "r", settings, announce, **options)


def values(monitor: Monitor) -> dict[tuple, float]:
    """Return every scraped sample: {(name, other labels as sorted pairs): value}."""
    samples = {}
    for family in text_string_to_metric_families(monitor.text().decode()):
        for sample in family.samples:
            other_labels = {name: value for name, value in sample.labels.items() if name not in RUN}
            assert family.name.startswith("process_") or sample.labels.items() >= RUN.items()
            samples[(sample.name, *sorted(other_labels.items()))] = sample.value
    return samples


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[IterationReport]:
    """The reports of a real run with three iterations."""
    reports: list[IterationReport] = []
    train_here(from_dict(TINY), tmp_path_factory.mktemp("reported"), reports.append)
    return reports


def test_scraped_values_are_the_values_of_the_reports(tiny, reports):
    """The run has three iterations of 120 frames, with two epochs of three minibatches each."""
    monitor = monitor_of()
    monitor.planned(tiny)
    for report in reports:
        monitor.iterated(report)
    samples, last = values(monitor), reports[-1]
    assert samples["mappo_iterations_total",] == 3
    assert (
        samples["mappo_frames_total",]
        == samples["mappo_run_frames",]
        == samples["mappo_run_planned_frames",]
        == 360
    )
    assert samples["mappo_epochs_total",] == 6
    assert samples["mappo_optimiser_steps_total",] == 18
    assert samples["mappo_episodes_total",] == sum(report.episodes.num_episodes for report in reports)
    assert set(last.measurements) == {"pos_rew", "final_rew", "agent_collisions"}
    for name, mean in last.measurements.items():
        assert samples["mappo_selection_measurement_mean", ("measurement", name)] == mean
    assert samples["mappo_episode_return_mean",] == last.episodes.episode_return_mean
    assert samples["mappo_loss", ("term", "critic")] == last.losses.loss_critic
    assert samples["mappo_gradient_norm", ("network", "policy")] == last.losses.gradient_norm_policy
    assert samples["mappo_phase_seconds_total", ("phase", "learn")] == pytest.approx(
        sum(report.learn_seconds for report in reports)
    )
    assert samples["mappo_run_state", ("state", "running")] == 1
    assert sum(value for name, value in samples.items() if name[0] == "mappo_run_state") == 1


def test_every_metric_of_training_has_a_value_after_training(tiny, tmp_path):
    with monitor_of() as monitor:
        monitor.planned(tiny)
        monitor.began(TrainingStarted(Progress(), 1, is_resumed=False))
        train_here(tiny, tmp_path, monitor.iterated)
        monitor.saved(SaveResult("saved", 0.1, 1000))
    families = {name.removesuffix("_count") for name, *_ in values(monitor)}
    declared = (*metrics.TRAINING, *metrics.PROBLEMS, *metrics.OUTCOME)
    assert {metric.name for metric in declared if "group" not in metric.free_labels} <= families


def test_a_number_that_is_not_finite_changes_no_metric(tiny, reports):
    monitor = monitor_of()
    monitor.planned(tiny)
    monitor.iterated(reports[0])
    previous = values(monitor)
    nan = replace(
        reports[1],
        save_seconds=math.nan,
        episodes=replace(reports[1].episodes, episode_return_mean=math.nan),
        losses=replace(reports[1].losses, explained_variance=math.inf),
    )
    monitor.iterated(nan)
    current = values(monitor)
    for unchanged in (
        ("mappo_episode_return_mean",),
        ("mappo_explained_variance",),
        ("mappo_phase_seconds_total", ("phase", "save")),
    ):
        assert current[unchanged] == previous[unchanged]
    assert current["mappo_iterations_total",] == 2
    assert all(math.isfinite(value) for value in current.values())


def test_counters_begin_at_zero_with_all_their_labels_and_gauges_are_absent_before_a_value():
    samples = values(monitor_of())
    assert samples["mappo_store_requests_total", ("operation", "write"), ("outcome", "unavailable")] == 0
    assert samples["mappo_non_finite_total", ("source", "loss")] == 0
    assert samples["mappo_checkpoint_saves_total", ("outcome", "failed")] == 0
    assert ("mappo_episode_return_mean",) not in samples


def test_saves_and_requests_are_counted_by_outcome():
    monitor = monitor_of()
    for save in (
        SaveResult("saved", 0.02, 100),
        SaveResult("saved", 2.0, 200),
        SaveResult("failed", 5.0),
        SaveResult("skipped"),
    ):
        monitor.saved(save)
    monitor.requested("write", "unavailable")
    samples = values(monitor)
    counts = [
        samples["mappo_checkpoint_saves_total", ("outcome", outcome)] for outcome in ("saved", "failed", "skipped")
    ]
    assert counts == [2, 1, 1]
    assert samples["mappo_checkpoint_bytes",] == 200
    assert samples["mappo_checkpoint_save_seconds_count",] == 3
    assert samples["mappo_checkpoint_save_seconds_sum",] == pytest.approx(7.02)
    assert samples["mappo_store_requests_total", ("operation", "write"), ("outcome", "unavailable")] == 1


def test_an_evaluation_exports_every_policy_with_its_interval(tiny, checkpoint):
    report = evaluate(tiny, checkpoint)
    monitor = monitor_of("evaluate")
    monitor.evaluated(report)
    samples = values(monitor)
    assert samples["mappo_evaluation_return_mean", ("policy", "trained")] == report.trained.mean.value
    assert samples["mappo_evaluation_return_mean_low", ("policy", "random")] == report.random.mean.low
    assert samples["mappo_evaluation_episodes", ("policy", "random")] == 8
    assert ("mappo_evaluation_return_mean", ("policy", "heuristic")) not in samples
    labels = ("measurement", "agent_collisions"), ("policy", "trained"), ("reduction", "sum")
    collisions = report.trained.measurements["agent_collisions"].mean
    for suffix, value in (("", collisions.value), ("_low", collisions.low), ("_high", collisions.high)):
        assert samples[f"mappo_evaluation_measurement_mean{suffix}", *labels] == value


def test_a_validation_counts_its_checks_by_outcome():
    monitor = monitor_of("validate")
    outcomes = ("passed", "passed", "failed")
    monitor.validated(ValidationReport("hash", [Check("name", outcome, "detail") for outcome in outcomes]))
    samples = values(monitor)
    counts = [
        samples["mappo_validation_checks", ("outcome", outcome)] for outcome in ("passed", "warning", "failed")
    ]
    assert counts == [2, 0, 1]


def test_metrics_go_to_the_given_registry_and_never_to_the_global_one():
    from prometheus_client import REGISTRY

    registry = CollectorRegistry()
    monitor_of(registry=registry)
    assert registry.get_sample_value("mappo_frames_total", RUN) == 0
    assert REGISTRY.get_sample_value("mappo_frames_total", RUN) is None


def test_training_is_ready_after_an_iteration_and_unhealthy_when_it_stalls(tiny, reports):
    reports = [replace(report, collect_seconds=0.0, learn_seconds=0.0, evaluate_seconds=0.0) for report in reports]
    with monitor_of(settings={"port": 0}, min_stall_seconds=0.5) as monitor:
        monitor.planned(tiny)
        assert _page(monitor, "/readyz") == (503, "before the first iteration\n")
        assert _page(monitor, "/healthz") == (200, "starting\n")
        monitor.iterated(reports[0])
        assert _page(monitor, "/readyz")[0] == 200
        assert _page(monitor, "/healthz") == (200, "running\n")
        wait(lambda: _page(monitor, "/healthz")[0] == 503, 30, "training does not count as stalled")
        assert "stalled: no iteration for" in _page(monitor, "/healthz")[1]
        assert values(monitor)["mappo_stall_limit_seconds",] == 0.5
        monitor.iterated(reports[1])
        assert _page(monitor, "/healthz")[0] == 200


def test_the_stall_limit_takes_the_first_iteration_into_account(tiny, reports):
    monitor = monitor_of(min_stall_seconds=0.01)
    monitor.planned(tiny)
    monitor.iterated(replace(reports[0], collect_seconds=100.0, learn_seconds=20.0, evaluate_seconds=3.0))
    assert values(monitor)["mappo_stall_limit_seconds",] == 1230


def test_training_has_not_stalled_within_ten_times_the_longest_iteration(tiny, reports):
    monitor = monitor_of(min_stall_seconds=0.01)
    monitor.planned(tiny)
    monitor.iterated(reports[0])
    time.sleep(0.3)
    monitor.iterated(reports[1])
    time.sleep(0.1)
    assert monitor.stalled() == ""
    assert values(monitor)["mappo_stall_limit_seconds",] > 3


def test_training_continues_with_a_warning_when_the_port_is_taken(tiny, tmp_path):
    messages: list[str] = []
    with monitor_of(settings={"port": 0}) as first:
        with monitor_of(settings={"port": first.port}, messages=messages) as second:
            second.planned(tiny)
            train_here(tiny, tmp_path, second.iterated)
        assert values(second)["mappo_iterations_total",] == 3
    assert f"cannot listen on port {first.port}" in messages[0]


def test_a_short_run_waits_for_a_scrape_of_its_last_values():
    messages: list[str] = []
    with ThreadPoolExecutor() as prometheus:
        with monitor_of(settings={"port": 0, "linger_seconds": 60}, messages=messages) as monitor:
            scraped = prometheus.submit(_page_later, monitor)
        assert 'mappo_run_state{run="r",state="finished",study="s"} 1.0' in scraped.result()
        assert 'mappo_stage_success{run="r",stage="train",study="s"} 1.0' in scraped.result()
    assert "waiting up to 60 s" in messages[-1]


def test_the_monitor_does_not_wait_when_no_client_has_scraped():
    monitor = monitor_of(settings={"port": 0, "linger_seconds": 1})
    start = time.monotonic()
    with monitor:
        time.sleep(1.2)
        end = time.monotonic()
    assert time.monotonic() - end < 1
    assert time.monotonic() - start > 1.2


def test_a_failure_is_scraped_and_its_exception_is_raised():
    monitor = monitor_of(settings={"port": 0, "linger_seconds": 60})
    with ThreadPoolExecutor() as prometheus:
        with pytest.raises(ArithmeticError, match="loss_critic"), monitor:
            monitor.met_non_finite("loss")
            scraped = prometheus.submit(_page_later, monitor)
            raise ArithmeticError("loss_critic = nan")
        assert 'mappo_non_finite_total{run="r",source="loss",study="s"} 1.0' in scraped.result()
        assert 'mappo_run_state{run="r",state="failed",study="s"} 1.0' in scraped.result()


def test_a_preemption_is_scraped():
    monitor = monitor_of(settings={"port": 0, "linger_seconds": 60})
    with ThreadPoolExecutor() as prometheus:
        with pytest.raises(SystemExit), monitor:
            scraped = prometheus.submit(_page_later, monitor)
            raise SystemExit(143)
        assert 'mappo_run_state{run="r",state="preempted",study="s"} 1.0' in scraped.result()


def test_the_monitor_does_not_wait_after_control_c():
    monitor = monitor_of(settings={"port": 0, "linger_seconds": 60})
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), monitor:
        raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    assert values(monitor)["mappo_run_state", ("state", "preempted")] == 1


def test_metrics_are_deleted_from_a_pushgateway_that_did_not_answer_in_time(monkeypatch):
    monkeypatch.setattr("mappo.monitoring.monitor._PUSH_SECONDS", 0.5)
    messages: list[str] = []
    with slow_pushgateway(seconds=1.5) as (url, requests):
        with monitor_of("evaluate", settings={"pushgateway": url}, messages=messages):
            pass
        assert requests == ["PUT", "DELETE"]
    assert "timed out" in messages[-1]


def test_a_stage_deletes_its_pushed_metrics_when_sigterm_arrives_during_the_wait(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MAPPO_LINGER_SECONDS", "60")
    with slow_pushgateway(on_push=lambda: os.kill(os.getpid(), signal.SIGTERM)) as (url, requests):
        monkeypatch.setenv("MAPPO_PUSHGATEWAY", url)
        with pytest.raises(Preempted):
            validate(to_json(tiny), tmp_path / "report")
        assert requests == ["PUT", "DELETE"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def slow_pushgateway(seconds: float = 0.0, on_push: Callable[[], object] = lambda: None):
    """Start a slow Pushgateway; the context is its URL and the methods of its requests."""
    requests: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_PUT(self):
            requests.append(self.command)
            time.sleep(seconds)
            with suppress(OSError):
                self.send_response(202)
                self.end_headers()
            if self.command == "PUT":
                threading.Timer(0.5, on_push).start()

        def do_DELETE(self):
            self.do_PUT()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{gateway.server_port}", requests
        gateway.shutdown()


def test_control_c_ends_the_wait_without_a_failure():
    messages: list[str] = []
    monitor = monitor_of(settings={"port": 0, "linger_seconds": 60}, messages=messages)
    start = time.monotonic()
    with monitor:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert time.monotonic() - start < 30
    assert "no longer waiting" in messages[-1]


def test_a_pushgateway_that_does_not_answer_is_reported_and_fails_no_stage():
    messages: list[str] = []
    (port,) = free_ports(1)
    with monitor_of("evaluate", settings={"pushgateway": f"http://127.0.0.1:{port}"}, messages=messages):
        pass
    assert f"the Pushgateway http://127.0.0.1:{port} did not accept the metrics" in messages[-1]


def test_settings_come_from_the_environment():
    environment = {
        "MAPPO_METRICS_PORT": "9464",
        "MAPPO_PUSHGATEWAY": "http://gateway:9091",
        "MAPPO_LINGER_SECONDS": "2.5",
        "MAPPO_STUDY": "first-study",
    }
    assert MonitorSettings.from_environment(environment) == MonitorSettings(
        9464, "http://gateway:9091", 2.5, "first-study"
    )
    assert MonitorSettings.from_environment({"MAPPO_METRICS_PORT": ""}) == MonitorSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAPPO_METRICS_PORT", "65536"),
        ("MAPPO_METRICS_PORT", "http"),
        ("MAPPO_METRICS_PORT", "-1"),
        ("MAPPO_PUSHGATEWAY", "gateway:9091"),
        ("MAPPO_PUSHGATEWAY", "http://name:secret-password@gateway:9091"),
        ("MAPPO_LINGER_SECONDS", "nan"),
        ("MAPPO_LINGER_SECONDS", "-1"),
        ("MAPPO_STUDY", 'a"} 1'),
    ],
)
def test_a_wrong_setting_raises_an_error_that_names_it(name, value):
    with pytest.raises(ConfigError, match=name) as error:
        MonitorSettings.from_environment({name: value})
    assert "secret-password" not in str(error.value)


def _page_later(monitor: Monitor) -> str:
    time.sleep(0.5)
    return _page(monitor, "/metrics")[1]


def _page(monitor: Monitor, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{monitor.port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_requests_to_a_real_store_are_counted_by_outcome(kind, s3, tmp_path):
    monitor = monitor_of()
    location = str(tmp_path) if kind == "directory" else f"s3://{s3}/a"
    store = open_store(location, 1.0, monitor.requested)
    store.write("key", b"1")
    store.create("other", b"2")
    with pytest.raises(KeyTaken):
        store.create("key", b"2")
    with pytest.raises(KeyMissing):
        store.read("nothing", 1)
    assert len(store.entries()) == 2
    store.delete("key")
    requests = {
        tuple(label for _, label in labels): count
        for (name, *labels), count in values(monitor).items()
        if name == "mappo_store_requests_total" and count
    }
    assert requests == {
        ("write", "ok"): 1,
        ("create", "ok"): 1,
        ("create", "taken"): 1,
        ("read", "ok"): 1,  # reads the key, in case an earlier try of this creation wrote it
        ("read", "missing"): 1,
        ("list", "ok"): 1,
        ("delete", "ok"): 1,
    }


def test_every_try_counts_as_unavailable_when_the_store_does_not_answer(monkeypatch, s3):
    monitor = monitor_of()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StoreUnavailable):
        open_store(f"s3://{s3}/a", 8.0, monitor.requested).write("key", b"1")
    assert values(monitor)["mappo_store_requests_total", ("operation", "write"), ("outcome", "unavailable")] > 1


def test_a_request_counts_as_refused_when_the_directory_cannot_be_written(tmp_path):
    monitor = monitor_of()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        open_store(str(tmp_path / "file"), 1.0, monitor.requested).write("key", b"1")
    assert values(monitor)["mappo_store_requests_total", ("operation", "write"), ("outcome", "refused")] == 1


def test_a_worker_exports_its_current_run_and_the_end_of_the_last_runs(tiny, reports):
    monitor = monitor_of("tune", settings={"linger_seconds": 1.0})
    monitor.studied({"complete": 2, "running": 1}, 5, 1, 0.5)

    def exported(name: str) -> dict[tuple, float]:
        samples = [
            sample
            for family in text_string_to_metric_families(monitor.text().decode())
            for sample in family.samples
            if sample.name == name
        ]
        return {
            (sample.labels["run"], sample.labels.get("state", "")): sample.value
            for sample in samples
            if sample.value
        }

    for trial in ("trial-0", "trial-1", "trial-2"):
        monitor.begin_run(trial)
        monitor.planned(tiny)
        monitor.iterated(reports[0])
        assert exported("mappo_run_info").keys() == {(trial, "")}
        assert exported("mappo_frames_total") == {(trial, ""): 120}
        assert exported("mappo_run_state")[trial, "running"] == 1
        monitor.end_run("finished")
    assert exported("mappo_run_state").keys() == {(f"trial-{index}", "finished") for index in range(3)}
    time.sleep(2.1)
    monitor.begin_run("trial-3")
    assert exported("mappo_run_state").keys() <= {("trial-2", "finished")}
    assert exported("mappo_study_trials") == {("r", "complete"): 2, ("r", "running"): 1}
    assert exported("mappo_study_asked_trials") == {("r", ""): 5}


def test_a_worker_between_trials_has_not_stalled_and_exports_no_run_state_of_its_own(tiny, reports):
    monitor = monitor_of("tune", min_stall_seconds=0.05)
    with monitor:
        monitor.begin_run("trial-0")
        monitor.planned(tiny)
        for report in reports:
            monitor.iterated(report)
        monitor.end_run("failed")
        monitor._last_iteration -= 3600
        assert monitor.stalled() == ""
    states = [line for line in monitor.text().decode().splitlines() if line.startswith("mappo_run_state")]
    assert {line.split(" ")[-1] for line in states if 'state="failed"' in line} == {"1.0"}
    assert all('run="trial-0"' in line for line in states)
