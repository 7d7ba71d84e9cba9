"""Measure the cost of checkpoints: training time, bytes, and the time to resume from one.

    python -m benchmarks.checkpoints                              a directory, and an S3 store that moto serves
    python -m benchmarks.checkpoints --store s3://bucket/prefix   this S3 store, with the environment's endpoint

Three ways to train take turns, so that other load on the machine affects them equally: `none` saves no
checkpoints, `directory` and `s3` save one after every iteration. The total times are compared as ratios to
the time of `none` in the same turn. `save` is the time that the training thread spends on a checkpoint: it
copies the state and hands it over.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from mappo.cli.arguments import add_config_arguments, config_from_arguments, dashed
from mappo.config import ExperimentConfig
from mappo.runs.run import Run
from mappo.runs.saver import SaveCounts
from mappo.training import training
from mappo.training.history import HistoryFile
from mappo.training.resuming import resume
from mappo.training.training_state import initial_progress


def main() -> None:
    """Print a line for each way to train, with the time to resume."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.usage = "%(prog)s [RECIPE] [--turns N] [--store s3://...] [--SECTION.FIELD VALUE ...]"
    parser.add_argument(
        "--turns", type=int, default=3, metavar="N", help="number of trainings of each way (default: 3)"
    )
    parser.add_argument("--store", metavar="STORE", help="S3 store to use instead of a temporary one")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    config = config_from_arguments(arguments)
    torch.set_num_threads(config.threads or 1)
    with TemporaryDirectory() as directory, _s3(arguments.store) as s3:
        ways = {"none": None, "directory": directory, "s3": s3}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(arguments.turns):
            for name, store in ways.items():
                measured[name].append(_train(config, store, Path(directory), f"{name}-{turn}"))
        _print(config, measured, {name: f"{store}/{name}-0" for name, store in ways.items() if store})


def _train(config: ExperimentConfig, store: str | None, directory: Path, name: str) -> tuple[float, float]:
    """Train and return the seconds of all iterations, and how many of them the training thread spent saving."""
    history = HistoryFile(directory / f"{name}.csv")
    saves: list[float] = []
    if store is None:
        with (
            mock.patch.object(training, "Saver", _NoSaver),
            mock.patch.object(training, "snapshot", _none),
            mock.patch.object(training, "require_readable", _none),
        ):
            training.train(config, Run.at(directory / name), history, lambda _: saves.append(0.0))
    else:
        training.train(
            config, Run.at(f"{store}/{name}"), history, lambda report: saves.append(report.save_seconds)
        )
    return history.last_row()["elapsed_seconds"], sum(saves) * len(saves) / max(len(saves) - 1, 1)


def _none(*_: object) -> None:
    """Drop the state of training."""


class _NoSaver:
    """A saver that drops all checkpoints."""

    counts = SaveCounts()

    def __init__(self, *_: object):
        pass

    def save(self, *_: object) -> None:
        pass

    def close(self, *_: object) -> None:
        pass


def _print(
    config: ExperimentConfig, measured: dict[str, list[tuple[float, float]]], locations: dict[str, str]
) -> None:
    iterations = config.collection.num_iterations
    print(
        f"\n{config.environment.scenario}, {iterations} iterations of {config.collection.frames_per_batch} frames"
    )
    columns = f"{'ratio to none':>22} {'save ms':>8} {'share':>7} {'MB':>6} {'resume s':>9}"
    print(f"{'store':<10} {'s/iteration':>11} {columns}")
    base = [seconds for seconds, _ in measured["none"]]
    for name, turns in measured.items():
        seconds = statistics.median(seconds for seconds, _ in turns)
        ratios = sorted(total / base_total for (total, _), base_total in zip(turns, base, strict=True))
        ratio = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})"
        line = f"{name:<10} {seconds / iterations:>11.3f} {ratio:>22}"
        if name in locations:
            save_seconds = statistics.median(save_seconds for _, save_seconds in turns)
            line += f" {1000 * save_seconds / iterations:>8.1f} {100 * save_seconds / seconds:>6.2f}%"
            line += f" {_megabytes(locations[name]):>6.2f} {_resume_seconds(config, locations[name]):>9.2f}"
        print(line)


def _megabytes(location: str) -> float:
    run = Run.at(location)
    return sum(part.size_bytes for part in run.manifest(run.choose("last")).parts.values()) / 1e6


def _resume_seconds(config: ExperimentConfig, location: str) -> float:
    """Return the seconds to restore training from the store, without the imports of a new process."""
    start = time.perf_counter()
    run = Run.at(location)
    assert resume(config, run, initial_progress(config, None), None, torch.device("cpu"), run.refs())
    return time.perf_counter() - start


@contextmanager
def _s3(store: str | None) -> Iterator[str]:
    """Yield the store; without one, start moto's server in another process and yield a bucket of it."""
    if store:
        yield store
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket("benchmark")
        yield "s3://benchmark/runs"
    finally:
        server.terminate()
        server.wait()


def _make_bucket(name: str) -> None:
    import boto3
    from botocore.exceptions import EndpointConnectionError

    for _ in range(100):
        try:
            boto3.client("s3").create_bucket(Bucket=name)
            return
        except EndpointConnectionError:
            time.sleep(0.2)
    raise SystemExit("moto's server did not start within 20 s; install it with: pip install 'moto[s3,server]'")


if __name__ == "__main__":
    main()
