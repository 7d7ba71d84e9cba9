"""The training loop: collect, learn, evaluate when due, report, save. It starts a new run or resumes one."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing

import torch

from mappo.compute.resources import peak_gpu_memory_bytes, peak_memory_bytes, resolve_device
from mappo.config import ExperimentConfig
from mappo.environment.environment import require_memory_for_batch
from mappo.environment.measured_names import find_measurements
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import CheckpointError, ConfigError, Superseded, one_line
from mappo.evaluation import statistics
from mappo.evaluation.episodes import play_episodes
from mappo.evaluation.measurements import Measurer
from mappo.fast_simulation.making import kept_simulations
from mappo.learning.memory import remembering
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first
from mappo.runs.readability import require_readable
from mappo.runs.run import KEEP_CHECKPOINTS, Run
from mappo.runs.saver import Saver, SaveResult
from mappo.training.history import (
    HistoryFile,
    IterationReport,
    Progress,
    TrainingStarted,
    finished_episodes,
)
from mappo.training.resuming import resume, warn_of_differences
from mappo.training.training_state import (
    StartingPoint,
    TrainingState,
    begin_run,
    initial_progress,
    snapshot,
)

_log = logging.getLogger(__name__)
_SAVE_TIMEOUT_SECONDS = 300.0  # wait for the last checkpoints to be saved at the end of training
_MAX_LISTINGS = 5
_SAVE_TIMEOUT_AFTER_ERROR_SECONDS = 20.0  # wait if training ends early, by an error or a signal


def train(
    config: ExperimentConfig,
    run: Run,
    history: HistoryFile,
    on_report: Callable[[IterationReport], object],
    start: StartingPoint | None = None,
    *,
    on_begin: Callable[[TrainingStarted], object] = lambda _: None,
    on_save: Callable[[SaveResult], object] = lambda _: None,
    keep: int = KEEP_CHECKPOINTS,
    is_shared: bool = False,
) -> Checkpoint:
    """Train, save a checkpoint in the run after every iteration, and return the last checkpoint.

    A run that has checkpoints resumes from the newest one that can be used. On a CPU, the resumed run ends
    bit-identical to an uninterrupted run: parameters, optimiser, random states and the history (except its
    times). A finished run is not changed. Only the last `keep` checkpoints and the best one are kept.

    The best checkpoint has the highest mean return in the evaluations that `config.selection` schedules;
    without evaluations, the last checkpoint is the best. A run that starts from the networks of another run
    is evaluated at its start, too. Evaluations have their own random stream and do not change training.

    on_begin: called once, before the first iteration, with the progress of the run so far.
    on_report: called after each iteration of this process.
    on_save: called in another thread with the result of each save.
    is_shared: whether other runs use what this run compiles, as in a study or a matrix.

    Raises:
        CheckpointError: the run has checkpoints, and none can be used; or the checkpoint in `start` does not fit.
        ConfigError: the scenario or the device is not available, the batch does not fit in memory, the run started
            with another configuration, or the configuration does not continue the run to extend.
        NonFiniteLoss: training diverged.
        NonFiniteReturn: a reward in an evaluation is not finite.
        ProcessDied: a process that collects ended.
        NotSaved: the run ended, and its last or its best checkpoint could not be saved.
        StoreError: the run cannot be read or written.
        Superseded: another process started to train this run.
    """
    device = resolve_device(config.device)
    initial = initial_progress(config, start)
    with private_random_streams(config.seed, Stream.TRAINING, device, initial.frames), kept_simulations():
        require_memory_for_batch(config, device)
        # Resume before the claim, so that a process that cannot resume does not supersede another one.
        refs, resumed = _resume_newest(config, run, initial, start, device)
        if resumed and resumed[1].iteration >= config.collection.num_iterations:
            _restore_history(history, run, resumed[1])
            with closing(resumed[0].collector), closing(history):
                history.begin()
            return resumed[1]
        attempt = claim(run, keep)
        all_refs = newest_first([*refs, *run.refs()])  # a listing may not show what the one before showed
        if all_refs[:1] != refs[:1]:  # another process saved before the claim
            if resumed:
                resumed[0].collector.close()
            resumed = resume(config, run, initial, start, device, all_refs)
        if resumed:
            training = resumed[0]
            warn_of_differences(resumed[1].platform, device)
            _restore_history(history, run, resumed[1])
        else:
            training = begin_run(config, initial, start, device, is_shared)
            history.add_groups(training.networks.groups)
        history.measure(_measured_names(config))
        with closing(training.collector), closing(history):
            require_readable(snapshot(config, training, history))
            attempt.require_current()
            history.begin(lambda: attempt.owned_since)
            on_begin(TrainingStarted(training.progress, attempt.number, resumed is not None))
            saver = Saver(attempt, on_save)
            try:
                if start and not resumed and config.selection.interval_iterations:
                    training.selection_return, _ = _evaluate(config, training)
                    training.highest_return = training.selection_return
                    saver.save(snapshot(config, training, history))
                checkpoint = _iterate(config, training, history, saver, on_report)
            except BaseException:
                _save_pending(saver)
                raise
            saver.close(_SAVE_TIMEOUT_SECONDS)
            history.settle(attempt.is_current)
            return checkpoint


def _resume_newest(
    config: ExperimentConfig, run: Run, initial: Progress, start: StartingPoint | None, device: torch.device
) -> tuple[list[CheckpointRef], tuple[TrainingState, Checkpoint] | None]:
    """List the checkpoints and resume from the newest that can be used; return the references, too.

    Another process that still trains the run may delete the checkpoints between the listing and the reading. List
    them again then.
    """
    for _ in range(_MAX_LISTINGS):
        refs = run.refs()
        try:
            return refs, resume(config, run, initial, start, device, refs)
        except CheckpointError:
            if run.refs()[:1] == refs[:1]:
                raise
    raise CheckpointError(f"{run.store.location}: another process trains this run; wait for it, or stop it")


def _restore_history(history: HistoryFile, run: Run, checkpoint: Checkpoint) -> None:
    earlier = checkpoint.earlier_rows
    history.restore(checkpoint.history, earlier, lambda: run.earlier_rows(earlier))


def _iterate(
    config: ExperimentConfig,
    training: TrainingState,
    history: HistoryFile,
    saver: Saver,
    on_report: Callable[[IterationReport], object],
) -> Checkpoint:
    device = training.device
    previous_elapsed, start_time = history.elapsed_seconds, time.perf_counter()
    save_seconds = 0.0
    while training.progress.iteration < config.collection.num_iterations:
        iteration_start = time.perf_counter()
        batch = training.collector.collect(training.networks.player)
        collect_end = time.perf_counter()
        losses = training.learner.update(batch)
        learn_end = time.perf_counter()
        training.progress = training.progress.after(batch)
        training.selection_return, measurements = _evaluate_if_due(config, training)
        training.highest_return = max(training.highest_return, training.selection_return)
        evaluate_end = time.perf_counter()
        report = IterationReport(
            training.progress,
            elapsed_seconds=previous_elapsed + evaluate_end - start_time,
            collect_seconds=collect_end - iteration_start,
            learn_seconds=learn_end - collect_end,
            evaluate_seconds=evaluate_end - learn_end,
            save_seconds=save_seconds,
            frames_per_second=batch.numel() / (save_seconds + evaluate_end - iteration_start),
            evaluation_return_mean=training.selection_return,
            peak_memory_bytes=peak_memory_bytes(),
            peak_gpu_memory_bytes=peak_gpu_memory_bytes(device),
            saves=saver.counts,
            episodes=finished_episodes(batch, training.networks.groups),
            losses=losses,
            measurements=measurements,
        )
        del batch  # frees memory; otherwise two batches exist while the next one is collected
        history.append(report)
        on_report(report)
        save_start = time.perf_counter()
        checkpoint = snapshot(config, training, history)
        saver.save(checkpoint)
        save_seconds = time.perf_counter() - save_start
    return checkpoint


def _evaluate_if_due(config: ExperimentConfig, training: TrainingState) -> tuple[float, dict[str, float]]:
    """Return the results of `_evaluate`, or NaN and no measurement if no evaluation is due."""
    interval, iteration = config.selection.interval_iterations, training.progress.iteration
    is_last = iteration == config.collection.num_iterations
    if not interval or (iteration % interval and not is_last):
        return math.nan, {}
    return _evaluate(config, training)


def _evaluate(config: ExperimentConfig, training: TrainingState) -> tuple[float, dict[str, float]]:
    """Return the mean return that selects the best checkpoint, and the means of the measurements by name.

    Frames of a compiled simulation have no `info()`, so its episodes have no measurements.
    """
    policy, simulation, measurer = training.networks.policy, training.computation.selection, Measurer()
    returns, _ = play_episodes(
        lambda _: remembering(policy),
        config,
        config.selection,
        Stream.SELECTION,
        measurer.measure_frame,
        simulation,
    )
    measurements = measurer.measurements(statistics.plain_mean)
    means = {name: measured.mean.value for name, measured in measurements.items() if measured.mean}
    return math.fsum(returns) / len(returns), means


def _measured_names(config: ExperimentConfig) -> list[str]:
    """Return the names of what evaluations during training may measure; none without evaluations."""
    if not config.selection.interval_iterations:
        return []
    try:
        return list(find_measurements(config.environment))
    except ConfigError as error:  # training may go on without columns for measurements
        _log.warning("the history has no measurements: %s", one_line(error))
        return []


def _save_pending(saver: Saver) -> None:
    """Save the pending checkpoints after training ended early; log a warning if a checkpoint cannot be saved."""
    try:
        saver.close(_SAVE_TIMEOUT_AFTER_ERROR_SECONDS)
    except Superseded:  # the other process saves its own checkpoints
        pass
    except Exception as error:
        _log.warning("the newest checkpoints are not saved: %s", error)
