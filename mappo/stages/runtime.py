"""The shared parts of all stages: set up the process, monitor it, and label the artifacts.

The command `mappo` and the Kubeflow components call the stages in this package and nothing else. A stage takes the
configuration as JSON text, prints its progress, writes its files, and returns the labels of its artifacts.
"""

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

import mappo
from mappo.compute.library_cache import share_libraries
from mappo.compute.resources import cpu_limit, require_gpu
from mappo.config import ExperimentConfig, config_hash, from_json, override
from mappo.errors import NonFiniteError, Preempted
from mappo.evaluation.statistics import Estimate
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.reporting.terminal import say
from mappo.runs.library_store import library_store_from_environment
from mappo.runs.owned_file import write_whole
from mappo.runs.supervisor import COUNT_VARIABLE
from mappo.stages.readable_errors import readable_errors
from mappo.strict_json import parse_json

T = TypeVar("T")
_RESUME_HINTS = {"train": "; the next start resumes from the last checkpoint"}  # by stage


@dataclass(frozen=True)
class StageResult:
    """The result of a finished stage: labels that say what produced its artifacts, and finite numbers to plot."""

    metadata: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)


@contextmanager
def watched_stage(
    name: str,
    config: str,
    compiled_by: str,
    seed: str = "",
    label: str = "",
    *,
    study: str = "",
    gpu_count: str = "0",
) -> Iterator[tuple[ExperimentConfig, Monitor]]:
    """Set up a stage and monitor it; the context is the configuration and the monitor.

    Raises:
        Preempted: the process received SIGTERM during the stage.
        StageFailed: a setting is not allowed, or the stage raised an error that a user can fix.
    """
    if compiled_by not in ("", mappo.__version__):
        say(
            name,
            f"warning: mappo {compiled_by} compiled this pipeline, but its image has mappo {mappo.__version__}: "
            "options may be missing or differ in meaning; rebuild the image, or compile with its version",
        )
    with readable_errors(name):
        settings = MonitorSettings.from_environment()
        share_libraries(library_store_from_environment())
    if study:
        settings = replace(settings, study=study)
    with (
        preemptible(),
        Monitor(name, label, settings, partial(say, name)) as monitor,
        readable_errors(name),
    ):
        experiment = from_json(config)
        if seed:
            experiment = override(experiment, {"seed": parse_json(seed)})
        require_gpu(gpu_count, experiment.device)
        _set_threads(name, experiment.threads)
        try:
            yield experiment, monitor
        except Preempted:
            say(name, f"preempted: this process received SIGTERM{_RESUME_HINTS.get(name, '')}")
            raise
        except NonFiniteError as error:
            monitor.met_non_finite(error.source)
            raise


def run_label(name: str, seed: str = "", location: str = "") -> str:
    """Return the name of a run in metrics, which is the same in all of its stages.

    The name is `name` or else the ID of the pipeline's run, followed by the seed. Without both of them, it is the
    last part of `location`.
    """
    if run_name := name or os.environ.get("MAPPO_PIPELINE_RUN", ""):
        return f"{run_name}-{seed}" if seed else run_name
    return PurePosixPath(location).name or "none"


def fan_out(*listeners: Callable[[T], object]) -> Callable[[T], None]:
    """Return a listener that passes every event on to all listeners, in order."""

    def notify(event: T) -> None:
        for listener in listeners:
            listener(event)

    return notify


def _set_threads(name: str, threads: int) -> None:
    limit = cpu_limit()
    if threads > limit:
        say(name, f"threads = {threads}: the CPU limit of this process allows {limit}; using {limit}")
    torch.set_num_threads(min(threads or limit, limit))


def metadata_of(config: ExperimentConfig) -> dict[str, str]:
    """Return the labels of a stage's artifacts: few, because every step that reads an artifact repeats them."""
    metadata = {
        "config_hash": config_hash(config),
        "mappo_version": mappo.__version__,
        "seed": str(config.seed),  # as text, because Kubeflow turns numbers into floats
    }
    attempts = os.environ.get(COUNT_VARIABLE, "")
    return {**metadata, "attempts": attempts} if attempts else metadata


def finite(stage: str, numbers: dict[str, float]) -> dict[str, float]:
    """Return the finite numbers, because Kubeflow rejects others; print the names of those left out."""
    metrics = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    if left_out := sorted(numbers.keys() - metrics.keys()):
        say(stage, f"not finite, left out of the metrics: {', '.join(left_out)}")
    return metrics


def estimate_metrics(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate as metrics: its value, and the ends of its interval if it has one."""
    metrics = {name: estimate.value}
    if estimate.low is not None and estimate.high is not None:
        metrics |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return metrics


@contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the block on SIGTERM, which announces that the pod is evicted. Blocks may be nested.

    Outside the main thread, which alone may set signal handlers, the block runs without a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def preempt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt the last save
        raise Preempted

    previous_handler = signal.signal(signal.SIGTERM, preempt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def write_json(path: Path | None, record: Any) -> None:
    if path:
        write_whole(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
