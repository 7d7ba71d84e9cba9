"""The settings of MLflow, read from the environment variables of MLflow's own client."""

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from mappo.errors import ConfigError

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "mappo"  # the experiment of runs if no variable names another
MISSING = (
    f"{URI_VARIABLE} is set, but the package mlflow-skinny is missing: pip install 'mappo[mlflow]', or for an "
    "image: make image EXTRAS=mlflow"
)
_EXAMPLE = "must be a URL such as https://mlflow.example.org"
_DEFAULTS = {  # of MLflow's client; a variable that is set stays as it is
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender retries itself, and stops at its deadline
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the sender logs it as a line of the stage
}


@dataclass(frozen=True)
class MlflowSettings:
    """The MLflow server, and where on it a stage logs.

    uri: URL of the server, without user and password. run: ID of the MLflow run that exists for this stage, as
    Kubeflow creates one; empty if there is none. experiment_id, experiment: ID or name of the experiment in which
    runs are created.
    """

    uri: str
    run: str = ""
    experiment_id: str = ""
    experiment: str = _EXPERIMENT

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "MlflowSettings | None":
        """Read MLFLOW_TRACKING_URI, MLFLOW_RUN_ID, MLFLOW_EXPERIMENT_ID and MLFLOW_EXPERIMENT_NAME.

        Without a URI, there is no server: the result is None.

        Raises:
            ConfigError: the URI is not the URL of a server. No message shows the URI, which may hold a password.
        """
        uri = environment.get(URI_VARIABLE, "")
        if not uri:
            return None
        return cls(
            _without_credentials(uri),
            environment.get("MLFLOW_RUN_ID", ""),
            environment.get("MLFLOW_EXPERIMENT_ID", ""),
            environment.get("MLFLOW_EXPERIMENT_NAME", "") or _EXPERIMENT,
        )


def require_mlflow(environment: Mapping[str, str]) -> None:
    """Check that a user who asks for MLflow can have it.

    Raises:
        ConfigError: the URI is not the URL of a server, or the package mlflow-skinny is missing.
    """
    MlflowSettings.from_environment(environment)
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(MISSING)


def prepare_client(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that MLflow's client reads: short requests, no telemetry, and the URI's credentials.

    The client would show a URL with a password in its errors.
    """
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)
    parts = urlsplit(environment[URI_VARIABLE])
    for name, credential in (("USERNAME", parts.username), ("PASSWORD", parts.password)):
        if credential:
            environment.setdefault(f"MLFLOW_TRACKING_{name}", unquote(credential))


def _without_credentials(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", uri):
        raise ConfigError(f"{URI_VARIABLE}: {_EXAMPLE}")
    server = parts.netloc.rpartition("@")[2]
    if not re.fullmatch(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", server) or "@" in parts.path:
        raise ConfigError(f"{URI_VARIABLE}: {_EXAMPLE}")
    return f"{parts.scheme}://{server}{parts.path.rstrip('/')}"
