"""What the stages of tuning do: prepare a study, work on it, choose, report; and all of it on this machine."""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mappo import stages, study_page, tune
from mappo.config import (
    ConfigError,
    ExperimentConfig,
    Gate,
    checked,
    parse_json_object,
    to_dict,
    to_json,
)
from mappo.console import best_lines, say, training_progress, trial_end, trial_start, trial_table
from mappo.database import FILE, URL_VARIABLE, Database, database_url
from mappo.history import HistoryFile
from mappo.monitor import Monitor
from mappo.names import study_name
from mappo.runs import Run
from mappo.space import TuningConfig, applied, contains, extended_space
from mappo.stages import Outcome, StageFailed, readable_errors, watched_stage
from mappo.storage import joined
from mappo.study import TERMINAL, Claim, Plan, Study, TrialRecord, delete_study, editions, study_names
from mappo.study import Outcome as TrialOutcome

RUNS = Path("runs")  # where the file with studies is, on a machine without a database


@dataclass(frozen=True)
class Budget:
    """How much is tried: trials that a session asks for, and hours after which none is started; 0 for no limit."""

    num_trials: int = 20
    hours: float = 0.0

    def __post_init__(self) -> None:
        """Something must be tried."""
        if self.num_trials < 1:
            raise ConfigError(f"trials = {self.num_trials}: must be 1 or more")
        if not 0 <= self.hours < 10_000:
            raise ConfigError(f"hours = {self.hours}: must be 0 or more")


def prepare(
    config: str,
    series: str,
    store: str,
    budget: Budget,
    *,
    edition: str = "",
    session: str = TERMINAL,
    space: str = "{}",
    tuning: Mapping[str, Any] | None = None,
    compiled_by: str = "",
) -> Outcome:
    """Make a study or go on with it. An edition of a series begins with the best values of the edition before.

    `space` is JSON that changes the default space, `tuning` fields of `TuningConfig`; `store` is where the runs of
    trials are kept; `session` is who asks for the budget's trials.

    Raises:
        StageFailed: the study cannot be, or the database does not answer.
    """
    name = study_name(series, edition)
    with (
        watched_stage("prepare", config, compiled_by, label=name) as (experiment, _),
        _database(is_new=True) as database,
    ):
        ranges = extended_space(parse_json_object(space), experiment)
        plan = Plan(experiment, ranges, checked(TuningConfig, tuning or {}))
        study = Study.prepare(
            *(database, name, plan, budget.num_trials),
            store=str(Path(store).absolute()) if os.environ.get(URL_VARIABLE) and "://" not in store else store,
            series=series,
            session=session,
            timeout_seconds=3600 * budget.hours,
            warm_start=_best_before(database, series, name, plan) if edition else None,
        )
        done = sum(trial.state not in ("waiting", "running") for trial in study.trials())
        say("prepare", f"study {name} in {database.place}: {study.num_trials} trials, {done} done")
        say("prepare", f"tunes {', '.join(plan.space)}; pruner: {plan.tuning.pruner}; runs in {study.place}")
        if plan.tuning.pruner not in ("wilcoxon", "none") and not experiment.selection.interval_iterations:
            say(
                "prepare",
                "warning: selection.interval_iterations = 0: nothing is judged before it ends, nor pruned",
            )
        if budget.hours:
            say("prepare", f"no trial is started after {budget.hours:g} hours")
        return Outcome(stages.metadata_of(experiment))


def work(name: str, *, compiled_by: str = "", gpu_count: str = "0") -> Outcome:
    """Work on a study's trials until none is left, beside any number of other workers.

    Raises:
        StageFailed: the store or the database failed; what was begun is left for others.
    """
    with _database() as database, readable_errors("tune"):
        study = Study.load(database, name)
    config = to_json(study.plan.config)
    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    with (
        _database() as database,
        watched_stage("tune", config, compiled_by, label=worker, study=name, gpu_count=gpu_count) as (_, monitor),
        TemporaryDirectory() as directory,
    ):
        study = Study.load(database, name)
        watching = _Watching(study, monitor, Path(directory))
        finished = tune.work(study, worker, tune.Training(watching.run, watching.ended))
        left = sum(trial.state == "waiting" for trial in study.trials())
        why = f"the time is over, {left} trials wait" if left else "nothing left to start"
        say("tune", f"{why}; {finished} trials ended here")
        return Outcome(stages.metadata_of(study.plan.config), _numbers(study))


@dataclass(frozen=True)
class Chosen:
    """What is trained again after a study: its best configuration and the one it began with, from fresh seeds."""

    best: ExperimentConfig
    default: ExperimentConfig
    seeds: list[int]
    trial: TrialRecord
    place: str

    @property
    def best_runs(self) -> str:
        """What the runs of the best are called, before their seeds; another best has other runs."""
        return f"best-{tune.trial_label(self.trial.number, self.trial.values)}"


def choose(name: str, num_seeds: int, *, output: Path | None = None) -> Chosen:
    """The best configuration of a study, and seeds that no trial was trained from; write the former as JSON.

    Raises:
        StageFailed: no trial was completed.
    """
    with readable_errors("choose"), _database() as database:
        chosen = _chosen(Study.load(database, name), num_seeds)
        for line in best_lines(chosen.trial, chosen.default):
            say("choose", line)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(to_dict(chosen.best), indent=2) + "\n")
        return chosen


def _chosen(study: Study, num_seeds: int, trial: int | None = None) -> Chosen:
    """What is trained again; a trial that was chosen before stays it, whatever has ended since."""
    best = study.best() if trial is None else study.trials()[trial]
    if best is None:
        reasons = {trial.reason for trial in study.trials() if trial.reason}
        raise ConfigError(f"study {study.name}: no trial was completed{': ' * bool(reasons)}{'; '.join(reasons)}")
    config = study.plan.config
    return Chosen(applied(config, best.values), config, tune.fresh_seeds(study, num_seeds), best, study.place)


@dataclass(frozen=True)
class Finish:
    """What becomes of a study on this machine once its trials are done.

    num_seeds: how often the best configuration and the default are trained again; champions: where the best is to
    be promoted, if the gate says so; empty for nowhere.
    """

    num_seeds: int = 3
    champions: str = ""
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        """One training alone has no interval."""
        if self.num_seeds < 2:
            raise ConfigError(f"retraining seeds = {self.num_seeds}: at least 2, or there is no interval")


def tune_here(name: str, num_workers: int, finish: Finish) -> None:
    """Work on a study with some processes, then train its best again, judge it, and write what was found.

    Files go to the study's place, or, if that is in a bucket, to one of that name below runs/. Doing it again
    goes on where it stopped.

    Raises:
        StageFailed: a stage failed.
    """
    with readable_errors("tune"), _database() as database:
        place = Study.load(database, name).place
    directory = RUNS / PurePosixPath(place).name if "://" in place else Path(place)
    with _workers(name, num_workers - 1, directory):
        work(name)
    chosen = choose(name, finish.num_seeds, output=directory / "best.json")
    evaluations = _retrained(chosen, directory)
    trial = chosen.trial.number
    promote_best(name, trial, finish, directory / "decision.json")
    report(
        name,
        trial,
        evaluations,
        directory / "decision.json",
        directory / "comparison.json",
        directory / "study.html",
    )
    say("report", f"{directory}/: study.html, best.json, comparison.json, decision.json")


def read_gate(values: Mapping[str, Any]) -> Gate:
    """What a candidate must show, from JSON.

    Raises:
        ConfigError: a value that is not allowed.
    """
    return checked(Gate, values)


def promote_best(
    name: str, trial: int, finish: Finish, decision: Path, *, compiled_by: str = "", gpu_count: str = "0"
) -> Outcome:
    """Put the chosen trial's configuration, trained from the first fresh seed, in the champion's place if better.

    Which seed that is was fixed before any was trained. Without a place for champions nothing is done.

    Raises:
        StageFailed: as `stages.promote`.
    """
    with readable_errors("promote"), _database() as database:
        chosen = _chosen(Study.load(database, name), finish.num_seeds, trial)
    if not finish.champions:
        say("promote", "nothing is promoted: no place for champions was given")
        stages.write_json(decision, NotAsked(name))
        return Outcome(stages.metadata_of(chosen.best))
    seed = str(chosen.seeds[0])
    return stages.promote(
        *(to_json(chosen.best), joined(chosen.place, f"{chosen.best_runs}-{seed}"), finish.champions, decision),
        gate=to_dict(finish.gate),
        name=name,
        seed=seed,
        compiled_by=compiled_by,
        gpu_count=gpu_count,
    )


@dataclass(frozen=True)
class NotAsked:
    """In the place of a gate's decision, where nothing was to be promoted."""

    study: str
    action: str = "not asked"


def report(
    name: str, trial: int, evaluations: Sequence[Path], decision: Path, comparison: Path, page: Path
) -> Outcome:
    """Compare the chosen trial's configuration with the default, and write one page of the study.

    `evaluations` are those of the default from each fresh seed, then those of the best.

    Raises:
        StageFailed: something cannot be read.
    """
    with readable_errors("report"), _database() as database:
        study = Study.load(database, name)
        chosen = study.trials()[trial]
        best = applied(study.plan.config, chosen.values)
        found = list(evaluations)
        if best == study.plan.config:
            found = found[: len(found) // 2]  # the best is the default: both are the same trainings
        stages.compare(found, comparison)
        compared, decided = json.loads(comparison.read_text()), json.loads(decision.read_text())
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(study_page.build(study, chosen, compared, decided))
        return Outcome(stages.metadata_of(best), _final_numbers(compared))


def _final_numbers(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Of a ComparisonReport of the default and, unless that is the best, of the best."""
    default, best = comparison["configurations"][0], comparison["configurations"][-1]
    numbers = {"default_return_mean": default["mean"]["value"], "best_return_mean": best["mean"]["value"]}
    gain = best["gain"] or {"value": 0.0, "low": None, "high": None}
    numbers |= {"gain": gain["value"], "gain_low": gain["low"], "gain_high": gain["high"]}
    return {name: value for name, value in numbers.items() if value is not None}


def _retrained(chosen: Chosen, directory: Path) -> list[Path]:
    """Evaluations of the default and of the best, trained from fresh seeds; the default first."""
    reports = []
    for label, config in (("default", chosen.default), (chosen.best_runs, chosen.best)):
        for seed in chosen.seeds:
            own = directory / f"{label}-{seed}"
            run = joined(chosen.place, f"{label}-{seed}")
            stages.train(to_json(config), run, own / "history.csv", seed=str(seed))
            stages.evaluate(to_json(config), run, own / "evaluation.json", seed=str(seed), keep=True)
            reports.append(own / "evaluation.json")
    return reports


@contextmanager
def _workers(name: str, number: int, directory: Path) -> Iterator[None]:
    """More workers, each a process with a log of its own; when the block ends, so do they.

    Raises:
        StageFailed: one of them failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    logs = [directory / f"worker-{index + 2}.log" for index in range(number)]
    command = [sys.executable, "-m", "mappo", "study", "work", name]
    with ExitStack() as files:
        processes = [
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            for file in (files.enter_context(log.open("a")) for log in logs)
        ]
        for log in logs:
            say("tune", f"another worker writes to {log}")
        try:
            yield
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            statuses = [process.wait() for process in processes]
    failed = [str(log) for log, status in zip(logs, statuses, strict=True) if status]
    if failed:
        say("tune", f"failed: a worker failed, see {', '.join(failed)}")
        raise StageFailed(f"tune: see {', '.join(failed)}")


class _Watching:
    """What people and Prometheus see of a worker's trials."""

    def __init__(self, study: Study, monitor: Monitor, directory: Path):
        self._study, self._monitor, self._directory = study, monitor, directory
        self._shown: int | None = None
        self._tell()

    @contextmanager
    def run(self, claim: Claim, config: ExperimentConfig, run: Run) -> Iterator[tune.Listening]:
        """A trial trains a run."""
        if self._shown != claim.number:
            self._shown = claim.number
            say("tune", trial_start(claim.number, claim.values, self._study.num_trials))
        self._monitor.begin_run(f"{self._study.name}-{claim.number:04d}-{config.seed}")
        self._monitor.planned(config)
        self._tell()
        with training_progress(config.collection) as progress:
            yield tune.Listening(
                HistoryFile(self._directory / f"{run.store.location.replace('/', '-')[-100:]}.csv"),
                stages.each(self._monitor.began, progress.begin),
                stages.each(self._monitor.iterated, progress.show),
                self._monitor.saved,
            )

    def ended(self, claim: Claim, outcome: TrialOutcome, reason: str) -> None:
        """A trial ended."""
        self._monitor.end_run("failed" if outcome == "failed" else "finished")
        self._tell()
        say("tune", trial_end(claim.number, outcome, reason, self._study.best()))

    def _tell(self) -> None:
        """The whole study's numbers, to Prometheus."""
        trials, best = self._study.trials(), self._study.best()
        losses = sum(attempt.outcome == "lost" for trial in trials for attempt in trial.attempts)
        value = best.value if best else None
        self._monitor.studied(Counter(trial.state for trial in trials), self._study.num_trials, losses, value)


def go_on(name: str, num_trials: int | None, hours: float | None) -> None:
    """Ask for so many trials, and for time, as somebody at a terminal; what is None stays.

    Raises:
        StageFailed: there is no such study, or the database does not answer.
    """
    with readable_errors("study"), _database() as database:
        Study.load(database, name).go_on(num_trials, None if hours is None else 3600 * hours)


@contextmanager
def _database(is_new: bool = False) -> Iterator[Database]:
    """The database of studies; `is_new` makes the file that it is without one.

    Raises:
        ConfigError: there is none.
        DatabaseError: it does not answer.
    """
    if os.environ.get("MAPPO_PIPELINE_RUN") and not os.environ.get(URL_VARIABLE):
        raise ConfigError(
            f"{URL_VARIABLE} is not set in this pod: studies need a database that outlives it; the site's "
            "database_secret holds its URL under the key `url`"
        )
    url = database_url(RUNS)
    if not is_new and not (os.environ.get(URL_VARIABLE) or (RUNS / FILE).exists()):
        raise ConfigError(f"there is no study in {url}; {URL_VARIABLE} can name another database")
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def _best_before(database: Database, series: str, name: str, plan: Plan) -> dict[str, Any] | None:
    """The best values of the latest study of the series but this one, as far as they are in this one's space."""
    for each in editions(database, series):
        if each == name:
            continue
        try:
            best = Study.load(database, each).best()
        except ConfigError as error:
            say("prepare", f"warning: not begun with what study {each} found: {error}")
            continue
        if best is None:
            continue
        outside = [path for path, range_ in plan.space.items() if not contains(range_, best.values.get(path))]
        if outside:
            say("prepare", f"not begun with the best of study {each}: outside the space: {', '.join(outside)}")
            return None
        say("prepare", f"the second trial is the best of study {each}")
        return {path: best.values[path] for path in plan.space}
    return None


def _numbers(study: Study) -> dict[str, float]:
    trials, best = study.trials(), study.best()
    numbers = {f"num_{state}_trials": 0.0 for state in ("complete", "pruned", "failed")}
    for trial in trials:
        if f"num_{trial.state}_trials" in numbers:
            numbers[f"num_{trial.state}_trials"] += 1
    if best and best.value is not None:
        numbers["best_value"] = best.value
    return numbers


def list_lines() -> list[str]:
    """A line for each study in the database.

    Raises:
        StageFailed: there is no database, or it does not answer.
    """
    with readable_errors("study"), _database() as database:
        names = study_names(database)
        lines = [f"{'study':<30}  {'done':>9}  {'best':>9}  task"] if names else [f"no study in {database.place}"]
        for name in names:
            try:
                study = Study.load(database, name)
            except ConfigError as error:
                lines.append(f"{name:<30}  {error}")
                continue
            done = sum(trial.state not in ("waiting", "running") for trial in study.trials())
            best = study.best()
            value = f"{best.value:.4g}" if best else ""
            task = study.plan.config.environment.scenario
            lines.append(f"{name:<30}  {f'{done}/{study.num_trials}':>9}  {value:>9}  {task}")
        return lines


def show_lines(name: str) -> list[str]:
    """A study's trials as a table, and its best.

    Raises:
        StageFailed: there is none, or the database does not answer.
    """
    with readable_errors("study"), _database() as database:
        study = Study.load(database, name)
        trials, best = study.trials(), study.best()
        asked = f"{len(trials)} of {study.num_trials} trials; runs in {study.place}"
        return [*trial_table(trials), asked, *(best_lines(best, study.plan.config) if best else [])]


def exported(name: str) -> dict[str, Any]:
    """All of a study as JSON.

    Raises:
        StageFailed: there is none, or the database does not answer.
    """
    with readable_errors("study"), _database() as database:
        study = Study.load(database, name)
        trials = [{**asdict(trial), "seconds": trial.seconds} for trial in study.trials()]
        return {"study": name, "place": study.place, "plan": study.plan.to_dict(), "trials": trials}


def delete(name: str, really: bool) -> str:
    """Delete a study, or say what would be deleted.

    Raises:
        StageFailed: there is none, or the database does not answer.
    """
    with readable_errors("study"), _database() as database:
        study = Study.load(database, name)
        what = f"study {name} with {len(study.trials())} trials; their runs stay in {study.place}"
        if not really:
            return f"would delete {what}; to do it: --delete"
        delete_study(database, name)
        return f"deleted {what}"
