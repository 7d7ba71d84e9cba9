"""The command `export-metrics`: serve metrics of pipeline runs and schedules to Prometheus."""

import argparse
import signal
import sys
import time
import traceback
from typing import Any

from mappo.errors import ConfigError, MappoError
from mappo.monitoring import metrics
from mappo.monitoring.metric_set import CONTENT_TYPE
from mappo.monitoring.server import MetricsServer, Page, text_page
from pipelines.commands.arguments import add_command, add_connection_arguments, connection_of
from pipelines.commands.schedule_definition import add_zone_argument, zone_of
from pipelines.kubeflow.api import Api
from pipelines.run_metrics import RunMetrics

_EPILOG = """examples:
  python -m pipelines export-metrics --port 9465
  python -m pipelines export-metrics --endpoint http://ml-pipeline.kubeflow:8888 --interval 60

The metrics are listed in docs/metrics.md, under "Pipeline runs". If a poll of Kubeflow fails, mappo_kubeflow_up
becomes 0, and the next poll comes later, after up to five minutes.
"""
_PATIENCE_SECONDS = 5.0  # for the retries of one request; the next poll tries again in any case
_DEADLINE_SECONDS = 120.0
_LONGEST_PAUSE_SECONDS = 300.0
_MAX_DOUBLINGS = 10  # of the pause, after which it is the longest in any case
_STUCK_SECONDS = _LONGEST_PAUSE_SECONDS + 3 * _DEADLINE_SECONDS


def add(commands: Any) -> None:
    """Add the command `export-metrics`."""
    summary = "serve metrics of pipeline runs and schedules to Prometheus, until it is stopped"
    command = add_command(commands, "export-metrics", summary, _EPILOG)
    command.add_argument(
        "--port",
        type=int,
        default=metrics.EXPORTER_PORT,
        metavar="PORT",
        help=f"port on which the metrics are served, on all addresses; 0 selects any free port "
        f"(default: {metrics.EXPORTER_PORT})",
    )
    command.add_argument(
        "--interval",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="seconds between two polls of Kubeflow (default: 30)",
    )
    add_zone_argument(command)
    add_connection_arguments(command)
    command.set_defaults(execute=_export)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.interval < 1:
        raise ConfigError(f"--interval {arguments.interval}: must be 1 or more")
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port {arguments.port}: must be 0 to 65535")
    exporter = _Exporter(Api(connection_of(arguments), patience_seconds=_PATIENCE_SECONDS), arguments)
    try:
        server = MetricsServer(arguments.port, exporter.pages())
    except OSError as error:
        raise ConfigError(f"--port {arguments.port}: cannot listen there: {error.strerror}") from None
    print(f"metrics: http://localhost:{server.port}/metrics", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            time.sleep(exporter.poll())
    finally:
        server.close()


class _Exporter:
    """The polls of one Kubeflow: their metrics, the pause after each, and whether they still happen."""

    def __init__(self, kubeflow: Api, arguments: argparse.Namespace):
        self._kubeflow, self._interval = kubeflow, arguments.interval
        self._metrics = RunMetrics(zone_of(arguments.time_zone))
        self._num_failures = 0
        self._problems: set[str] = set()
        self._last = time.monotonic()

    def pages(self) -> dict[str, Any]:
        return {"/metrics": self._page, "/healthz": self._health}

    def poll(self) -> float:
        """Poll Kubeflow once, and return the seconds until the next poll; each failure doubles them."""
        try:
            problems = self._metrics.poll(self._kubeflow, _DEADLINE_SECONDS)
        except Exception as error:
            self._report(error)
            self._num_failures += 1
        else:
            for problem in set(problems) - self._problems:
                print(f"cannot read the stages of a run: {problem}", file=sys.stderr, flush=True)
            self._problems = set(problems)
            if self._num_failures:
                print(f"poll succeeded again, after {self._num_failures} failures", file=sys.stderr, flush=True)
            self._num_failures = 0
        self._last = time.monotonic()
        longest = max(_LONGEST_PAUSE_SECONDS, self._interval)
        return float(min(self._interval * 2 ** min(self._num_failures, _MAX_DOUBLINGS), longest))

    def _report(self, error: Exception) -> None:
        """Print why a poll failed, and the traceback if the error is a defect; polling continues."""
        if isinstance(error, MappoError | OSError):
            print(f"poll failed: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)

    def _page(self) -> Page:
        return Page(200, CONTENT_TYPE, self._metrics.text())

    def _health(self) -> Page:
        age = time.monotonic() - self._last
        if age > _STUCK_SECONDS:
            return text_page(503, f"stuck: no poll has ended for {age:.0f} s")
        return text_page(200, "failing" if self._num_failures else "polling")
