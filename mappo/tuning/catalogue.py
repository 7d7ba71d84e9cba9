"""The list of studies in a database, by name and by series."""

from functools import partial

import optuna

from mappo.tuning.database import Database

SERIES = "series"  # the attribute of a study that names its series


def study_names(database: Database) -> list[str]:
    """Return the names of all studies in a database, sorted.

    Raises:
        DatabaseError: the database does not answer.
    """
    return database.retry(lambda: sorted(optuna.get_all_study_names(database.storage)))


def editions(database: Database, series: str) -> list[str]:
    """Return the names of a series' studies, the newest first.

    Raises:
        DatabaseError: the database does not answer.
    """
    all_studies = partial(optuna.get_all_study_summaries, database.storage, include_best_trial=False)
    by_age = sorted(database.retry(all_studies), key=lambda study: study._study_id, reverse=True)
    return [study.study_name for study in by_age if study.user_attrs.get(SERIES) == series]
