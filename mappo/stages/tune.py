"""The stage that works on a study's trials."""

import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mappo.config import ExperimentConfig, to_json
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.tracking import TrackedRun, tracked_run
from mappo.reporting.progress import training_progress
from mappo.reporting.tables import trial_end, trial_start
from mappo.reporting.terminal import say
from mappo.runs.run import Run
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult, fan_out, metadata_of, watched_stage
from mappo.training.history import HistoryFile
from mappo.tuning import worker
from mappo.tuning.claim import Claim
from mappo.tuning.database import open_database
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialOutcome


def work_on_study(name: str, scenario: str = "", *, compiled_by: str = "", gpu_count: str = "0") -> StageResult:
    """Work on a study's trials until none is left, beside any number of other workers.

    `scenario` is the scenario that the user names. A study of another one whose scenario is not VMAS's is refused.

    Raises:
        StageFailed: the store or the database failed; another worker can continue the trial.
    """
    with readable_errors("tune"), open_database() as database:
        study = Study.load(database, name)
        study.require_named(scenario)
    config = to_json(study.plan.config)
    worker_name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    with (
        watched_stage("tune", config, compiled_by, label=worker_name, study=name, gpu_count=gpu_count) as (
            _,
            monitor,
        ),
        open_database() as database,
        TemporaryDirectory() as directory,
    ):
        study = Study.load(database, name)
        study.require_named(scenario)
        listeners = _StudyListeners(study, monitor, Path(directory))
        finished = worker.work(study, worker_name, worker.TrialListeners(listeners.run, listeners.ended))
        waiting = sum(trial.state == "waiting" for trial in study.trials())
        reason = f"the deadline has passed, {waiting} trials wait" if waiting else "no trial is left to start"
        say("tune", f"{reason}; {finished} trials ended here")
        return StageResult(metadata_of(study.plan.config), _study_metrics(study))


@dataclass(frozen=True)
class _TrialRun:
    trial: int
    config: ExperimentConfig
    location: str
    tracked: TrackedRun


class _StudyListeners:
    """The listeners of a worker's trials: the terminal, Prometheus and MLflow."""

    def __init__(self, study: Study, monitor: Monitor, directory: Path):
        self._study, self._monitor, self._directory = study, monitor, directory
        self._printed: int | None = None  # the trial whose start was printed last
        self._last_run: _TrialRun | None = None
        self._report_study()

    @contextmanager
    def run(self, claim: Claim, config: ExperimentConfig, run: Run) -> Iterator[worker.RunListeners]:
        """Report a run while a trial trains it."""
        if self._printed != claim.number:
            self._printed = claim.number
            say("tune", trial_start(claim.number, claim.values, self._study.num_trials))
        self._monitor.begin_run(f"{self._study.name}-{claim.number:04d}-{config.seed}")
        self._monitor.planned(config)
        self._report_study()
        with (
            training_progress(config.collection) as progress,
            self._tracked(claim.number, config, run.store.location) as tracked,
        ):
            self._last_run = _TrialRun(claim.number, config, run.store.location, tracked)
            yield worker.RunListeners(
                HistoryFile(self._directory / f"{run.store.location.replace('/', '-')[-100:]}.csv"),
                fan_out(self._monitor.began, progress.begin, tracked.began),
                fan_out(self._monitor.iterated, progress.show, tracked.iterated),
                self._monitor.saved,
            )

    def ended(self, claim: Claim, outcome: TrialOutcome, reason: str) -> None:
        """Report the end of a trial."""
        self._monitor.end_run("failed" if outcome == "failed" else "finished")
        self._report_study()
        self._track_value(claim.number)
        say("tune", trial_end(claim.number, outcome, reason, self._study.best()))

    def _tracked(
        self, number: int, config: ExperimentConfig, location: str, run: str = ""
    ) -> AbstractContextManager[TrackedRun]:
        """Track a trial's run as an MLflow run: a new one, or `run`."""
        name, tags = self._study.name, {"mappo.study": self._study.name, "mappo.trial": str(number)}
        label = f"{name}-{number:04d}-{config.seed}"
        return tracked_run(config, label, location, run=run, tags=tags, is_nested=True)

    def _track_value(self, number: int) -> None:
        """Add the value of a complete trial to the MLflow run of its last training."""
        last, value = self._last_run, self._study.trials()[number].value
        if last and last.trial == number and last.tracked.run_id and value is not None:
            with self._tracked(number, last.config, last.location, last.tracked.run_id) as tracked:
                tracked.measured(last.config.collection.total_frames, {"trial/value": value})

    def _report_study(self) -> None:
        """Report the numbers of the whole study to Prometheus."""
        trials, best = self._study.trials(), self._study.best()
        losses = sum(attempt.outcome == "lost" for trial in trials for attempt in trial.attempts)
        value = best.value if best else None
        self._monitor.studied(Counter(trial.state for trial in trials), self._study.num_trials, losses, value)


def _study_metrics(study: Study) -> dict[str, float]:
    trials, best = study.trials(), study.best()
    numbers = {f"num_{state}_trials": 0.0 for state in ("complete", "pruned", "failed")}
    for trial in trials:
        if f"num_{trial.state}_trials" in numbers:
            numbers[f"num_{trial.state}_trials"] += 1
    if study.plan.tuning.constraints:
        numbers["num_feasible_trials"] = float(sum(trial.is_feasible for trial in trials))
    if best and best.value is not None:
        numbers["best_value"] = best.value
    return numbers
