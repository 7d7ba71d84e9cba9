"""The state of training: made at the start and copied into checkpoints; see `resuming` for the way back."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from mappo.compute.computation import PLAIN, Computation
from mappo.compute.computation_choice import Machine, choose_computation, kept_computation
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.random_streams import random_states, set_random_states
from mappo.errors import CheckpointError, CompilationFailed
from mappo.learning.learner import Learner
from mappo.learning.networks import Networks, make_networks
from mappo.runs.checkpoint import Checkpoint, Platform, restore_networks
from mappo.training.collectors import Collector, make_collector
from mappo.training.continuation import require_extension
from mappo.training.history import HistoryFile, Progress

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint from which a run starts, if the run does not start from scratch.

    extend: continue a finished run with its networks, its optimiser and its count of frames, in new episodes.
    warm-start: start a new run with the networks of the checkpoint.
    """

    kind: Literal["extend", "warm-start"]
    checkpoint: Checkpoint

    def __str__(self) -> str:
        """Return a description that differs between starts, but not between the seeds of one experiment."""
        frames = f"{self.checkpoint.frames} frames"
        if self.kind == "extend":
            return " then ".join(filter(None, [self.checkpoint.started_from, f"extended after {frames}"]))
        config = self.checkpoint.saved_hash or config_hash(self.checkpoint.config)
        return f"warm start from configuration {config[:12]} after {frames}"


@dataclass
class TrainingState:
    """The objects and numbers that change from iteration to iteration."""

    collector: Collector
    learner: Learner
    progress: Progress
    started_from: str
    device: torch.device
    computation: Computation
    highest_return: float = -math.inf
    selection_return: float = math.nan

    @property
    def networks(self) -> Networks:
        return self.learner.networks


def initial_progress(config: ExperimentConfig, start: StartingPoint | None) -> Progress:
    """Return where training starts counting: zero, or the end of the run that it extends.

    Raises:
        ConfigError: the configuration does not extend the run, or the run to extend is not finished.
    """
    if start is None or start.kind == "warm-start":
        return Progress()
    checkpoint = start.checkpoint
    require_extension(checkpoint.config, checkpoint.iteration, checkpoint.frames, config)
    return Progress(checkpoint.iteration, checkpoint.frames)


def begin_run(
    config: ExperimentConfig,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
    is_shared: bool = False,
) -> TrainingState:
    """Make the state of training of a run without checkpoints. It compiles what pays, if that is left to it.

    is_shared: whether other runs use what this run compiles, as in a study or a matrix.

    Raises:
        CompilationFailed: the configuration names what must be compiled, and the compiler is missing or failed.
        ConfigError: the configuration does not go on as the run to extend, or this machine cannot.
    """
    machine = Machine.current(device)
    if start and start.kind == "extend":
        computation = kept_computation(config, start.checkpoint.computation, machine)
        return begin_training(config, initial, start, device, computation)
    computation, reason = choose_computation(config, machine, is_shared)
    if reason:
        _log.info(reason)
    states = random_states(device)
    try:
        return begin_training(config, initial, start, device, computation)
    except CompilationFailed as error:
        without, _ = choose_computation(config, replace(machine, missing="a compiler that works"), is_shared)
        if without == computation:
            raise
        _log.warning("%s, because compilation failed: %s", without, error)
        set_random_states(states, device)
        return begin_training(config, initial, start, device, without)


def begin_training(
    config: ExperimentConfig,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
    computation: Computation = PLAIN,
) -> TrainingState:
    """Make the state of training before its first iteration."""
    collector = make_collector(config, device, computation.simulation, initial.frames)
    networks = make_networks(config.networks, collector.environment)
    iterations = config.collection.num_iterations
    learner = Learner(config.learner, networks, iterations, initial.iteration, computation.update)
    learner.prepare(collector.environment.fake_tensordict(), config.collection.frames_per_batch)
    if start:
        restore_networks(start.checkpoint, networks)
        if start.kind == "extend":
            restore_optimiser(start.checkpoint, learner)
    try:
        collector.begin(networks.player)
        learner.wait()
    except BaseException:
        collector.close()
        raise
    if collector.note:
        _log.info(collector.note)
    return TrainingState(collector, learner, initial, str(start) if start else "", device, computation)


def snapshot(config: ExperimentConfig, training: TrainingState, history: HistoryFile) -> Checkpoint:
    """Copy the whole state of training into a checkpoint, which training no longer changes."""
    learner = training.learner
    return Checkpoint(
        config,
        training.progress.iteration,
        training.progress.frames,
        tensors=_copies(learner.networks.modules().state_dict()),
        optimiser=_copies(learner.optimiser_tensors()),
        state=training.collector.capture(),
        history=history.text,
        platform=Platform.current(training.device),
        selection_return=_finite_or_none(training.selection_return),
        highest_return=_finite_or_none(training.highest_return),
        started_from=training.started_from,
        computation=training.computation,
        earlier_rows=history.earlier,
        segments=history.segments,
    )


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def restore_optimiser(checkpoint: Checkpoint, learner: Learner) -> None:
    """Restore Adam's state.

    Raises:
        CheckpointError: it does not fit the networks.
    """
    try:
        learner.restore_optimiser(checkpoint.optimiser)
    except ValueError as error:
        raise CheckpointError(f"training cannot resume from the checkpoint: {error}") from error
