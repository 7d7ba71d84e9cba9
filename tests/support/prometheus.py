"""The real Prometheus servers of tests, and the queries of dashboards as Grafana would send them."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.services import free_ports, missing, wait

ROOT = Path(__file__).parents[2]
RULES = ROOT / "k8s" / "components" / "alerts" / "rules.yaml"
DASHBOARDS = sorted((ROOT / "k8s" / "components" / "dashboards").glob("*.json"))
GRAFANA = {
    "__rate_interval": "20s",
    "__interval": "5s",
}  # values of Grafana's own variables; the range is added later


def require(program: str) -> str:
    """Return the name of a program, or report which Debian package is missing."""
    if not shutil.which(program):
        missing(program, f"sudo apt install {'prometheus' if program == 'promtool' else program}")
    return program


@contextmanager
def prometheus(
    directory: Path, jobs: list[dict[str, Any]], alertmanager: str = "", rules: Path = RULES
) -> Iterator[str]:
    """Start a Prometheus with our rules that scrapes every second; the context is its URL."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": jobs,
    }
    if alertmanager:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        require("prometheus"),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        "--storage.tsdb.retention.time=10y",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with server(command, directory, f"{url}/-/ready"):
        yield url


@contextmanager
def pushgateway(directory: Path) -> Iterator[str]:
    """Start a Pushgateway; the context is its URL."""
    directory.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [require("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]
    with server(command, directory, f"{url}/-/ready"):
        yield url


@contextmanager
def server(command: list[str], directory: Path, ready: str) -> Iterator[None]:
    """Start a program, wait until it answers at `ready`, and kill it at the end of the block."""
    with (directory / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory)
    try:
        wait(lambda: status(ready) == 200, 60, f"no answer from {ready}; output in {output.name}")
        yield
    finally:
        process.kill()
        process.wait()


def get(url: str) -> Any:
    """Return the answer of a JSON API. An error of Prometheus is an answer, too."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def status(url: str) -> int:
    """Return the HTTP status of a URL, or 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def query(url: str, expression: str, at: float | None = None) -> list[dict[str, Any]]:
    """Return the series of an instant query, at the time `at` or at the current time."""
    return _result(url, "query", query=expression, time=at or time.time())


def eventually(condition: Callable[[], Any], seconds: float, message: object) -> Any:
    """Wait until a condition is true, and return its value."""
    wait(lambda: bool(condition()), seconds, message)
    return condition()


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Return the panels that show data; rows are only headings."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def expressions(dashboard: Path) -> list[tuple[str, str, bool]]:
    """Return every query of a dashboard: title of the panel, expression, and whether the query is instant."""
    return [
        (panel["title"], target["expr"], bool(target.get("instant")))
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def filled_in(expression: str, dashboard: Path, seconds: int, chosen: dict[str, str] | None = None) -> str:
    """Return an expression with values for the dashboard's variables and for Grafana's own variables."""
    variables = {
        variable["name"]: variable.get("allValue") or ".*"
        for variable in json.loads(dashboard.read_text())["templating"]["list"]
        if variable["type"] == "query"
    }
    values = {**GRAFANA, "__range": f"{seconds}s", **variables, **(chosen or {})}
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]] if match[1] in values else match[0], expression)


def without_data(url: str, dashboard: Path, seconds: int, end: float, step: int = 1) -> list[str]:
    """Return the panels and variables of a dashboard for which Prometheus returns no data."""
    empty = []
    for title, expression, instant in expressions(dashboard):
        filled_expression = filled_in(expression, dashboard, seconds)
        kind, times = (
            ("query", {"time": end})
            if instant
            else ("query_range", {"start": end - seconds, "end": end, "step": step})
        )
        if not _result(url, kind, query=filled_expression, **times):
            empty.append(f"{title}: {filled_expression}")
    for variable in json.loads(dashboard.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            matcher, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
            filled_matcher = filled_in(matcher, dashboard, seconds)
            answer = get(
                f"{url}/api/v1/label/{label}/values?"
                + urllib.parse.urlencode({"match[]": filled_matcher, "start": end - seconds, "end": end})
            )
            if not answer["data"]:
                empty.append(f"variable {variable['name']}: {filled_matcher}")
    return empty


def _result(url: str, kind: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = get(f"{url}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}")
    assert answer["status"] == "success", f"{parameters['query']}: {answer.get('error')}"
    return answer["data"]["result"]
