import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from promql_parser import parse

from mappo.config import override
from mappo.monitoring import metrics
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from tests.support.prometheus import ROOT, RULES, eventually, prometheus, require, server
from tests.support.runs import start_training, train_here
from tests.support.services import free_ports

GROUPS = {group["name"]: group["rules"] for group in yaml.safe_load(RULES.read_text())["groups"]}
ALERTS = {rule["alert"]: rule for rule in GROUPS["mappo.alerts"]}
UNIT_TESTS = ROOT / "tests" / "alerts.yaml"


def test_alerts_pass_their_unit_tests():
    promtool("test", "rules", str(UNIT_TESTS))


def test_rules_are_valid():
    promtool("check", "rules", str(RULES))


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_unit_test_that_fires_and_one_that_does_not(alert):
    tests = [
        test for group in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for test in group["alert_rule_test"]
    ]
    firing = [bool(test["exp_alerts"]) for test in tests if test["alertname"] == alert]
    assert True in firing
    assert False in firing


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_names_the_problem_and_the_steps_to_take(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    text = rule["annotations"]["description"] + rule["annotations"]["summary"]
    subject = {"MappoScheduleLate": "schedule", "MappoKubeflowUnreachable": "namespace"}.get(alert, "study")
    assert f"$labels.{subject}" in text
    assert rule["annotations"]["runbook"].startswith("1. ")


@pytest.mark.parametrize("rule", [rule for rules in GROUPS.values() for rule in rules])
def test_rule_uses_existing_metrics_and_rates_of_counters_only(rule):
    recorded = {rule["record"] for rule in GROUPS["mappo.recording"]}
    require_known_metrics(rule["expr"], recorded)


def require_known_metrics(expression: str, recorded: set[str]) -> None:
    """Check that an expression uses only existing metrics, and rates only of counters.

    A metric exists if we export it, if a rule records it, or if another known exporter has it.
    """
    kinds = {metric.name: metric.kind for metric in metrics.METRICS}
    counters = {name for name, kind in kinds.items() if kind == "counter"} | {
        f"{name}_{part}"
        for name, kind in kinds.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    known = (
        {*kinds, *counters, *recorded, "ALERTS"}
        | {"up", "push_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes"}
        | {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_POWER_USAGE"}
    )
    counters.add("process_cpu_seconds_total")
    names = _metric_names(parse(expression))
    assert {name for name, _ in names} - known == set()
    assert {name for name, function in names if function in ("rate", "increase", "irate")} - counters == set()


def _metric_names(node: object, function: str = "") -> set[tuple[str, str]]:
    """Return every metric of a parsed expression with the innermost function around it."""
    names: set[tuple[str, str]] = set()
    if (name := getattr(node, "name", None)) and hasattr(node, "matchers"):
        names.add((name, function))
    if selector := getattr(node, "vector_selector", None):
        names |= _metric_names(selector, function)
    innermost = getattr(getattr(node, "func", None), "name", function)
    for child in ("expr", "lhs", "rhs"):
        if hasattr(node, child):
            names |= _metric_names(getattr(node, child), innermost)
    for argument in getattr(node, "args", None) or []:
        names |= _metric_names(argument, innermost)
    return names


@pytest.mark.long
def test_faults_of_real_trainings_reach_a_webhook(tiny, tmp_path):
    """Check a NaN, a missing store and a stall, from training through Prometheus and Alertmanager to a webhook."""
    nan, cut_off, nowhere = free_ports(3)
    scenario = {"scenario": "tests.support.scenarios:NanLater", "scenario_kwargs": {}, "max_episode_frames": 20}
    diverging = override(tiny, {"environment": scenario, "collection": {"num_envs": 8, "total_frames": 480}})
    common = {"MAPPO_LINGER_SECONDS": "3", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{nowhere}"}
    common |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    settings = MonitorSettings(port=0, linger_seconds=0)
    with (
        _webhook() as (hook, received),
        _alertmanager(tmp_path, hook) as alertmanager,
        Monitor("train", "stalling", settings, print, min_stall_seconds=1) as stalling,
    ):
        ports = [nan, cut_off, stalling.port]
        targets = {"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"namespace": "n"}}
        jobs = [{"job_name": "training", "static_configs": [targets]}]
        stalling.planned(tiny)
        train_here(tiny, tmp_path / "stalling", stalling.iterated)
        with prometheus(tmp_path / "prometheus", jobs, alertmanager):
            processes = [
                start_training(
                    config, store, name, _directory(tmp_path / name), MAPPO_METRICS_PORT=str(port), **common
                )
                for config, store, name, port in (
                    (diverging, tmp_path / "runs", "diverging", nan),
                    (tiny, "s3://bucket/runs", "cut-off", cut_off),
                )
            ]
            expected = {
                *(("MappoNonFinite", "diverging"), ("MappoStageFailed", "diverging")),
                *(("MappoTrainingStalled", "stalling"), ("MappoStoreErrors", "cut-off")),
            }
            try:
                eventually(lambda: expected <= received, 150, received)
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
    assert {run for alert, run in received if alert != "MappoStageFailed"} == {"diverging", "stalling", "cut-off"}
    assert {alert for alert, run in received if run == "stalling"} == {"MappoTrainingStalled"}


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


@contextmanager
def _webhook() -> Iterator[tuple[str, set[tuple[str, str]]]]:
    """Start a webhook; the context is its URL and the set of received alerts: (alert, run)."""
    received: set[tuple[str, str]] = set()

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.update(
                (alert["labels"]["alertname"], alert["labels"]["run"])
                for alert in body["alerts"]
                if alert["status"] == "firing"
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hook.server_address[1]}/", received
    finally:
        hook.shutdown()
        hook.server_close()


@contextmanager
def _alertmanager(directory: Path, hook: str) -> Iterator[str]:
    """Start an Alertmanager that forwards every alert at once; the context is its address."""
    (port,) = free_ports(1)
    config = directory / "alertmanager.yml"
    receivers = [{"name": "hook", "webhook_configs": [{"url": hook}]}]
    route = {"receiver": "hook", "group_by": ["..."], "group_wait": "0s"}
    config.write_text(yaml.safe_dump({"route": route, "receivers": receivers}))
    command = [
        require("prometheus-alertmanager"),
        f"--config.file={config}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with server(command, directory, f"http://127.0.0.1:{port}/-/ready"):
        yield f"127.0.0.1:{port}"


def promtool(*arguments: str) -> None:
    result = subprocess.run([require("promtool"), *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
