"""A worker of a study: claim one trial after the other, train with its values and report the policy's return."""

import errno
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mappo.config import EvaluationConfig, ExperimentConfig
from mappo.environment.random_streams import Stream
from mappo.errors import (
    DatabaseError,
    NonFiniteReturn,
    Pruned,
    StoreError,
    StudyUnreadable,
    Superseded,
    TrialLost,
    TrialOverdue,
)
from mappo.evaluation import statistics
from mappo.evaluation.constraints import Constraint
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.evaluation.measurements import Measurer, mean_of_all
from mappo.fast_simulation.making import kept_simulations
from mappo.runs.locations import joined
from mappo.runs.run import POLICY_PARTS, Run
from mappo.runs.saver import SaveResult
from mappo.strict_json import json_hash
from mappo.training.history import HistoryFile, IterationReport, TrainingStarted
from mappo.training.training import train
from mappo.tuning.claim import Claim
from mappo.tuning.search_space import applied
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig
from mappo.tuning.trial import TrialOutcome

_log = logging.getLogger(__name__)
# Errors of this machine: a full or broken disk, too many open files, no memory. The trial is not their cause.
_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class RunListeners:
    """The history file and the callbacks of one training."""

    history: HistoryFile
    on_begin: Callable[[TrainingStarted], object]
    on_report: Callable[[IterationReport], object]
    on_save: Callable[[SaveResult], object]


@dataclass(frozen=True)
class TrialListeners:
    """The callbacks of a worker.

    `run` is a context manager around each training; it takes the trial, the configuration and the run, and yields
    the listeners of that training. `on_end` is called after each trial with its outcome and the reason; the reason
    of a complete trial is its value.
    """

    run: Callable[[Claim, ExperimentConfig, Run], AbstractContextManager[RunListeners]]
    on_end: Callable[[Claim, TrialOutcome, str], object]


def work(study: Study, worker: str, listeners: TrialListeners) -> int:
    """Claim and finish trials until none is left for any worker. Return the number of trials that ended here.

    What one trial compiles, the later trials of this process and of others use again.

    If a training fails, its trial is failed. If the store, the database or this machine fails, or this process
    receives SIGINT or SIGTERM, the worker releases the trial for another worker and raises the error. A worker
    without a trial polls while other workers are busy, because one of them may lose its trial.

    Raises:
        DatabaseError: the database does not answer.
        StoreError: the store of runs fails.
    """
    with kept_simulations():
        return _work(study, worker, listeners)


def _work(study: Study, worker: str, listeners: TrialListeners) -> int:
    finished = 0
    while True:
        try:
            claim = study.claim(worker)
        except (KeyboardInterrupt, SystemExit):
            study.abandon(worker)
            raise
        if claim is None:
            if study.is_settled():
                return finished
            time.sleep(_POLL_SECONDS)
            continue
        try:
            with claim:
                outcome, reason = _finish(study, claim, listeners)
        except (TrialLost, TrialOverdue) as error:  # the limit may pass just when the trial has ended
            _log.warning("trial %d: %s", claim.number, error)
            continue
        listeners.on_end(claim, outcome, reason)
        finished += 1


def trial_label(number: int, values: Mapping[str, Any]) -> str:
    """Return a trial's name: its number and a hash of its values, so that a restored dump cannot mix runs up."""
    return f"{number:04d}-{json_hash(dict(values))[:8]}"


def trial_run(number: int, values: Mapping[str, Any], seed: int) -> str:
    """Return the path, below the study's store, of the run of a trial from one training seed."""
    return f"trial-{trial_label(number, values)}/seed-{seed}"


def fresh_seeds(study: Study, number: int) -> list[int]:
    """Return seeds for retraining the best configuration: the same in each call, and none of the trials' seeds."""
    used = set(study.plan.tuning.training_seeds)
    drawn = (int(json_hash({"study": study.name, "seed": index})[:7], 16) for index in range(number + len(used)))
    return [seed for seed in dict.fromkeys(drawn) if seed not in used][:number]


def _finish(study: Study, claim: Claim, listeners: TrialListeners) -> tuple[TrialOutcome, str]:
    """Train and end the trial, which fails if it takes too long. Return its outcome and the reason."""
    try:
        return _train_and_end(study, claim, listeners)
    except (TrialOverdue, Exception):
        if not claim.is_overdue:
            raise
        claim.finish("failed", reason=claim.overdue_reason)
        return "failed", claim.overdue_reason


def _train_and_end(study: Study, claim: Claim, listeners: TrialListeners) -> tuple[TrialOutcome, str]:
    try:
        value, measured = _value(study, claim, listeners)
        if not math.isfinite(value):
            raise NonFiniteReturn(f"the mean return is {value}")
        claim.finish("complete", value, measured=measured)
    except Pruned as error:
        claim.finish("pruned", reason=str(error))
        return "pruned", str(error)
    except TrialLost:
        raise
    except Superseded as error:
        raise TrialLost(str(error)) from error
    except TrialOverdue:
        raise
    except Exception as error:
        if claim.is_overdue:
            raise
        if _is_machine_fault(error):
            _release(claim, error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        claim.finish("failed", reason=reason)
        return "failed", reason
    except BaseException as error:
        _release(claim, error)
    return "complete", f"{value:.4g}{_broken(study.plan.tuning.constraints, measured)}"


def _broken(constraints: Mapping[str, Constraint], measured: Mapping[str, float | None]) -> str:
    """Return the constraints that a trial breaks as the end of a line, or an empty text."""
    broken = [
        f"{name} {'not measured in every episode' if mean is None else f'= {mean:.4g}'}, {constraints[name]}"
        for name, mean in measured.items()
        if mean is None or constraints[name].excess(mean) > 0
    ]
    return f", infeasible: {'; '.join(broken)}" if broken else ""


def _is_machine_fault(error: Exception) -> bool:
    """Return whether the store, the database or this machine failed, so that another worker may succeed."""
    if isinstance(error, DatabaseError | StoreError | StudyUnreadable):
        return True
    return isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS


def _release(claim: Claim, error: BaseException) -> NoReturn:
    """Release the trial and raise `error`. A failed release becomes a note of the error."""
    try:
        claim.release(is_patient=not isinstance(error, DatabaseError))
    except (DatabaseError, StudyUnreadable, TrialLost) as release_error:
        error.add_note(f"trial {claim.number} could not be released: {release_error}")
    raise error


def _value(study: Study, claim: Claim, listeners: TrialListeners) -> tuple[float, dict[str, float | None]]:
    """Train from each training seed, and judge the runs on tuning seeds.

    Return the mean over these runs of their mean returns, and of their measurements that have constraints.
    """
    plan, values, measured = study.plan, list[float](), list[dict[str, float | None]]()
    frames_per_seed = plan.config.collection.total_frames
    trial_config = applied(plan.config, claim.values)
    for index, seed in enumerate(plan.tuning.training_seeds):
        config = replace(trial_config, seed=seed)
        run = Run.at(joined(study.store, trial_run(claim.number, claim.values, seed)))
        total_frames = len(plan.tuning.training_seeds) * frames_per_seed
        judge = _make_judge(plan.tuning, claim, index * frames_per_seed, total_frames, values)
        with listeners.run(claim, config, run) as run_listeners:
            _train(config, run, run_listeners, judge)
        value, measured_in_run = _judged(config, plan.tuning, run)
        values.append(value)
        measured.append(measured_in_run)
        has_more_seeds = index + 1 < len(plan.tuning.training_seeds)
        if plan.tuning.pruner == "wilcoxon" and claim.report_seed(index, values[-1]) and has_more_seeds:
            raise Pruned(f"worse than the best over {index + 1} training seeds")
    return statistics.plain_mean(values).value, {
        name: mean_of_all([measured_in_run[name] for measured_in_run in measured])
        for name in plan.tuning.constraints
    }


def _train(
    config: ExperimentConfig, run: Run, listeners: RunListeners, judge: Callable[[IterationReport], None]
) -> None:
    def on_report(report: IterationReport) -> None:
        listeners.on_report(report)
        judge(report)

    train(
        *(config, run, listeners.history, on_report),
        on_begin=listeners.on_begin,
        on_save=listeners.on_save,
        is_shared=True,
    )


def _make_judge(
    tuning: TuningConfig, claim: Claim, frames_before: int, total_frames: int, values: list[float]
) -> Callable[[IterationReport], None]:
    """Make the callback that reports the trial's value after each evaluation during training, or prunes the trial.

    The value is the mean of the earlier seeds' `values` and of the current seed's evaluation. `frames_before`: the
    frames of the earlier seeds.
    """

    def judge(report: IterationReport) -> None:
        return_mean = report.evaluation_return_mean
        if claim.is_lost:
            raise TrialLost(f"trial {claim.number}: this worker sent no heartbeat in time")
        if not math.isfinite(return_mean) or tuning.pruner == "wilcoxon":
            return
        frames = frames_before + report.progress.frames
        is_last = frames >= total_frames  # pruning a finished training would save nothing
        if claim.report_frames(frames, (math.fsum(values) + return_mean) / (len(values) + 1)) and not is_last:
            raise Pruned(f"after {frames:,} frames, by {tuning.pruner}")

    return judge


def _judged(config: ExperimentConfig, tuning: TuningConfig, run: Run) -> tuple[float, dict[str, float | None]]:
    """Return the mean return of a run's best checkpoint on tuning seeds, and what has constraints, by name.

    Both are of the same episodes. With constraints, VMAS itself plays them: compiled frames have no `info()`.
    """
    best = run.load(run.choose("best"), POLICY_PARTS)
    episodes = EvaluationConfig(
        tuning.evaluation_seeds, tuning.episodes_per_seed, deterministic=config.evaluation.deterministic
    )
    measurer = Measurer() if tuning.constraints else None
    returns, _ = play_episodes(
        trained_policy(config, best),
        config,
        episodes,
        Stream.TUNING,
        measurer.measure_frame if measurer else None,
        "plain" if measurer else best.computation.selection,
    )
    measurements = measurer.measurements(statistics.plain_mean) if measurer else {}
    return math.fsum(returns) / len(returns), {
        name: measurements[name].mean_of_all if name in measurements else None for name in tuning.constraints
    }
