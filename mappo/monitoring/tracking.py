"""The reports of stages to MLflow: curves, the configuration as parameters, evaluations and pages.

Kubeflow Pipelines with its MLflow plugin creates an MLflow run for each stage, and logs the task's inputs and
final metrics itself, all at step 0. The names here have a group, as in `loss/loss_critic`, so that the two never
meet.
"""

import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mappo.config import ExperimentConfig, config_hash
from mappo.errors import ConfigError, Pruned
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.statistics import Estimate
from mappo.monitoring.curves import curves
from mappo.monitoring.mlflow_sender import FRAMES, Sender, Target
from mappo.monitoring.mlflow_settings import MlflowSettings
from mappo.strict_json import to_dict
from mappo.training.history import IterationReport, TrainingStarted

_log = logging.getLogger(__name__)
_END_SECONDS = 20.0  # longest wait for the server at the end of a stage
_INTERRUPTED_SECONDS = 0.8  # the same after SIGTERM or Ctrl-C; a pod on Kubeflow has a second
_MAX_KEY = 250  # characters of a parameter's or a metric's name; a limit of MLflow


class TrackedRun:
    """The MLflow run of a stage. It begins with the first report.

    make_sender: makes its sender; takes whether an earlier process may have begun it. Without it, the methods do
    nothing.
    """

    def __init__(self, make_sender: Callable[[bool], Sender] | None):
        self._make_sender = make_sender
        self._sender: Sender | None = None

    @property
    def run_id(self) -> str:
        """The ID of the MLflow run; empty if it is not known."""
        return self._sender.run_id if self._sender else ""

    def began(self, start: TrainingStarted) -> None:
        """Report that training starts; it continues the MLflow run of an earlier attempt."""
        self._begin(is_continued=start.attempt > 1)

    def iterated(self, report: IterationReport) -> None:
        """Report a completed iteration: a point of each curve, over frames."""
        if self._sender:
            frames = report.progress.frames
            progress = {"progress/iteration": report.progress.iteration, FRAMES: frames}
            self._sender.add(frames, {**progress, **curves(report)})

    def evaluated(self, report: EvaluationReport) -> None:
        """Report an evaluation: returns and measurements of every policy, with their intervals."""
        self.measured(report.training_frames, evaluation_metrics(report))

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report finite numbers that belong to a step."""
        if sender := self._begin(is_continued=True):
            sender.add(step, numbers)

    def attach(self, file: Path) -> None:
        """Add a page to the artifacts, as HTML that MLflow shows."""
        if sender := self._begin(is_continued=True):
            sender.attach("page.html", file)

    def close(self, status: str, seconds: float) -> None:
        """End the MLflow run, if it has begun; wait for the server at most this many seconds."""
        if self._sender:
            self._sender.close(status, seconds)

    def _begin(self, is_continued: bool) -> Sender | None:
        if self._make_sender and not self._sender:
            try:
                self._sender = self._make_sender(is_continued)
            except ConfigError as error:
                self._make_sender = None
                _log.warning("%s", error)
        return self._sender


@contextmanager
def tracked_run(
    config: ExperimentConfig,
    name: str,
    location: str | Path,
    *,
    run: str = "",
    tags: Mapping[str, str] = MappingProxyType({}),
    is_nested: bool = False,
) -> Iterator[TrackedRun]:
    """Track what happens in the block as one MLflow run, if MLFLOW_TRACKING_URI names a server.

    Nothing here fails the block. On Kubeflow, the stage has an MLflow run; with `is_nested`, this is one below it.
    `location` is that of the run, or empty if it is unknown. `run` is the ID of an MLflow run to continue if the
    stage has none. `tags` are added to the MLflow run.
    """
    tracked = TrackedRun(_sender_maker(config, name, str(location), run, tags, is_nested))
    try:
        yield tracked
    except Pruned:
        tracked.close("KILLED", _END_SECONDS)
        raise
    except Exception:
        tracked.close("FAILED", _END_SECONDS)
        raise
    except BaseException:
        tracked.close("KILLED", _INTERRUPTED_SECONDS)
        raise
    tracked.close("FINISHED", _END_SECONDS)


def parameters_of(config: ExperimentConfig) -> dict[str, str]:
    """Return each field of a configuration as a parameter, such as `learner.clip_epsilon`.

    Fields outside of sections have the prefix `experiment`: Kubeflow logs an input `seed` of the stage itself.
    """
    sections = {key: value for key, value in to_dict(config).items() if isinstance(value, dict)}
    loose = {key: value for key, value in to_dict(config).items() if key not in sections}
    return dict(_flat("", {**sections, "experiment": loose}))


def evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    """Return the numbers of an evaluation, such as `evaluation/trained/return_mean_low`."""
    metrics: dict[str, float] = {}
    for policy, returns in report.policies().items():
        estimates: dict[str, Estimate | None] = {
            "return_mean": returns.mean,
            "return_interquartile_mean": returns.interquartile_mean,
            **{f"measured_{name}": measurement.mean for name, measurement in returns.measurements.items()},
        }
        metrics[f"evaluation/{policy}/episodes"] = len(returns.episode_returns)
        for name, estimate in estimates.items():
            if estimate:
                ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
                numbers = {f"evaluation/{policy}/{_key(name)}{end}": value for end, value in ends.items()}
                metrics |= {key: value for key, value in numbers.items() if value is not None}
    return metrics


def _sender_maker(
    config: ExperimentConfig, name: str, location: str, run: str, tags: Mapping[str, str], is_nested: bool
) -> Callable[[bool], Sender] | None:
    settings = _settings()
    if settings is None:
        return None
    stage_run = "" if is_nested else settings.run
    parent = {"mlflow.parentRunId": settings.run} if is_nested and settings.run else {}
    place = {"mappo.location": _absolute(location)} if location else {}
    tags = {**place, "mappo.config_hash": config_hash(config), **parent, **tags}

    def make(is_continued: bool) -> Sender:
        target = Target(name, _identity(location), stage_run or run, tags, is_continued, is_owned=not stage_run)
        return Sender(settings, target, parameters_of(config))

    return make


def _settings() -> MlflowSettings | None:
    try:
        return MlflowSettings.from_environment()
    except ConfigError as error:
        _log.warning("MLflow is not used: %s", error)
        return None


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())


def _identity(location: str) -> str:
    """Return what identifies a run on a server that several machines share; empty for an unknown location."""
    if not location:
        return ""
    place = location if "://" in location else f"{socket.gethostname()}:{_absolute(location)}"
    return hashlib.sha256(place.encode()).hexdigest()[:32]


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the parts of nested JSON objects by their dotted path, as text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(f"{path}.{_key(str(key))}".lstrip("."), item)
    else:
        yield path[:_MAX_KEY], value if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    """Return a name in which each character that MLflow does not take is an underscore."""
    return re.sub(r"[^\w\- :]", "_", name, flags=re.ASCII)
