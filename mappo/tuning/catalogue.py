"""The list of studies in a database, by name and by series.

The queries are SQL, because Optuna's list reads every attribute of every study, and one malformed attribute would
hide all studies.
"""

import json

import sqlalchemy

from mappo.tuning.database import Database

SERIES = "series"  # the attribute of a study that names its series
_NAMES = sqlalchemy.text("SELECT study_name FROM studies ORDER BY study_name")
_EDITIONS = sqlalchemy.text(
    "SELECT study_name FROM studies JOIN study_user_attributes USING (study_id) "
    "WHERE key = :key AND value_json = :value ORDER BY study_id DESC"
)


def study_names(database: Database) -> list[str]:
    """Return the names of all studies in a database, sorted.

    Raises:
        DatabaseError: the database does not answer.
    """
    return database.names(_NAMES)


def editions(database: Database, series: str) -> list[str]:
    """Return the names of a series' studies, the newest first.

    Raises:
        DatabaseError: the database does not answer.
    """
    return database.names(_EDITIONS, key=SERIES, value=json.dumps(series))
