"""All that changes while training: as it begins, as a checkpoint keeps it, and as it goes on from one."""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch

from mappo.compute.resources import cpu_limit, resolve_device
from mappo.config import ExperimentConfig, config_hash, differences
from mappo.errors import CheckpointError, ConfigError, SimulationStateError
from mappo.learning.learner import Learner
from mappo.learning.networks import Networks, make_networks
from mappo.runs.checkpoint import Checkpoint, Platform, restore_networks
from mappo.runs.run import Run
from mappo.training.collectors import Collector, make_collector
from mappo.training.history import Progress

_log = logging.getLogger(__name__)
_FREE_IN_EXTENSION = ("collection.total_frames", "device", "evaluation.", "selection.", "threads")
_FREE_IN_RESUMPTION = ("evaluation.",)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts, if not from scratch.

    extend: go on with a finished run: its networks, its optimiser and its count of frames, in new episodes.
    warm-start: a new run whose networks begin as the checkpoint's.
    """

    kind: Literal["extend", "warm-start"]
    checkpoint: Checkpoint

    def __str__(self) -> str:
        """What tells runs that started differently from each other, and not the seeds of one such experiment."""
        frames = f"{self.checkpoint.frames} frames"
        if self.kind == "extend":
            return " then ".join(filter(None, [self.checkpoint.started_from, f"extended after {frames}"]))
        return f"warm start from configuration {config_hash(self.checkpoint.config)[:12]} after {frames}"


@dataclass
class TrainingState:
    """All that changes from iteration to iteration."""

    collector: Collector
    learner: Learner
    progress: Progress
    started_from: str
    highest_return: float = -math.inf
    selection_return: float = math.nan

    @property
    def networks(self) -> Networks:
        return self.learner.networks


def first_progress(config: ExperimentConfig, start: StartingPoint | None) -> Progress:
    """That of the run to go on with, once it is certain that this configuration does go on with it."""
    if start is None or start.kind == "warm-start":
        return Progress()
    checkpoint = start.checkpoint
    changed = _changed(checkpoint.config, config, _FREE_IN_EXTENSION)
    if changed:
        raise ConfigError(
            f"an extended run keeps its configuration but for {', '.join(_FREE_IN_EXTENSION)}; changed: "
            f"{changed}; for a new run from these networks, use a warm start"
        )
    asked = checkpoint.config.collection.num_iterations
    if checkpoint.iteration < asked:
        raise ConfigError(
            f"the run to extend did not finish: it has {checkpoint.iteration} of {asked} iterations; go on with "
            "it first, by the command that began it"
        )
    if config.collection.num_iterations <= checkpoint.iteration:
        raise ConfigError(
            f"collection.total_frames = {config.collection.total_frames}: the run to extend has "
            f"{checkpoint.frames} frames already; ask for more"
        )
    return Progress(checkpoint.iteration, checkpoint.frames)


def begin_training(
    config: ExperimentConfig, first: Progress, start: StartingPoint | None, device: torch.device
) -> TrainingState:
    """Training as it is before its first iteration."""
    collector = make_collector(config, device, first.frames)
    networks = make_networks(config.networks, collector.environment)
    learner = Learner(config.learner, networks, config.collection.num_iterations, first.iteration)
    if start:
        restore_networks(start.checkpoint, networks)
        if start.kind == "extend":
            _restore_optimiser(start.checkpoint, learner)
    collector.begin()
    if collector.said:
        _log.warning(collector.said)
    return TrainingState(collector, learner, first, str(start) if start else "")


def resume(
    config: ExperimentConfig, run: Run, first: Progress, start: StartingPoint | None
) -> tuple[TrainingState, Checkpoint] | None:
    """Training as it was after the newest checkpoint that can be used, and that checkpoint; None in a new run.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
        ConfigError: the run was begun with another configuration, or from something else.
    """
    problems = []
    for saved in run.saved():
        try:
            checkpoint = run.load(saved)
            _require_same_run(run, checkpoint, config, start)
            return _restored(config, checkpoint, first, start), checkpoint
        except (CheckpointError, SimulationStateError) as error:
            problems.append(str(error))
            _log.warning("%s cannot be used, looking for the one before: %s", saved, error)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints of {run.store.location} can be used; to train from scratch, "
            f"name another run; the newest: {problems[0]}"
        )
    return None


def _require_same_run(
    run: Run, checkpoint: Checkpoint, config: ExperimentConfig, start: StartingPoint | None
) -> None:
    place = run.store.location
    if changed := _changed(checkpoint.config, config, _FREE_IN_RESUMPTION):
        raise ConfigError(
            f"run {place} was begun with another configuration: {changed}; give it that one, or name another run"
        )
    if checkpoint.started_from != (str(start) if start else ""):
        raise ConfigError(
            f"run {place} was begun with start {checkpoint.started_from or 'from scratch'!r}, now asked for is "
            f"{str(start) if start else 'from scratch'!r}; name another run"
        )


def snapshot(config: ExperimentConfig, training: TrainingState, history: str) -> Checkpoint:
    """Copies of everything, which training does not change any more, with the history so far as CSV."""
    learner = training.learner
    return Checkpoint(
        config,
        training.progress.iteration,
        training.progress.frames,
        tensors=_copies(learner.networks.modules().state_dict()),
        optimiser=_copies(learner.optimiser_tensors()),
        state=training.collector.capture(),
        history=history,
        platform=Platform.here(resolve_device(config.device)),
        selection_return=_finite_or_none(training.selection_return),
        highest_return=_finite_or_none(training.highest_return),
        started_from=training.started_from,
    )


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _changed(before: ExperimentConfig, after: ExperimentConfig, free: tuple[str, ...]) -> str:
    changes = differences(before, after).items()
    return ", ".join(f"{field} = {change}" for field, change in changes if not field.startswith(free))


def _restored(
    config: ExperimentConfig, checkpoint: Checkpoint, first: Progress, start: StartingPoint | None
) -> TrainingState:
    """Training as a checkpoint found it, with the random states it had."""
    _require_possible(config, checkpoint)
    device = resolve_device(config.device)
    training = begin_training(config, first, None, device)
    restore_networks(checkpoint, training.networks)
    if checkpoint.iteration > first.iteration or (start and start.kind == "extend"):
        _restore_optimiser(checkpoint, training.learner)
    training.learner.iteration = checkpoint.iteration
    try:
        training.collector.restore(checkpoint.state)
    except BaseException:
        training.collector.close()
        raise
    training.progress = Progress(checkpoint.iteration, checkpoint.frames)
    training.started_from = checkpoint.started_from
    if checkpoint.highest_return is not None:
        training.highest_return = checkpoint.highest_return
    return training


def _require_possible(config: ExperimentConfig, checkpoint: Checkpoint) -> None:
    done, planned = checkpoint.iteration, config.collection.num_iterations
    if done > planned or checkpoint.frames != done * config.collection.frames_per_batch:
        raise CheckpointError(
            f"{done} iterations of {planned} and {checkpoint.frames} frames are not possible with batches of "
            f"{config.collection.frames_per_batch} frames"
        )


def match_platform(then: Platform, device: torch.device) -> None:
    """Take over the number of threads, and say what else differs: then numbers are rounded differently."""
    if then.threads != torch.get_num_threads() and then.threads <= cpu_limit():
        torch.set_num_threads(then.threads)
    now = Platform.here(device)
    changed = [
        f"{name} {before} -> {after}"
        for name, before, after in (
            ("device", then.device, now.device),
            ("threads", then.threads, now.threads),
            ("CPU", then.cpu, now.cpu),
            *((name, then.versions.get(name), value) for name, value in now.versions.items()),
        )
        if before != after
    ]
    if changed:
        _log.warning("goes on, but not bit by bit as it would have: %s", ", ".join(changed))


def _restore_optimiser(checkpoint: Checkpoint, learner: Learner) -> None:
    try:
        learner.restore_optimiser(checkpoint.optimiser)
    except ValueError as error:
        raise CheckpointError(f"training cannot go on from the checkpoint: {error}") from error
