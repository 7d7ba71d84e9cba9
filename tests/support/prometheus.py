"""The real Prometheus servers of tests, and the queries of dashboards put to them as Grafana would."""

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
GRAFANA = {"__rate_interval": "20s", "__interval": "5s"}  # what Grafana puts for its own variables; and the range


def require(program: str) -> str:
    """A program of Debian's package of the same name."""
    if not shutil.which(program):
        missing(program, f"sudo apt install {'prometheus' if program == 'promtool' else program}")
    return program


@contextmanager
def prometheus(
    directory: Path, jobs: list[dict[str, Any]], alertmanager: str = "", rules: Path = RULES
) -> Iterator[str]:
    """The URL of a Prometheus with our rules that scrapes every second."""
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
    """The URL of a Pushgateway."""
    directory.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [require("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]
    with server(command, directory, f"{url}/-/ready"):
        yield url


@contextmanager
def server(command: list[str], directory: Path, ready: str) -> Iterator[None]:
    """A program that ends with the block, once it answers."""
    with (directory / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory)
    try:
        wait(lambda: status(ready) == 200, 60, f"no answer from {ready}; output in {output.name}")
        yield
    finally:
        process.kill()
        process.wait()


def get(url: str) -> Any:
    """Return the answer of a JSON API, errors of Prometheus included."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def status(url: str) -> int:
    """The HTTP status; 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def query(url: str, expression: str, at: float | None = None) -> list[dict[str, Any]]:
    """The series of an instant query."""
    return _result(url, "query", query=expression, time=at or time.time())


def eventually(condition: Callable[[], Any], seconds: float, what: object) -> Any:
    """Wait until a condition is true, and return what it gave."""
    wait(lambda: bool(condition()), seconds, what)
    return condition()


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Return the panels that show data; rows are only headings."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def expressions(dashboard: Path) -> list[tuple[str, str, bool]]:
    """Yield each query of a dashboard: the panel's title, the expression, whether it is instant."""
    return [
        (panel["title"], target["expr"], bool(target.get("instant")))
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def filled_in(expression: str, dashboard: Path, seconds: int, chosen: dict[str, str] | None = None) -> str:
    """An expression with the dashboard's variables and Grafana's own put in."""
    variables = {
        variable["name"]: variable.get("allValue") or ".*"
        for variable in json.loads(dashboard.read_text())["templating"]["list"]
        if variable["type"] == "query"
    }
    values = {**GRAFANA, "__range": f"{seconds}s", **variables, **(chosen or {})}
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]] if match[1] in values else match[0], expression)


def without_data(url: str, dashboard: Path, seconds: int, end: float, step: int = 1) -> list[str]:
    """The panels and variables of a dashboard for which Prometheus has nothing, or an error."""
    empty = []
    for title, expression, instant in expressions(dashboard):
        asked = filled_in(expression, dashboard, seconds)
        kind, times = (
            ("query", {"time": end})
            if instant
            else ("query_range", {"start": end - seconds, "end": end, "step": step})
        )
        if not _result(url, kind, query=asked, **times):
            empty.append(f"{title}: {asked}")
    for variable in json.loads(dashboard.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            matcher, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
            asked = filled_in(matcher, dashboard, seconds)
            found = get(
                f"{url}/api/v1/label/{label}/values?"
                + urllib.parse.urlencode({"match[]": asked, "start": end - seconds, "end": end})
            )
            if not found["data"]:
                empty.append(f"variable {variable['name']}: {asked}")
    return empty


def _result(url: str, kind: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = get(f"{url}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}")
    assert answer["status"] == "success", f"{parameters['query']}: {answer.get('error')}"
    return answer["data"]["result"]
