"""What one stage of a pipeline does, from its configuration to its files.

The terminal and the Kubeflow components call these functions and nothing else. Each takes the configuration as
JSON text, prints its progress, writes its files, and returns what the stage's artifacts are labelled with.
"""

import json
import logging
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
from mappo.compute.resources import cpu_limit, require_gpu
from mappo.config import ExperimentConfig, config_hash, from_json, override
from mappo.errors import MappoError, NonFiniteError, StageFailed
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.reporting.terminal import WarningLines, say
from mappo.runs.supervisor import COUNT_VARIABLE
from mappo.strict_json import parse_json

T = TypeVar("T")
_GOES_ON = {"train": "; training goes on from the last checkpoint"}


class Preempted(SystemExit):
    """The machine is wanted back (SIGTERM); the exit status says so. What was saved is gone on with next time."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@dataclass(frozen=True)
class StageResult:
    """What a finished stage tells the pipeline: finite numbers to plot, and what produced them."""

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
    """Read the configuration, set the process up, and watch over the stage."""
    if compiled_by not in ("", mappo.__version__):
        say(
            name,
            f"warning: mappo {compiled_by} compiled this pipeline, its image has mappo {mappo.__version__}: "
            "build the image again or compile with its version, or options may be missing or mean something else",
        )
    with readable_errors(name):
        settings = MonitorSettings.from_environment()
    if study:
        settings = replace(settings, study=study)
    with (
        _preemptible(),
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
            say(name, f"preempted: this process was asked to end{_GOES_ON.get(name, '')}")
            raise
        except NonFiniteError as error:
            monitor.met_non_finite(error.source)
            raise


def run_label(name: str, seed: str = "", location: str = "") -> str:
    """What metrics call a run: the same in all of its stages."""
    if given := name or os.environ.get("MAPPO_PIPELINE_RUN", ""):
        return f"{given}-{seed}" if seed else given
    return PurePosixPath(location).name or "none"


def fan_out(*listeners: Callable[[T], object]) -> Callable[[T], None]:
    """One that passes on what it hears to all."""

    def hear(event: T) -> None:
        for listener in listeners:
            listener(event)

    return hear


def _set_threads(name: str, threads: int) -> None:
    limit = cpu_limit()
    if threads > limit:
        say(name, f"threads = {threads}: the CPU limit of this process allows {limit}, which are used")
    torch.set_num_threads(min(threads or limit, limit))


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn the errors that people can mend into one line each, and show what the package logs.

    Raises:
        StageFailed: there was one.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    logger, handler = logging.getLogger("mappo"), WarningLines(name)
    logger.addHandler(handler)
    try:
        yield
    except StageFailed:  # printed already
        raise
    except (MappoError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error) or "out of memory"
        for line in reason.splitlines():
            say(name, f"failed: {line}")
        raise StageFailed(
            f"{name}: {reason}", is_final=not (_may_pass(error) or _may_pass(error.__cause__))
        ) from error
    except Exception as error:
        say(name, f"failed: {type(error).__name__}: {error}")
        raise
    finally:
        logger.removeHandler(handler)


def _may_pass(error: BaseException | None) -> bool:
    """Return whether another attempt may not meet this error."""
    return isinstance(error, OSError) or (isinstance(error, MappoError) and error.may_pass)


def metadata_of(config: ExperimentConfig) -> dict[str, str]:
    """Return the labels of a stage's artifacts; few, since each step that reads an artifact repeats them."""
    metadata = {
        "config_hash": config_hash(config),
        "mappo_version": mappo.__version__,
        "seed": str(config.seed),  # Kubeflow would make a number of it a float
    }
    attempts = os.environ.get(COUNT_VARIABLE, "")
    return {**metadata, "attempts": attempts} if attempts else metadata


def finite(stage: str, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that Kubeflow accepts; those it would reject are named, not dropped in silence."""
    kept = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    if left_out := sorted(numbers.keys() - kept.keys()):
        say(stage, f"not finite, left out of the metrics: {', '.join(left_out)}")
    return kept


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM, which announces that a pod is evicted, ends the block by `Preempted`; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the rest is for saving
        raise Preempted

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_json(path: Path | None, record: Any) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
