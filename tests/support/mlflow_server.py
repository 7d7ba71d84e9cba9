"""A real MLflow server on SQLite, and what it holds, read by its own client."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.services import free_ports, wait

_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def mlflow_server(directory: Path) -> Iterator[str]:
    """Run MLflow's server until the block ends; yield its URL.

    mlflow-skinny holds the whole server but for its pages. The other packages that it needs are few.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    database = f"sqlite:///{directory}/mlflow.db"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(directory / "artifacts")]
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            stdout=log,
            stderr=log,
            env={**os.environ, **_ENVIRONMENT},
            cwd=directory,
            start_new_session=True,
        )
    try:
        wait(lambda: _is_healthy(url), 120, f"no MLflow at {url}; its log is in {directory}")
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def _is_healthy(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return answer.read() == b"OK"
    return False
