"""The studies in a database, by name and by series."""

from functools import partial

import optuna

from mappo.tuning.database import Database

SERIES = "series"  # the attribute of a study that names its series


def study_names(database: Database) -> list[str]:
    """Of all studies in a database.

    Raises:
        DatabaseError: it does not answer.
    """
    return database.patiently(lambda: sorted(optuna.get_all_study_names(database.storage)))


def editions(database: Database, series: str) -> list[str]:
    """The names of a series' studies, the newest first.

    Raises:
        DatabaseError: it does not answer.
    """
    all_studies = partial(optuna.get_all_study_summaries, database.storage, include_best_trial=False)
    by_age = sorted(database.patiently(all_studies), key=lambda study: study._study_id, reverse=True)
    return [study.study_name for study in by_age if study.user_attrs.get(SERIES) == series]
