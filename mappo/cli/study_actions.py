"""The actions of `mappo study`."""

from dataclasses import asdict
from typing import Any

from mappo.errors import ConfigError
from mappo.reporting.tables import best_lines, trial_table
from mappo.stages.runtime import readable_errors
from mappo.tuning.catalogue import study_names
from mappo.tuning.database import open_database
from mappo.tuning.study import Study, delete_study


def ask_for_trials(name: str, num_trials: int | None, hours: float | None) -> None:
    """Ask for so many trials, and for time, as somebody at a terminal; what is None stays.

    Raises:
        StageFailed: there is no such study, or the database does not answer.
    """
    with readable_errors("study"), open_database() as database:
        Study.load(database, name).go_on(num_trials, None if hours is None else 3600 * hours)


def list_lines() -> list[str]:
    """A line for each study in the database.

    Raises:
        StageFailed: there is no database, or it does not answer.
    """
    with readable_errors("study"), open_database() as database:
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
    with readable_errors("study"), open_database() as database:
        study = Study.load(database, name)
        trials, best = study.trials(), study.best()
        asked = f"{len(trials)} of {study.num_trials} trials; runs in {study.place}"
        return [*trial_table(trials), asked, *(best_lines(best, study.plan.config) if best else [])]


def exported(name: str) -> dict[str, Any]:
    """All of a study as JSON.

    Raises:
        StageFailed: there is none, or the database does not answer.
    """
    with readable_errors("study"), open_database() as database:
        study = Study.load(database, name)
        trials = [{**asdict(trial), "seconds": trial.seconds} for trial in study.trials()]
        return {"study": name, "place": study.place, "plan": study.plan.to_dict(), "trials": trials}


def delete(name: str, really: bool) -> str:
    """Delete a study, or say what would be deleted.

    Raises:
        StageFailed: there is none, or the database does not answer.
    """
    with readable_errors("study"), open_database() as database:
        study = Study.load(database, name)
        what = f"study {name} with {len(study.trials())} trials; their runs stay in {study.place}"
        if not really:
            return f"would delete {what}; to do it: --delete"
        delete_study(database, name)
        return f"deleted {what}"
