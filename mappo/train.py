"""The training loop: collect, learn, now and then evaluate, report, save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mappo import checkpoint as checkpoints
from mappo.checkpoint import Checkpoint, CheckpointError, restore_networks
from mappo.collection import collect, require_memory_for_batch
from mappo.config import ConfigError, ExperimentConfig, config_hash, differences
from mappo.environment import Stream, make_environment, private_random_streams, resolve_device
from mappo.evaluate import play_episodes
from mappo.history import IterationReport, Progress, finished_episodes
from mappo.learner import Learner
from mappo.networks import Networks, make_networks
from mappo.resources import peak_gpu_memory_bytes, peak_memory_bytes

_FREE_IN_EXTENSION = ("collection.total_frames", "device", "evaluation.", "selection.", "threads")


@dataclass(frozen=True)
class Start:
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


def train(
    config: ExperimentConfig,
    last: Path,
    best: Path,
    on_report: Callable[[IterationReport], object],
    start: Start | None = None,
) -> Checkpoint:
    """Train; save the best checkpoint into one directory as it comes, and at the end the last into the other.

    The best has the highest mean return in the evaluations that `config.selection` asks for; where it asks for
    none, it is the last, which is also returned. A run that does not start from scratch is evaluated at its start,
    too. Evaluations have a random stream of their own and do not change
    training. On CPU the same configuration gives the same parameters bit by bit, given torch's number of threads.

    Raises:
        CheckpointError: the checkpoint to start from does not fit this configuration.
        ConfigError: the configuration names a scenario or a device that is not there, asks for a batch that
            memory has no room for, or does not go on where the run to extend stopped.
        NonFiniteLoss: training diverged.
        NonFiniteReturn: an evaluation met a reward that is not finite.
    """
    device = resolve_device(config.device)
    progress = _progress(config, start)
    with private_random_streams(config.seed, Stream.TRAINING, device, progress.frames):
        require_memory_for_batch(config, device)
        environment = make_environment(
            config.environment, config.collection.num_envs, config.seed, Stream.TRAINING, device, progress.frames
        )
        networks = make_networks(config.networks, environment)
        learner = Learner(config.learner, networks, config.collection.num_iterations, progress.iteration)
        _restore(start, learner)
        highest = -math.inf
        if start and config.selection.interval_iterations:
            highest = _selection_return(config, networks)
            checkpoints.save(_checkpoint(config, progress, learner, highest, start), best)
        start_time = began = time.perf_counter()
        for batch in collect(environment, networks.policy, config.collection, progress.iteration):
            collected = time.perf_counter()
            losses = learner.update(batch)
            learned = time.perf_counter()
            progress = progress.after(batch)
            evaluated = _evaluation_return(config, networks, progress)
            if evaluated > highest:
                highest = evaluated
                checkpoints.save(_checkpoint(config, progress, learner, evaluated, start), best)
            ended = time.perf_counter()
            on_report(
                IterationReport(
                    progress,
                    elapsed_seconds=ended - start_time,
                    collect_seconds=collected - began,
                    learn_seconds=learned - collected,
                    evaluate_seconds=ended - learned,
                    frames_per_second=batch.numel() / (learned - began),
                    evaluation_return_mean=evaluated,
                    peak_memory_bytes=peak_memory_bytes(),
                    peak_gpu_memory_bytes=peak_gpu_memory_bytes(device),
                    episodes=finished_episodes(batch),
                    losses=losses,
                )
            )
            began = time.perf_counter()
    final = _checkpoint(config, progress, learner, evaluated, start)
    checkpoints.save(final, last)
    if highest == -math.inf:
        checkpoints.save(final, best)
    return final


def _progress(config: ExperimentConfig, start: Start | None) -> Progress:
    """That of the run to go on with, once it is certain that this configuration does go on with it."""
    if start is None or start.kind == "warm-start":
        return Progress()
    checkpoint = start.checkpoint
    changed = {
        field: change
        for field, change in differences(checkpoint.config, config).items()
        if not field.startswith(_FREE_IN_EXTENSION)
    }
    if changed:
        listed = ", ".join(f"{field} = {change}" for field, change in changed.items())
        raise ConfigError(
            f"an extended run keeps its configuration but for {', '.join(_FREE_IN_EXTENSION)}; changed: {listed}; "
            "for a new run from these networks, use a warm start"
        )
    if config.collection.num_iterations <= checkpoint.iteration:
        raise ConfigError(
            f"collection.total_frames = {config.collection.total_frames}: the run to extend has "
            f"{checkpoint.frames} frames already; ask for more"
        )
    return Progress(checkpoint.iteration, checkpoint.frames)


def _restore(start: Start | None, learner: Learner) -> None:
    if start is None:
        return
    restore_networks(start.checkpoint, learner.networks)
    if start.kind == "extend":
        try:
            learner.restore_optimiser(start.checkpoint.optimiser)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint cannot be extended: {error}") from error


def _evaluation_return(config: ExperimentConfig, networks: Networks, progress: Progress) -> float:
    """The mean return by which the best checkpoint is chosen; NaN when no evaluation is due."""
    interval = config.selection.interval_iterations
    is_last = progress.iteration == config.collection.num_iterations
    if not interval or (progress.iteration % interval and not is_last):
        return math.nan
    return _selection_return(config, networks)


def _selection_return(config: ExperimentConfig, networks: Networks) -> float:
    returns, _ = play_episodes(lambda _: networks.policy, config, config.selection, Stream.SELECTION)
    return math.fsum(returns) / len(returns)


def _checkpoint(
    config: ExperimentConfig, progress: Progress, learner: Learner, evaluated: float, start: Start | None
) -> Checkpoint:
    return Checkpoint(
        config,
        progress.iteration,
        progress.frames,
        tensors={name: tensor.cpu().clone() for name, tensor in learner.networks.modules().state_dict().items()},
        optimiser={name: tensor.cpu().clone() for name, tensor in learner.optimiser_tensors().items()},
        selection_return=None if math.isnan(evaluated) else evaluated,
        started_from=str(start) if start else "",
    )
