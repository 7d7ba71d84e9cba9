"""Run a Prometheus and a Pushgateway on this machine, to monitor a pipeline that runs here."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mappo.errors import ConfigError
from mappo.monitoring import metrics

RULES = Path(__file__).parents[1] / "k8s" / "components" / "alerts" / "rules.yaml"
_SCRAPE_SECONDS = 2
_READY_SECONDS = 60.0
_PROMETHEUS, _PUSHGATEWAY = "prometheus", "prometheus-pushgateway"  # names of programs and of Debian packages
_CONFIG = """
global:
  scrape_interval: {scrape}s
  evaluation_interval: {scrape}s
rule_files: ["{rules}"]
scrape_configs:
  - job_name: mappo-training
    static_configs:
      - targets: ["127.0.0.1:{training}"]
        labels: {{namespace: local}}
  - job_name: mappo-pushgateway
    honor_labels: true
    static_configs:
      - targets: ["127.0.0.1:{pushgateway}"]
        labels: {{namespace: local}}
"""
_GRAPHS = {
    "return": "mappo_episode_return_mean",
    "frames per second": "mappo_frames_per_second",
    "losses": "mappo_loss",
    "where time goes": "rate(mappo_phase_seconds_total[30s])",
    "evaluation": "last_over_time(mappo_evaluation_return_mean[1h])",
}


@dataclass(frozen=True)
class Observers:
    """The addresses of the monitoring servers."""

    prometheus: str
    environment: dict[str, str]  # the variables that tell stages these addresses

    def lines(self) -> list[str]:
        """Return lines for the terminal: the URLs of the servers and of useful graphs."""
        width = max(len(name) for name in _GRAPHS)
        graph = f"{self.prometheus}/graph?g0.tab=0&g0.range_input=15m"
        return [
            f"Prometheus    {self.prometheus}",
            f"alerts        {self.prometheus}/alerts",
            f"Pushgateway   {self.environment['MAPPO_PUSHGATEWAY']}",
            f"training      http://localhost:{self.environment['MAPPO_METRICS_PORT']}/metrics (during training)",
            *(f"  {name:<{width}}  {graph}&g0.expr={quote(expression)}" for name, expression in _GRAPHS.items()),
            f"Grafana       add {self.prometheus} as a data source, import k8s/components/dashboards/*.json",
        ]


@contextmanager
def observers(directory: Path) -> Iterator[Observers]:
    """Run both servers until the block ends; their configuration, data and logs are written to `directory`.

    Raises:
        ConfigError: a program is not installed, or a server does not start.
    """
    missing = [package for package in (_PROMETHEUS, _PUSHGATEWAY) if not shutil.which(package)]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}; sudo apt install {' '.join(missing)}")
    if not RULES.exists():
        raise ConfigError(f"{RULES}: no such file; run observe in a clone of the repository")
    directory.mkdir(parents=True, exist_ok=True)
    prometheus, pushgateway, training = (_free_port(usual) for usual in (9090, 9091, metrics.PORT))
    config = directory / "prometheus.yml"
    config.write_text(
        _CONFIG.format(scrape=_SCRAPE_SECONDS, rules=RULES, training=training, pushgateway=pushgateway)
    )
    files = [f"--config.file={config.absolute()}", f"--storage.tsdb.path={(directory / 'data').absolute()}"]
    environment = {
        "MAPPO_METRICS_PORT": str(training),
        "MAPPO_PUSHGATEWAY": f"http://127.0.0.1:{pushgateway}",
        "MAPPO_LINGER_SECONDS": str(2 * _SCRAPE_SECONDS),
        "no_proxy": f"{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')},127.0.0.1".strip(","),
    }
    with (
        _server(prometheus, _PROMETHEUS, directory, files),
        _server(pushgateway, _PUSHGATEWAY, directory, ["--persistence.file="]),
    ):
        yield Observers(f"http://127.0.0.1:{prometheus}", environment)


@contextmanager
def _server(port: int, program: str, directory: Path, options: Sequence[str] = ()) -> Iterator[None]:
    """Run a server on a port of this machine until the block ends. Raise a ConfigError if it does not start."""
    address = f"127.0.0.1:{port}"
    command = [program, f"--web.listen-address={address}", *options]
    log = directory / f"{program}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not _is_ready(f"http://{address}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(f"{program} does not start: {_last_line(log)}; whole log: {log}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server runs here
    try:
        with opener.open(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def _free_port(usual: int) -> int:
    """Return the usual port, or another free one if it is taken."""
    for port in (usual, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"port {usual} is taken, and no other port is free")
