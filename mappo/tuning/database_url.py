"""The URL of the database of studies."""

import os
from collections.abc import Mapping
from pathlib import Path

RUNS = Path("runs")  # where the file with studies is, on a machine without a database
URL_VARIABLE = "MAPPO_DATABASE"
FILE = "studies.db"


def database_url(directory: Path, environment: Mapping[str, str] = os.environ) -> str:
    """From MAPPO_DATABASE in the environment, as postgresql://user:password@host/name; or a file in a directory.

    It is never a parameter or a flag, which others can read.
    """
    return environment.get(URL_VARIABLE, "") or f"sqlite:///{directory / FILE}"
