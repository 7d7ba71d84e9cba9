"""The state of training: made at the start, copied into checkpoints, and restored from a checkpoint."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from mappo.compute.computation import PLAIN, Computation, Machine, choose_computation, kept_computation
from mappo.compute.resources import cpu_limit
from mappo.config import ExperimentConfig, config_hash, differences
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import random_states, set_random_states
from mappo.errors import (
    CheckpointError,
    CompilationFailed,
    ConfigError,
    SimulationStateError,
    one_line,
)
from mappo.learning.learner import Learner
from mappo.learning.networks import VALUE, Networks, make_networks
from mappo.runs.checkpoint import Checkpoint, Platform, restore_networks
from mappo.runs.checkpoint_ref import CheckpointRef
from mappo.runs.run import Run
from mappo.training.collectors import Collector, make_collector
from mappo.training.history import HistoryFile, Progress, require_history

_log = logging.getLogger(__name__)
# Fields of the configuration that may change.
_FREE_IN_EXTENSION = ("collection.total_frames", "device", "evaluation.", "selection.", "threads")
_FREE_IN_RESUMPTION = ("evaluation.",)
_COMPARED_BY_COMPUTATION = ("collection.simulation", "learner.update")


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
    changed = _changed(checkpoint.config, config, _FREE_IN_EXTENSION)
    if changed:
        raise ConfigError(
            f"an extended run keeps its configuration, except for {', '.join(_FREE_IN_EXTENSION)}; changed: "
            f"{changed}; for a new run from these networks, use a warm start"
        )
    planned = checkpoint.config.collection.num_iterations
    if checkpoint.iteration < planned:
        raise ConfigError(
            f"the run to extend is not finished: the run has {checkpoint.iteration} of {planned} iterations; "
            "resume the run first, with the command that started it"
        )
    if config.collection.num_iterations <= checkpoint.iteration:
        raise ConfigError(
            f"collection.total_frames = {config.collection.total_frames}: the run to extend has "
            f"{checkpoint.frames} frames already; set a larger number"
        )
    return Progress(checkpoint.iteration, checkpoint.frames)


def begin_run(
    config: ExperimentConfig,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
    is_shared: bool = False,
) -> TrainingState:
    """Make the state of training of a run without checkpoints. It compiles what pays, if that is left to it.

    is_shared: whether other runs use what this run compiles, as in a study.

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
            _restore_optimiser(start.checkpoint, learner)
    try:
        collector.begin(networks.policy)
        learner.wait()
    except BaseException:
        collector.close()
        raise
    if collector.note:
        _log.info(collector.note)
    return TrainingState(collector, learner, initial, str(start) if start else "", device, computation)


def resume(
    config: ExperimentConfig,
    run: Run,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
    refs: Sequence[CheckpointRef],
) -> tuple[TrainingState, Checkpoint] | None:
    """Restore training from the newest checkpoint that can be used; return both, or None without checkpoints.

    refs: the checkpoints of the run, the newest first.

    Raises:
        CheckpointError: the run has checkpoints, and none can be used.
        ConfigError: the run started with another configuration, or from another starting point.
    """
    problems: list[tuple[CheckpointRef, str]] = []  # texts, since an exception keeps the failed training in memory
    differences_of_config: list[str] = []
    for ref in refs:
        try:
            checkpoint = run.load(ref)
            _require_same_run(run, checkpoint, config, start)
            _require_possible(ref, config, checkpoint, initial)
            training = _restored(config, checkpoint, initial, start, device)
        except CompilationFailed:
            raise
        except (CheckpointError, SimulationStateError, ConfigError) as error:
            problems.append((ref, one_line(error)))
            differences_of_config += [str(error)] if isinstance(error, ConfigError) else []
            continue
        _log_unusable(problems)
        return training, checkpoint
    if differences_of_config:  # more likely, the command is another one, and not the checkpoints
        raise ConfigError(differences_of_config[0])
    if problems:
        _log_unusable(problems)
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints of {run.store.location} can be used; to train from scratch, "
            f"name another run; problem of the newest: {problems[0][1]}"
        )
    return None


def _log_unusable(problems: list[tuple[CheckpointRef, str]]) -> None:
    for ref, problem in problems:
        _log.warning("%s cannot be used, trying the previous checkpoint: %s", ref, problem)


def _require_same_run(
    run: Run, checkpoint: Checkpoint, config: ExperimentConfig, start: StartingPoint | None
) -> None:
    location = run.store.location
    if changed := _changed(checkpoint.config, config, _FREE_IN_RESUMPTION):
        raise ConfigError(
            f"run {location} started with another configuration: {changed}; use that configuration, or name "
            "another run"
        )
    if checkpoint.started_from != (str(start) if start else ""):
        raise ConfigError(
            f"run {location} has the start {checkpoint.started_from or 'from scratch'!r}, but this command "
            f"has the start {str(start) if start else 'from scratch'!r}; name another run"
        )


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


def _changed(previous: ExperimentConfig, config: ExperimentConfig, free: tuple[str, ...]) -> str:
    changes, free = differences(previous, config).items(), (*free, *_COMPARED_BY_COMPUTATION)
    return ", ".join(f"{field} = {change}" for field, change in changes if not field.startswith(free))


def _restored(
    config: ExperimentConfig,
    checkpoint: Checkpoint,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
) -> TrainingState:
    """Make the state of training from a checkpoint, and restore the random states of this process."""
    computation = kept_computation(config, checkpoint.computation, Machine.current(device))
    training = begin_training(config, initial, None, device, computation)
    try:
        restore_networks(checkpoint, training.networks)
        if checkpoint.iteration > initial.iteration or (start and start.kind == "extend"):
            _restore_optimiser(checkpoint, training.learner)
        training.learner.iteration = checkpoint.iteration
        _require_finite_outputs(training)
        training.collector.restore(checkpoint.state)
    except BaseException:
        training.collector.close()
        raise
    training.progress = Progress(checkpoint.iteration, checkpoint.frames)
    training.started_from = checkpoint.started_from
    if checkpoint.highest_return is not None:
        training.highest_return = checkpoint.highest_return
    return training


@torch.no_grad()
def _require_finite_outputs(training: TrainingState) -> None:
    """Check the actions and values of restored networks, whose numbers may be finite and impossible together.

    Raises:
        CheckpointError: an output is not finite.
    """
    networks = training.networks
    try:
        outputs = networks.critic(networks.policy(training.collector.environment.fake_tensordict()))
        is_finite = all(bool(value.isfinite().all()) for value in (outputs[ACTION].double(), outputs[VALUE]))
    except (ValueError, RuntimeError):  # torch refuses a distribution whose parameters are not finite
        is_finite = False
    if not is_finite:
        raise CheckpointError("actions or values of the checkpoint's networks are not finite")


def _require_possible(
    ref: CheckpointRef, config: ExperimentConfig, checkpoint: Checkpoint, initial: Progress
) -> None:
    """Check what a checkpoint says of its progress, and its history.

    Raises:
        CheckpointError: its iteration, its frames, its returns or its history are not possible in this run.
    """
    iteration, planned = checkpoint.iteration, config.collection.num_iterations
    if iteration > planned or checkpoint.frames != iteration * config.collection.frames_per_batch:
        raise CheckpointError(
            f"{iteration} iterations of {planned} and {checkpoint.frames} frames are not possible with batches of "
            f"{config.collection.frames_per_batch} frames"
        )
    if iteration != ref.iteration:
        raise CheckpointError(f"its name says iteration {ref.iteration}, and its manifest iteration {iteration}")
    returns = checkpoint.selection_return, checkpoint.highest_return
    if returns[0] is not None and (returns[1] is None or returns[0] > returns[1]):
        raise CheckpointError(f"its return {returns[0]} is above the highest return, {returns[1]}")
    earlier = checkpoint.num_earlier_rows
    start = Progress(initial.iteration + earlier, initial.frames + earlier * config.collection.frames_per_batch)
    require_history(checkpoint.history, start, Progress(iteration, checkpoint.frames))


def match_platform(previous: Platform, device: torch.device) -> None:
    """Set the previous number of threads, if this machine has them, and log a warning of other differences.

    Each difference may change the rounding of numbers.
    """
    if previous.threads != torch.get_num_threads() and previous.threads <= cpu_limit():
        torch.set_num_threads(previous.threads)
    current = Platform.current(device)
    changes = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("device", previous.device, current.device),
            ("threads", previous.threads, current.threads),
            ("CPU", previous.cpu, current.cpu),
            *((name, previous.versions.get(name), version) for name, version in current.versions.items()),
        )
        if old != new
    ]
    if changes:
        _log.warning("resumed, but results will not be bit-identical: %s", ", ".join(changes))


def _restore_optimiser(checkpoint: Checkpoint, learner: Learner) -> None:
    try:
        learner.restore_optimiser(checkpoint.optimiser)
    except ValueError as error:
        raise CheckpointError(f"training cannot resume from the checkpoint: {error}") from error
