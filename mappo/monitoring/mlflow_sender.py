"""The sender: a thread that sends the numbers of one MLflow run to a server.

No other module imports mlflow, and this one only if a stage has a server.

The training thread only puts numbers into a queue. A server that is dead, slow or refuses requests costs one line
of the log and the numbers that it does not take; it never costs time of training, but for a deadline at the end.
No line shows the text of an error or an answer, which can hold a password or a token.
"""

import importlib
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mappo.errors import ConfigError, one_line
from mappo.monitoring.mlflow_settings import MISSING, MlflowSettings, prepare_client

_log = logging.getLogger(__name__)
FRAMES = "progress/frames"  # the metric that tells which rows a run has already; its value is the row's step
_MAX_ROWS = 10_000  # in the queue; the oldest are dropped while a server does not answer
_MAX_METRICS, _MAX_PARAMETERS = 1000, 100  # of one request; limits of MLflow
_MAX_VALUE = 6000  # characters of a parameter; a limit of MLflow
_SEND_SECONDS = 5.0  # between two requests, so that they cost training next to nothing
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.5, 60.0
_RETRIED_STATUSES = (408, 429)
_REASONS = {  # by the class of an error
    "SSLError": "its certificate is not valid",
    "ProxyError": "the proxy does not let requests pass",
    "InvalidHeader": "the token or the password holds a character that a header cannot hold",
    "Timeout": "it did not answer in time",
    "ConnectionError": "it cannot be reached",
    "RetryError": "it refuses requests for now (429 or 5xx)",
}


@dataclass(frozen=True)
class Target:
    """The MLflow run to write to.

    run: its ID, if it is known. name: that of a new run. tags: those that the run gets, if it lacks them.
    identity: the value of the tag `mappo.id`, by which a later process finds the run; empty if none may find it.
    is_continued: whether to look for such a run before creating one. is_owned: whether this process sets the state
    of the run; Kubeflow sets that of its own.
    """

    name: str
    identity: str
    run: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    is_continued: bool = False
    is_owned: bool = True


@dataclass(frozen=True)
class _Row:
    step: int
    milliseconds: int
    numbers: Mapping[str, float]


class Sender:
    """The thread that sends to one MLflow run."""

    def __init__(self, settings: MlflowSettings, target: Target, parameters: Mapping[str, str]):
        """Import MLflow and start the thread.

        Raises:
            ConfigError: the package mlflow-skinny is not installed.
        """
        self._settings, self._target, self._parameters = settings, target, parameters
        # Import here, in the main thread: a process that training forks must not inherit a lock of an import.
        self._mlflow = _client_module()
        self._client = self._mlflow.MlflowClient(tracking_uri=settings.uri)
        self._lock = threading.Lock()  # guards the queue
        self._rows: deque[_Row] = deque()
        self._files: deque[tuple[str, Path]] = deque()
        self._batch: list[_Row] = []  # taken from the queue and not yet on the server
        self._logged: Mapping[str, float] = {}  # the last values that earlier processes sent
        self._run_id = ""
        self._status = ""  # of the MLflow run at its end
        self._is_abandoned = False
        self._has_failed = False
        self._has_ended = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The ID of the MLflow run; empty as long as the server has not told it."""
        return self._run_id

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Queue numbers, which belong to a step and must be finite."""
        with self._lock:
            self._rows.append(_Row(step, int(time.time() * 1000), numbers))
            if len(self._rows) > _MAX_ROWS:
                self._rows.popleft()

    def attach(self, name: str, file: Path) -> None:
        """Queue a text file, which becomes an artifact of this name. It must not change until `close` returns."""
        self._files.append((name, file))

    def close(self, status: str, seconds: float) -> None:
        """Send the rest, and end the MLflow run with a status. Give up after this many seconds."""
        self._status = status
        self._closing.set()
        self._thread.join(seconds)
        self._is_abandoned = True
        if not self._has_ended:
            self._report("it did not take everything in time")

    def _work(self) -> None:
        wait = _FIRST_RETRY_SECONDS
        while not self._is_abandoned:
            is_last = self._closing.is_set()  # read before sending, so that a last round sends everything
            try:
                self._send(is_last)
            except Exception as error:  # MLflow, requests and urllib3 have no common base for their errors
                self._report(_reason(error))
                if not _may_pass(error):
                    self._has_ended = True
                    return
                (time.sleep if is_last else self._closing.wait)(wait)
                wait = min(2 * wait, _LAST_RETRY_SECONDS)
                continue
            if is_last:
                self._has_ended = True
                return
            wait = _FIRST_RETRY_SECONDS
            self._closing.wait(_SEND_SECONDS)

    def _send(self, is_last: bool) -> None:
        if not self._run_id:
            self._run_id = self._open()
        while self._batch or self._take_batch():
            self._client.log_batch(self._run_id, metrics=self._metrics(self._batch))
            self._batch = []
        while self._files:
            name, file = self._files[0]
            self._client.log_text(self._run_id, file.read_text(), name)
            self._files.popleft()
        if is_last and self._target.is_owned:
            self._client.set_terminated(self._run_id, self._status)

    def _open(self) -> str:
        """Find or create the MLflow run; send the parameters that it lacks."""
        run = self._found() or self._created()
        run_id: str = run.info.run_id
        if self._target.is_owned and run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        self._logged = run.data.metrics
        self._describe(run_id, run.data)
        page = f"{self._settings.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
        _log.info("MLflow run: %s", one_line(page))
        return run_id

    def _describe(self, run_id: str, data: Any) -> None:
        """Send the tags and the parameters that an MLflow run lacks; a parameter that it has cannot change."""
        entities = self._mlflow.entities
        tags = [entities.RunTag(*pair) for pair in self._tags().items() if pair[0] not in data.tags]
        parameters = [
            entities.Param(key, _shortened(value))
            for key, value in self._parameters.items()
            if key not in data.params
        ]
        if tags:
            self._client.log_batch(run_id, tags=tags)
        for start in range(0, len(parameters), _MAX_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[start : start + _MAX_PARAMETERS])

    def _tags(self) -> dict[str, str]:
        identity = {"mappo.id": self._target.identity} if self._target.identity else {}
        return {**identity, **self._target.tags}

    def _found(self) -> Any:
        if self._target.run:
            return self._client.get_run(self._target.run)
        if not (self._target.is_continued and self._target.identity):
            return None
        query = f"tags.`mappo.id` = '{self._target.identity}'"
        newest = ["attributes.start_time DESC"]
        return next(
            iter(self._client.search_runs([self._experiment()], query, order_by=newest, max_results=1)), None
        )

    def _created(self) -> Any:
        return self._client.create_run(self._experiment(), tags=self._tags(), run_name=self._target.name)

    def _experiment(self) -> str:
        """Return the ID of the experiment, which is created if it does not exist."""
        if self._settings.experiment_id:
            return self._settings.experiment_id
        name = self._settings.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except self._mlflow.exceptions.MlflowException:
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:  # no other process has created it
                    raise
        return str(experiment.experiment_id)

    def _take_batch(self) -> bool:
        """Take rows from the queue, as many as one request may hold; return whether there are any.

        Numbers that the run has already are left out, so that a resumed run and a repeated evaluation have no
        point twice.
        """
        size = 0
        with self._lock:
            while self._rows:
                row = self._rows[0]
                numbers = self._missing(row)
                if self._batch and size + len(numbers) > _MAX_METRICS:
                    break
                self._rows.popleft()
                if numbers:
                    self._batch.append(replace(row, numbers=numbers))
                    size += len(numbers)
        return bool(self._batch)

    def _missing(self, row: _Row) -> Mapping[str, float]:
        if FRAMES in row.numbers:
            return row.numbers if row.step > self._logged.get(FRAMES, -1) else {}
        return {name: value for name, value in row.numbers.items() if self._logged.get(name) != value}

    def _metrics(self, rows: Sequence[_Row]) -> list[Any]:
        metric = self._mlflow.entities.Metric
        return [
            metric(name, float(value), row.milliseconds, row.step)
            for row in rows
            for name, value in row.numbers.items()
        ]

    def _report(self, reason: str) -> None:
        """Log one line about the first failure."""
        with self._lock:
            is_first, self._has_failed = not self._has_failed, True
        if is_first:
            _log.warning(
                "MLflow at %s: %s; the stage continues, and what the server does not take before the end of the "
                "stage is missing there",
                *(self._settings.uri, reason),
            )


def _client_module() -> Any:
    prepare_client()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mlflow = importlib.import_module("mlflow")
            for name in ("entities", "exceptions"):
                importlib.import_module(f"mlflow.{name}")
    except ImportError:
        raise ConfigError(MISSING) from None
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # its messages hold answers of the server
    return mlflow


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    status = _status(error)
    return status >= 500 or status in _RETRIED_STATUSES


def _status(error: Exception) -> int:
    """Return the HTTP status of an error; MLflow's client gives 500 to a failed connection."""
    get_status = getattr(error, "get_http_status_code", None)
    return int(get_status()) if get_status else 500


def _reason(error: Exception) -> str:
    """Return the reason in words that hold nothing of the error's text."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = [kind.__name__ for link in chain for kind in type(link).__mro__]
    known = next((reason for name, reason in _REASONS.items() if name in names), "")
    return known or (f"it answered {_status(error)}" if hasattr(error, "error_code") else type(error).__name__)


def _shortened(value: str) -> str:
    note = f"... ({len(value)} characters)"
    return value if len(value) <= _MAX_VALUE else value[: _MAX_VALUE - len(note)] + note
