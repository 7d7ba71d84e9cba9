import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mappo.errors import ConfigError
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from pipelines.observe import observers
from tests.cli.test_main import TINY
from tests.support.prometheus import ROOT, eventually, get, query, require, status


@pytest.fixture(autouse=True)
def _programs() -> None:
    require("prometheus")
    require("prometheus-pushgateway")


def test_prometheus_scrapes_training_and_pushed_results_and_loads_the_alerts(tmp_path):
    with observers(tmp_path) as servers:
        settings = MonitorSettings.from_environment(servers.environment)
        with Monitor("train", "r", settings, print) as training:
            eventually(lambda: query(servers.prometheus, 'mappo_frames_total{run="r"}'), 60, "not scraped")
            assert training.port == int(servers.environment["MAPPO_METRICS_PORT"])
        with Monitor("evaluate", "r", settings, print):
            pass
        (pushed,) = query(servers.prometheus, 'last_over_time(mappo_stage_success{stage="evaluate"}[1m])')
        assert pushed["metric"]["namespace"] == "local"
        groups = get(f"{servers.prometheus}/api/v1/rules")["data"]["groups"]
        assert {group["name"] for group in groups} == {"mappo.recording", "mappo.alerts"}
        assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])
        addresses = [servers.prometheus, servers.environment["MAPPO_PUSHGATEWAY"]]
        assert [status(f"{address}/-/ready") for address in addresses] == [200, 200]
    assert [status(f"{address}/-/ready") for address in addresses] == [0, 0]


def test_servers_use_other_ports_when_the_usual_ones_are_taken(tmp_path):
    with socket.socket() as owner:
        owner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            owner.bind(("", 9090))
            owner.listen()
        except OSError:
            pass  # another process has the port already
        with observers(tmp_path) as servers:
            assert not servers.prometheus.endswith(":9090")
            assert servers.prometheus in "\n".join(servers.lines())


def test_missing_program_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ConfigError, match="sudo apt install prometheus prometheus-pushgateway"),
        observers(tmp_path),
    ):
        pass


def test_error_of_prometheus_is_part_of_the_message(tmp_path, monkeypatch):
    broken = tmp_path / "rules.yaml"
    broken.write_text("groups: [{name: a, rules: [{record: a, expr: 'sum('}]}]")
    monkeypatch.setattr("pipelines.observe.RULES", broken)
    with (
        pytest.raises(ConfigError, match="prometheus does not start: .*error loading config.*whole log: "),
        observers(tmp_path),
    ):
        pass


@pytest.mark.long
def test_observe_runs_the_pipeline_and_the_servers_until_control_c(tmp_path):
    command = [sys.executable, "-u", "-m", "pipelines", "observe", "--run", "first", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "until Ctrl-C" in line:
                break
        output = "".join(lines)
        url = next(line.split()[1] for line in lines if line.startswith("Prometheus"))
        assert query(url, 'last_over_time(mappo_run_state{run="first",state="finished"}[5m]) == 1'), output
        for stage in ("validate", "evaluate"):
            assert query(url, f'last_over_time(mappo_stage_success{{run="first",stage="{stage}"}}[5m]) == 1'), (
                output
            )
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert status(f"{url}/-/ready") == 0
    assert (Path(tmp_path) / "runs" / "first" / "observers" / "data").is_dir()
