"""What one stage of a pipeline does, from its configuration to its files.

The terminal and the Kubeflow components call these functions and nothing else. Each takes the configuration as
JSON text, prints its progress, writes its files, and returns what the stage's artifacts are labelled with.
"""

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import mappo
from mappo import checkpoint as checkpoints
from mappo import evaluate as evaluation
from mappo import train as training
from mappo import validate as validation
from mappo.checkpoint import CheckpointError
from mappo.collection import NonFiniteObservation
from mappo.config import ConfigError, ExperimentConfig, config_hash, from_json, to_json
from mappo.console import estimate, say, training_progress
from mappo.environment import resolve_device
from mappo.evaluate import EpisodeReturns, EvaluationReport, NonFiniteReturn
from mappo.history import HistoryFile, IterationReport
from mappo.learner import NonFiniteLoss
from mappo.validate import Check, EnvironmentUnfit, ValidationReport

_READABLE = (  # errors that people can mend, with messages that say how
    *(CheckpointError, ConfigError, EnvironmentUnfit),
    *(NonFiniteLoss, NonFiniteObservation, NonFiniteReturn),
    OSError,
)


class StageFailed(Exception):
    """A stage ended without its result; the reason has been printed."""


@dataclass(frozen=True)
class Outcome:
    """What a finished stage tells the pipeline: finite numbers to plot, and what produced them."""

    metadata: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)


def validate(config: str, report: Path | None = None) -> Outcome:
    """Check that the task is fit to train on; write the `ValidationReport` as JSON.

    Raises:
        StageFailed: a check failed.
    """
    with _stage("validate", config) as experiment:
        result = validation.validate(experiment, on_check=_say_check)
        _write_json(report, result)
        if result.failures:
            raise EnvironmentUnfit(_listed(result))
        counts = Counter(check.outcome for check in result.checks)
        say("validate", f"{counts['passed']} checks passed, {counts['warning']} with a warning, none failed")
        return Outcome(_metadata(experiment))


def train(config: str, checkpoint: Path, history: Path) -> Outcome:
    """Train; write the checkpoint directory and the history as CSV, one row an iteration.

    Raises:
        StageFailed: the configuration cannot be trained, or training diverged.
    """
    with _stage("train", config) as experiment:
        _say_plan(experiment)
        history.parent.mkdir(parents=True, exist_ok=True)
        with closing(HistoryFile(history)) as file, training_progress(experiment.collection) as show:
            last: deque[IterationReport] = deque(maxlen=1)
            listeners = (file.append, show, last.append)
            training.train(experiment, checkpoint, lambda report: [listener(report) for listener in listeners])
        say("train", f"{last[0].progress.frames:,} frames in {last[0].elapsed_seconds:.1f} s; saved {checkpoint}")
        return Outcome(_metadata(experiment), _finite("train", last[0].row()))


def evaluate(config: str, checkpoint: Path, report: Path | None = None) -> Outcome:
    """Judge a checkpoint on held-out seeds, beside a random policy; write the `EvaluationReport` as JSON.

    Raises:
        StageFailed: the checkpoint cannot be read or does not fit the task.
    """
    with _stage("evaluate", config) as experiment:
        trained = checkpoints.load(checkpoint)
        seeds, episodes = experiment.evaluation.seeds, experiment.evaluation.episodes_per_seed
        say("evaluate", f"{len(seeds) * episodes} episodes ({len(seeds)} seeds x {episodes}) for each policy")
        result = evaluation.evaluate(experiment, trained)
        _write_json(report, result)
        for policy, returns in (("trained", result.trained), ("random", result.random)):
            say("evaluate", _returns_line(policy, returns))
        say("evaluate", f"95 % bootstrap intervals; resampled: {result.resampled}")
        return Outcome(_metadata(experiment), _finite("evaluate", _evaluation_metrics(result)))


@contextmanager
def _stage(name: str, config: str) -> Iterator[ExperimentConfig]:
    """Read the configuration and set the process up; turn the errors that people can mend into one line."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        experiment = from_json(config)
        torch.set_num_threads(experiment.threads)
        yield experiment
    except _READABLE as error:
        for line in str(error).splitlines():
            say(name, f"failed: {line}")
        raise StageFailed(f"{name}: {error}") from error
    except Exception as error:
        say(name, f"failed: {type(error).__name__}: {error}")
        raise


def _metadata(config: ExperimentConfig) -> dict[str, str]:
    return {
        "config": to_json(config),
        "config_hash": config_hash(config),
        "mappo_version": mappo.__version__,
        "seed": str(config.seed),  # Kubeflow would make a number of it a float
    }


def _finite(stage: str, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that Kubeflow accepts; those it would reject are named, not dropped in silence."""
    finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    if left_out := sorted(numbers.keys() - finite.keys()):
        say(stage, f"not finite, left out of the metrics: {', '.join(left_out)}")
    return finite


def _write_json(path: Path | None, record: Any) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def _say_check(check: Check) -> None:
    say("validate", f"{check.outcome:<7}  {check.name:<13}  {check.detail}")


def _listed(report: ValidationReport) -> str:
    return "\n".join(f"{check.name}: {check.detail}" for check in report.failures)


def _say_plan(config: ExperimentConfig) -> None:
    collection = config.collection
    frames = collection.num_iterations * collection.frames_per_batch
    say(
        "train",
        f"{config.environment.scenario}: {frames:,} frames in {collection.num_iterations} iterations of "
        f"{collection.frames_per_batch:,} ({collection.num_envs} environments x {collection.rollout_frames}) "
        f"on {resolve_device(config.device)}, {config.threads} threads, seed {config.seed}, "
        f"configuration {config_hash(config)[:12]}",
    )
    if frames != collection.total_frames:
        say("train", f"total_frames = {collection.total_frames:,} was rounded up to whole iterations")


def _returns_line(policy: str, returns: EpisodeReturns) -> str:
    return (
        f"{policy:<8} mean return {estimate(returns.mean)}  "
        f"interquartile mean {estimate(returns.interquartile_mean)}  "
        f"{len(returns.episode_returns)} episodes of {returns.episode_frames_mean:.0f} frames"
    )


def _evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    metrics: dict[str, float] = {"training_frames": report.training_frames}
    for policy, returns in (("trained", report.trained), ("random", report.random)):
        for name, value in (("mean", returns.mean), ("interquartile_mean", returns.interquartile_mean)):
            metrics[f"{policy}_return_{name}"] = value.value
            if value.low is not None and value.high is not None:
                metrics[f"{policy}_return_{name}_low"] = value.low
                metrics[f"{policy}_return_{name}_high"] = value.high
    return metrics
