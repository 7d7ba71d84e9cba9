"""The URL of the database of studies."""

import os
from collections.abc import Mapping
from pathlib import Path

RUNS = Path("runs")  # the directory of the file with studies, on a machine without a database
URL_VARIABLE = "MAPPO_DATABASE"
FILE = "studies.db"


def configured_url(environment: Mapping[str, str] = os.environ) -> str:
    """Return MAPPO_DATABASE from the environment without the white space around it; empty if it is not set.

    Secrets that were made from files often end with a newline.
    """
    return environment.get(URL_VARIABLE, "").strip()


def database_url(directory: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Return MAPPO_DATABASE from the environment, or the URL of a SQLite file in `directory`.

    The variable has the form postgresql://user:password@host/name. The URL is never a parameter or a flag, because
    other users can read those.
    """
    return configured_url(environment) or f"sqlite:///{directory / FILE}"
