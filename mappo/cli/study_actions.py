"""The actions of `mappo study`: request trials, list, show, export and delete."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mappo.errors import ConfigError
from mappo.reporting.study_result import result_lines
from mappo.reporting.tables import best_lines, constraint_lines, trial_table, why_no_best
from mappo.stages.readable_errors import readable_errors
from mappo.tuning.catalogue import study_names
from mappo.tuning.database import Database, open_database
from mappo.tuning.study import Study, delete_study
from mappo.tuning.study_config import Ending, changed_ending


def request(name: str, changes: Mapping[str, Any], scenario: str) -> Ending:
    """Update the settings of a study that is resumed, request its trials, and return what follows them.

    `changes` has sections of `StudyConfig`, and `champions`; a field that it leaves out stays as it was.
    `scenario` is the scenario that the user names.

    Raises:
        StageFailed: the study does not exist, or the database does not answer.
    """
    with readable_errors("study"), open_database() as database:
        study = Study.load(database, name)
        study.require_named(scenario)
        ending = changed_ending(study.ending, changes)
        from mappo.environment.measured_names import require_measured  # it imports torch

        require_measured(ending.gate.constraints, study.plan.config.environment, "gate.constraints")
        study.keep_ending(ending)
        budget = changes.get("budget", {})
        hours = budget.get("hours")
        study.request_trials(budget.get("num_trials"), None if hours is None else 3600 * hours)
        return ending


def list_rows() -> list[dict[str, Any]]:
    """Return the fields of each study in the database; of an unreadable study, its name and its problem.

    Raises:
        ConfigError: there is no study.
        DatabaseError: the database does not answer.
    """
    with open_database() as database:
        names = study_names(database)
        if not names:
            raise ConfigError(f"there is no study in {database.location}; `mappo tune --study NAME` begins one")
        return [_row(database, name) for name in names]


def _row(database: Database, name: str) -> dict[str, Any]:
    try:
        study = Study.load(database, name)
        trials, best, num_trials = study.trials(), study.best(), study.num_trials
    except ConfigError as error:  # one unreadable study does not hide the others
        return {"study": name, "problem": str(error)}
    return {
        "study": name,
        "done": sum(trial.state not in ("waiting", "running") for trial in trials),
        "trials": num_trials,
        "best": best.value if best else None,
        "task": study.plan.config.environment.scenario,
    }


def list_lines() -> list[str]:
    """Return the table of the studies in the database: a header and a line for each study.

    Raises:
        ConfigError: there is no study.
        DatabaseError: the database does not answer.
    """
    return [f"{'study':<30}  {'done':>9}  {'best':>9}  task", *map(_line, list_rows())]


def _line(row: Mapping[str, Any]) -> str:
    if "problem" in row:
        return f"{row['study']:<30}  {row['problem']}"
    done, value = f"{row['done']}/{row['trials']}", "" if row["best"] is None else f"{row['best']:.4g}"
    return f"{row['study']:<30}  {done:>9}  {value:>9}  {row['task']}"


def show_lines(name: str) -> list[str]:
    """Return the table of a study's trials, the best one, and its comparison with the default.

    Raises:
        ConfigError: the study does not exist.
        DatabaseError: the database does not answer.
    """
    with open_database() as database:
        study = Study.load(database, name)
        trials, best = study.trials(), study.best()
        summary = f"{len(trials)} of {study.num_trials} trials; runs in {study.store}"
        constraints = study.plan.tuning.constraints
        lines = [*trial_table(trials), summary, *constraint_lines(trials, constraints)]
        if best is None:
            return [*lines, why_no_best(trials, constraints)]
        return [*lines, *best_lines(best, study.plan.config), *result_lines(study, best)]


def study_as_dict(name: str) -> dict[str, Any]:
    """Return a study as a JSON object, with its plan and every trial.

    Raises:
        ConfigError: the study does not exist.
        DatabaseError: the database does not answer.
    """
    with open_database() as database:
        study = Study.load(database, name)
        trials = [
            {**asdict(trial), "is_feasible": trial.is_feasible, "seconds": trial.seconds}
            for trial in study.trials()
        ]
        return {"study": name, "place": study.store, "plan": study.plan.to_dict(), "trials": trials}


def delete(name: str, really: bool) -> str:
    """Delete a study if `really`. Return a message that names what was deleted, or would be.

    Raises:
        ConfigError: the study does not exist, or workers hold its trials.
        DatabaseError: the database does not answer.
    """
    with open_database() as database:
        study = Study.load(database, name)
        description = f"study {name} with {len(study.trials())} trials; their runs stay in {study.store}"
        if not really:
            return f"would delete {description}; add --delete to do it"
        delete_study(database, name)
        return f"deleted {description}"
