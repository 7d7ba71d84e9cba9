"""Measure the cost of metrics and scrapes for training.

    python -m benchmarks.monitoring --turns 5

Three ways to train take turns, so that other load on the machine affects them equally: `none` has no metrics,
`scraped` is scraped every second (on a cluster: every 15 s), `storm` is scraped by eight clients without a
pause. The clients run in another process. The wall-clock and CPU times of the whole training are compared as
ratios to `none` of the same turn. `update` is the time that the training thread spends on metrics. `serving`
is the CPU time of a process that only serves metrics, in per cent of one core; it is free of training's
noise.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from mappo.cli.arguments import add_config_arguments, config_from_arguments, dashed
from mappo.config import ExperimentConfig
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.run import Run
from mappo.training.history import HistoryFile, IterationReport
from mappo.training.training import train

_CLIENT = """
import sys, threading, time, urllib.request
url, clients, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
def scrape():
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).read()
        except OSError:
            pass
        time.sleep(pause)
for _ in range(clients):
    threading.Thread(target=scrape, daemon=True).start()
sys.stdin.read()
"""
_SERVING_SECONDS = 10.0
_CLIENTS = {"none": (0, 1.0), "scraped": (1, 1.0), "storm": (8, 0.0)}  # number of clients, pause in seconds


def main() -> None:
    """Print a line for each way to train."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.usage = "%(prog)s [RECIPE] [--turns N] [--SECTION.FIELD VALUE ...]"
    parser.add_argument(
        "--turns", type=int, default=3, metavar="N", help="number of trainings of each way (default: 3)"
    )
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    config = config_from_arguments(arguments)
    torch.set_num_threads(config.threads or 1)
    measured: dict[str, list[_Times]] = {name: [] for name in _CLIENTS}
    with TemporaryDirectory() as directory:
        for turn in range(arguments.turns):
            for name in _CLIENTS:
                measured[name].append(_train(config, Path(directory) / f"{name}-{turn}", *_CLIENTS[name]))
    serving = {name: _serving(config, *clients) for name, clients in _CLIENTS.items()}
    _print(config, measured, serving)


class _Times(NamedTuple):
    """The seconds of a whole training: wall-clock time, CPU time, and wall-clock time of updating metrics."""

    wall: float
    cpu: float
    update: float


def _train(config: ExperimentConfig, directory: Path, clients: int, pause: float) -> _Times:
    history = HistoryFile(directory / "history.csv")
    updates: list[float] = []

    def timed(monitor: Monitor, report: IterationReport) -> None:
        start = time.perf_counter()
        monitor.iterated(report)
        updates.append(time.perf_counter() - start)

    cpu_start = time.process_time()
    if not clients:
        train(config, Run.at(directory), history, lambda _: None)
    else:
        with Monitor("train", "benchmark", MonitorSettings(port=0, linger_seconds=0), lambda _: None) as monitor:
            monitor.planned(config)
            with _scraping(monitor.port, clients, pause):
                run = Run.at(directory, on_request=monitor.requested)
                train(config, run, history, partial(timed, monitor), on_save=monitor.saved)
    return _Times(history.last_row()["elapsed_seconds"], time.process_time() - cpu_start, sum(updates))


def _serving(config: ExperimentConfig, clients: int, pause: float) -> float:
    """Return the CPU seconds that serving metrics takes in a second."""
    with Monitor("train", "benchmark", MonitorSettings(port=0, linger_seconds=0), lambda _: None) as monitor:
        monitor.planned(config)
        with _scraping(monitor.port, clients, pause):
            time.sleep(2)  # until the clients have started and the first burst is over
            start, cpu_start = time.perf_counter(), time.process_time()
            time.sleep(_SERVING_SECONDS)
            return (time.process_time() - cpu_start) / (time.perf_counter() - start)


@contextmanager
def _scraping(port: int | None, clients: int, pause: float) -> Iterator[None]:
    command = [sys.executable, "-c", _CLIENT, f"http://127.0.0.1:{port}/metrics", str(clients), str(pause)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


def _print(config: ExperimentConfig, measured: dict[str, list[_Times]], serving: dict[str, float]) -> None:
    iterations, frames = config.collection.num_iterations, config.collection.frames_per_batch
    print(f"\n{config.environment.scenario}, {iterations} iterations of {frames} frames")
    columns = f"{'wall-clock ratio':>22} {'CPU ratio':>22} {'update ms':>10} {'share':>7} {'serving':>8}"
    print(f"{'':<8} {'s/iteration':>11} {columns}")
    for name, turns in measured.items():
        seconds = statistics.median(turn.wall for turn in turns)
        update = statistics.median(turn.update for turn in turns)
        wall = _ratio([turn.wall for turn in turns], [turn.wall for turn in measured["none"]])
        cpu = _ratio([turn.cpu for turn in turns], [turn.cpu for turn in measured["none"]])
        print(
            f"{name:<8} {seconds / iterations:>11.3f} {wall:>22} {cpu:>22} {1000 * update / iterations:>10.2f} "
            f"{100 * update / seconds:>6.3f}% {100 * serving[name]:>7.2f}%"
        )


def _ratio(values: list[float], base: list[float]) -> str:
    ratios = sorted(value / base_value for value, base_value in zip(values, base, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})"


if __name__ == "__main__":
    main()
