"""The return to training from a checkpoint: only one that can continue bit by bit is used."""

import logging
from collections.abc import Sequence

import torch

from mappo.compute.computation_choice import Machine, kept_computation
from mappo.compute.resources import cpu_limit
from mappo.config import ExperimentConfig
from mappo.environment.keys import ACTION
from mappo.errors import CheckpointError, CompilationFailed, ConfigError, SimulationStateError, one_line
from mappo.learning.memory import first_memory
from mappo.learning.networks import VALUE
from mappo.runs.checkpoint import Checkpoint, Platform, restore_networks
from mappo.runs.checkpoint_ref import CheckpointRef
from mappo.runs.run import Run
from mappo.training.continuation import require_same_config
from mappo.training.history import Progress, require_history
from mappo.training.training_state import (
    StartingPoint,
    TrainingState,
    begin_training,
    restore_optimiser,
)

_log = logging.getLogger(__name__)


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
    require_same_config(location, checkpoint.config, config)
    if checkpoint.started_from != (str(start) if start else ""):
        raise ConfigError(
            f"run {location} has the start {checkpoint.started_from or 'from scratch'!r}, but this command "
            f"has the start {str(start) if start else 'from scratch'!r}; name another run"
        )


def _restored(
    config: ExperimentConfig,
    checkpoint: Checkpoint,
    initial: Progress,
    start: StartingPoint | None,
    device: torch.device,
) -> TrainingState:
    """Make the state of training from a checkpoint, and restore the random states of this process."""
    if checkpoint.platform.threads <= cpu_limit():  # before anything is compiled for this number
        torch.set_num_threads(checkpoint.platform.threads)
    computation = kept_computation(config, checkpoint.computation, Machine.current(device))
    training = begin_training(config, initial, None, device, computation)
    try:
        restore_networks(checkpoint, training.networks)
        if checkpoint.iteration > initial.iteration or (start and start.kind == "extend"):
            restore_optimiser(checkpoint, training.learner)
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
    networks, frame = training.networks, training.collector.environment.fake_tensordict()
    for key, memory in first_memory(networks.player, len(frame)).items():
        frame[key] = memory
    try:
        outputs = networks.critic(networks.policy(frame))
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


def warn_of_differences(previous: Platform, device: torch.device) -> None:
    """Log a warning of differences to the machine of a checkpoint; each may change the rounding of numbers."""
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
