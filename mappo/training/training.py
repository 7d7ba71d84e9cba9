"""The training loop: collect, learn, now and then evaluate, report, save. It starts anew or goes on."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing

from mappo.compute.resources import peak_gpu_memory_bytes, peak_memory_bytes, resolve_device
from mappo.config import ExperimentConfig
from mappo.environment.environment import require_memory_for_batch
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import Superseded
from mappo.evaluation.episodes import play_episodes
from mappo.learning.networks import Networks
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import KEEP_CHECKPOINTS, Run
from mappo.runs.saver import Saver, SaveResult
from mappo.training.history import HistoryFile, IterationReport, TrainingStarted, finished_episodes
from mappo.training.training_state import (
    StartingPoint,
    TrainingState,
    begin_training,
    first_progress,
    match_platform,
    resume,
    snapshot,
)

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 300.0  # for what is still to be saved at the end
_PATIENCE_IF_CUT_SHORT_SECONDS = 20.0


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
) -> Checkpoint:
    """Train, saving a checkpoint into the run after every iteration; return the last.

    A run that has checkpoints is gone on with, exactly where the newest good one stopped: on CPU the parameters,
    the optimiser, random states and the history (but for its times) end as if it had never stopped, bit by bit.
    One that is finished is left as it is. `on_begin` hears how far it had come; `on_report` the iterations done
    here; `on_save`, in another thread, what became of each checkpoint. All but the last `keep` checkpoints and the
    best are deleted as it goes.

    The best checkpoint has the highest mean return in the evaluations that `config.selection` asks for; where it
    asks for none, it is the last. A run that starts from another's networks is evaluated at its start, too.
    Evaluations have a random stream of their own and do not change training.

    Raises:
        CheckpointError: the run has checkpoints, and none can be used; or that to start from does not fit.
        ConfigError: the configuration names a scenario or a device that is not there, asks for a batch that
            memory has no room for, is not that of the run so far, or does not go on where the run to extend
            stopped.
        NonFiniteLoss: training diverged.
        NonFiniteReturn: an evaluation met a reward that is not finite.
        ProcessDied: a process that collects ended.
        NotSaved: the run ended, and its last checkpoint or its best could not be saved.
        StoreError: the run cannot be read, or not be written to.
        Superseded: another process began to train this run.
    """
    device = resolve_device(config.device)
    first = first_progress(config, start)
    with private_random_streams(config.seed, Stream.TRAINING, device, first.frames):
        require_memory_for_batch(config, device)
        newest = run.saved()[:1]
        resumed = resume(config, run, first, start)  # before the claim: what cannot go on stops no other process
        if resumed and resumed[1].iteration >= config.collection.num_iterations:
            history.restore(resumed[1].history)
            return resumed[1]
        attempt = claim(run, keep)
        if run.saved()[:1] != newest:
            resumed = resume(config, run, first, start)  # another process saved in the meantime
        if resumed:
            training = resumed[0]
            match_platform(resumed[1].platform, device)
            history.restore(resumed[1].history)
        else:
            training = begin_training(config, first, start, device)
        with closing(training.collector):
            on_begin(TrainingStarted(training.progress, attempt.number, resumed is not None))
            saver = Saver(attempt, on_save)
            try:
                if start and not resumed and config.selection.interval_iterations:
                    training.selection_return = _selection_return(config, training.networks)
                    training.highest_return = training.selection_return
                    saver.save(snapshot(config, training, history.text))
                checkpoint = _iterate(config, training, history, saver, on_report)
            except BaseException:
                _save_what_is_waiting(saver)
                raise
            saver.close(_PATIENCE_SECONDS)
            return checkpoint


def _iterate(
    config: ExperimentConfig,
    training: TrainingState,
    history: HistoryFile,
    saver: Saver,
    on_report: Callable[[IterationReport], object],
) -> Checkpoint:
    device = resolve_device(config.device)
    elapsed_before, start_time = history.elapsed_seconds, time.perf_counter()
    saving_seconds = 0.0
    while training.progress.iteration < config.collection.num_iterations:
        began = time.perf_counter()
        batch = training.collector.collect(training.networks.policy)
        collected = time.perf_counter()
        losses = training.learner.update(batch)
        learned = time.perf_counter()
        training.progress = training.progress.after(batch)
        training.selection_return = _evaluation_return(config, training)
        training.highest_return = max(training.highest_return, training.selection_return)
        ended = time.perf_counter()
        report = IterationReport(
            training.progress,
            elapsed_seconds=elapsed_before + ended - start_time,
            collect_seconds=collected - began,
            learn_seconds=learned - collected,
            evaluate_seconds=ended - learned,
            save_seconds=saving_seconds,
            frames_per_second=batch.numel() / (learned - began),
            evaluation_return_mean=training.selection_return,
            peak_memory_bytes=peak_memory_bytes(),
            peak_gpu_memory_bytes=peak_gpu_memory_bytes(device),
            saves=saver.counts,
            episodes=finished_episodes(batch),
            losses=losses,
        )
        del batch  # or there are two of them while the next is collected
        history.append(report)
        on_report(report)
        reported = time.perf_counter()
        checkpoint = snapshot(config, training, history.text)
        saver.save(checkpoint)
        saving_seconds = time.perf_counter() - reported
    return checkpoint


def _evaluation_return(config: ExperimentConfig, training: TrainingState) -> float:
    """The mean return by which the best checkpoint is chosen; NaN when no evaluation is due."""
    interval, iteration = config.selection.interval_iterations, training.progress.iteration
    is_last = iteration == config.collection.num_iterations
    if not interval or (iteration % interval and not is_last):
        return math.nan
    return _selection_return(config, training.networks)


def _selection_return(config: ExperimentConfig, networks: Networks) -> float:
    returns, _ = play_episodes(lambda _: networks.policy, config, config.selection, Stream.SELECTION)
    return math.fsum(returns) / len(returns)


def _save_what_is_waiting(saver: Saver) -> None:
    """When training ends early: what is not saved by then is lost, but not what was before it."""
    try:
        saver.close(_PATIENCE_IF_CUT_SHORT_SECONDS)
    except Superseded:  # then another process saves
        pass
    except Exception as error:
        _log.warning("the newest checkpoints are not saved: %s", error)
