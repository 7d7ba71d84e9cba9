"""Trials of a study, one after the other: train with the values of each, and say how good the policy became."""

import errno
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
from mappo.errors import DatabaseError, NonFiniteReturn, Pruned, StoreError, Superseded, TrialLost
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.runs.locations import joined
from mappo.runs.run import Run
from mappo.runs.saver import SaveResult
from mappo.strict_json import json_hash
from mappo.training.history import HistoryFile, IterationReport, TrainingStarted
from mappo.training.training import train
from mappo.tuning.claim import Claim
from mappo.tuning.search_space import TuningConfig, applied
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialOutcome

_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class RunListeners:
    """What hears of the training of one run."""

    history: HistoryFile
    on_begin: Callable[[TrainingStarted], object]
    on_report: Callable[[IterationReport], object]
    on_save: Callable[[SaveResult], object]


@dataclass(frozen=True)
class TrialListeners:
    """What hears of a worker's trials.

    run is given the trial, the configuration and the place of each run, for whose time it is entered; it yields
    the history to write and what hears of the beginning and of iterations. ended hears how each trial ended, and
    why; for a completed one that is its value.
    """

    run: Callable[[Claim, ExperimentConfig, Run], AbstractContextManager[RunListeners]]
    ended: Callable[[Claim, TrialOutcome, str], object]


def work(study: Study, worker: str, training: TrialListeners) -> int:
    """Claim trials and finish them until none is left, here or with other workers; how many that were.

    A trial whose training fails is a failed trial. Where the store, the database or the machine fails, or this
    process is asked to end, the trial is released, for another worker to go on with, and the error raised. A
    worker that finds nothing to do stays while others are busy, in case one falls silent.

    Raises:
        DatabaseError: the database does not answer.
        StoreError: the store of runs fails.
    """
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
                outcome, reason = _finish(study, claim, training)
        except TrialLost:
            continue
        training.ended(claim, outcome, reason)
        finished += 1


def trial_label(number: int, values: Mapping[str, Any]) -> str:
    """What runs of a trial are known by: its number, and its values, should its database come from a dump."""
    return f"{number:04d}-{json_hash(dict(values))[:8]}"


def trial_run(number: int, values: Mapping[str, Any], seed: int) -> str:
    """Where the run of a trial from one training seed is, below the study's place."""
    return f"trial-{trial_label(number, values)}/seed-{seed}"


def fresh_seeds(study: Study, number: int) -> list[int]:
    """Seeds to train the best configuration from again: always the same, and none of those of trials."""
    used = set(study.plan.tuning.training_seeds)
    drawn = (int(json_hash({"study": study.name, "seed": index})[:7], 16) for index in range(number + len(used)))
    return [seed for seed in dict.fromkeys(drawn) if seed not in used][:number]


def _finish(study: Study, claim: Claim, training: TrialListeners) -> tuple[TrialOutcome, str]:
    """Train and end the trial; how it ended, and why."""
    try:
        value = _value(study, claim, training)
        if not math.isfinite(value):
            raise NonFiniteReturn(f"the mean return is {value}")
        claim.finish("complete", value)
    except Pruned as error:
        claim.finish("pruned", reason=str(error))
        return "pruned", str(error)
    except TrialLost:
        raise
    except Superseded as error:
        raise TrialLost(str(error)) from error
    except Exception as error:
        if _is_of_the_machine(error):
            _release(claim, error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        claim.finish("failed", reason=reason)
        return "failed", reason
    except BaseException as error:
        _release(claim, error)
    return "complete", f"{value:.4g}"


def _is_of_the_machine(error: Exception) -> bool:
    """Whether the store, the database or this machine failed, which another worker may not meet."""
    if isinstance(error, DatabaseError | StoreError):
        return True
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def _release(claim: Claim, error: BaseException) -> NoReturn:
    """Give the trial back, as well as can be, and raise what happened."""
    try:
        claim.release()
    except (DatabaseError, TrialLost) as unreleased:
        error.add_note(f"trial {claim.number} could not be released: {unreleased}")
    raise error


def _value(study: Study, claim: Claim, training: TrialListeners) -> float:
    """The mean return on tuning seeds, over training seeds."""
    plan, values = study.plan, list[float]()
    total = plan.config.collection.total_frames
    config = applied(plan.config, claim.values)
    for index, seed in enumerate(plan.tuning.training_seeds):
        of_seed = replace(config, seed=seed)
        place = Run.at(joined(study.place, trial_run(claim.number, claim.values, seed)))
        judge = _during(plan.tuning, claim, index * total, len(plan.tuning.training_seeds) * total, values)
        with training.run(claim, of_seed, place) as listening:
            _train(of_seed, place, listening, judge)
        values.append(_tuning_return(of_seed, plan.tuning, place))
        may_go_on = index + 1 < len(plan.tuning.training_seeds)
        if plan.tuning.pruner == "wilcoxon" and claim.report(index, values[-1]) and may_go_on:
            raise Pruned(f"worse than the best over {index + 1} training seeds")
    return math.fsum(values) / len(values)


def _train(
    config: ExperimentConfig, place: Run, listening: RunListeners, judge: Callable[[IterationReport], None]
) -> None:
    def hear(report: IterationReport) -> None:
        listening.on_report(report)
        judge(report)

    train(config, place, listening.history, hear, on_begin=listening.on_begin, on_save=listening.on_save)


def _during(
    tuning: TuningConfig, claim: Claim, frames_before: int, total_frames: int, values: list[float]
) -> Callable[[IterationReport], None]:
    """What judges a trial while it trains: by the mean of earlier seeds' values and of this one's evaluation."""

    def judge(report: IterationReport) -> None:
        evaluated = report.evaluation_return_mean
        if claim.is_lost:
            raise TrialLost(f"trial {claim.number}: this worker could not say in time that it is alive")
        if math.isnan(evaluated) or tuning.pruner == "wilcoxon":
            return
        frames = frames_before + report.progress.frames
        is_last = frames >= total_frames  # nothing is spared any more
        if claim.report(frames, (math.fsum(values) + evaluated) / (len(values) + 1)) and not is_last:
            raise Pruned(f"after {frames:,} frames, by {tuning.pruner}")

    return judge


def _tuning_return(config: ExperimentConfig, tuning: TuningConfig, place: Run) -> float:
    """The mean return of a run's best checkpoint on tuning seeds."""
    best = place.load(place.choose("best"))
    episodes = EvaluationConfig(
        tuning.evaluation_seeds, tuning.episodes_per_seed, deterministic=config.evaluation.deterministic
    )
    returns, _ = play_episodes(trained_policy(config, best), config, episodes, Stream.TUNING)
    return math.fsum(returns) / len(returns)
