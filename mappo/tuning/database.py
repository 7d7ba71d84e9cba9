"""The database of studies: Optuna's storage in PostgreSQL, or in a SQLite file on one machine."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from tenacity import RetryCallState

from mappo.errors import ConfigError, DatabaseError
from mappo.runs.retries import make_retrying
from mappo.tuning.database_url import FILE, RUNS, URL_VARIABLE, database_url

T = TypeVar("T")
_CONNECT_SECONDS = 30.0  # deadline of the first answer; short, because a wrong URL should fail soon
_PATIENCE_SECONDS = 300.0
_LOCK_SECONDS = 60.0
_REFUSALS = ("authentication failed", "does not exist", "no password supplied", "pg_hba.conf", "permission denied")
_log = logging.getLogger(__name__)


class Database:
    """The storage of Optuna, with two things that Optuna leaves to its users: retries and locks.

    `retry` repeats a call while the database does not answer, so the call must be harmless when it runs twice.
    `lock` lets one process at a time decide about a study, wherever the processes run.
    """

    def __init__(self, url: str, patience_seconds: float = _PATIENCE_SECONDS):
        """Connect, and create missing tables. Later calls of `retry` end after `patience_seconds`.

        Raises:
            ConfigError: the URL names neither PostgreSQL nor a SQLite file.
            DatabaseError: the database does not answer within 30 seconds, or refuses.
        """
        parsed = _parse_url(url)
        self.location = parsed.set(query={}).render_as_string(hide_password=True)  # the query may hold a password
        self._file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        options = _engine_options(self._file is not None)
        self._engine = sqlalchemy.create_engine(parsed, **options)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._patience_seconds = _CONNECT_SECONDS
        self.storage = self.retry(lambda: self._open(parsed, options))
        self._patience_seconds = patience_seconds

    @property
    def is_file(self) -> bool:
        """Return whether the database is a file on this machine."""
        return self._file is not None

    def retry(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; retry while the database does not answer.

        Raises:
            DatabaseError: the database did not answer before the retries ended, or refuses.
        """
        retrying = make_retrying(_is_retryable, self._patience_seconds, 5.0, self._log_retry)
        try:
            return retrying(call)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, filelock.Timeout) as error:
            raise DatabaseError(f"{self.location}: {_reason(error)}") from error

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, which one process at a time can hold. Keep the block short.

        Others wait up to 60 seconds for the lock. PostgreSQL takes it from a process that is idle for so long.
        """
        if self._file:
            with filelock.FileLock(f"{self._file}.{name}.lock", timeout=_LOCK_SECONDS):
                yield
            return
        key = int.from_bytes(hashlib.sha256(f"mappo {name}".encode()).digest()[:8], signed=True)
        with self._engine.begin() as connection:
            # The second limit takes the lock from a process that is frozen while it holds the lock.
            for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{_LOCK_SECONDS:.0f}s'")
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    def now(self) -> float:
        """Return the seconds since 1970 by the database's clock, the one clock that all workers share."""
        if self._file:
            return time.time()
        with self._engine.connect() as connection:
            query = "SELECT extract(epoch from clock_timestamp())::float8"
            return float(connection.execute(sqlalchemy.text(query)).scalar_one())

    def close(self) -> None:
        """Close all connections."""
        self.storage.remove_session()
        self.storage.engine.dispose()
        self._engine.dispose()

    def _open(self, url: URL, options: dict[str, object]) -> RDBStorage:
        with self.lock("tables"):
            return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=dict(options))

    def _log_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _log.warning("%s: %s; trying again", self.location, _reason(error) if error else "no answer")


@contextmanager
def open_database(is_new: bool = False) -> Iterator[Database]:
    """Open the database of studies for the block; `is_new` allows creating the SQLite file.

    Raises:
        ConfigError: no database is configured and the file does not exist, or a pipeline pod has no database.
        DatabaseError: the database does not answer.
    """
    if os.environ.get("MAPPO_PIPELINE_RUN") and not os.environ.get(URL_VARIABLE):
        raise ConfigError(
            f"{URL_VARIABLE} is not set in this pod: a study needs a database that outlives the pod; the site's "
            "database_secret must hold its URL under the key `url`"
        )
    url = database_url(RUNS)
    if not is_new and not (os.environ.get(URL_VARIABLE) or (RUNS / FILE).exists()):
        raise ConfigError(f"there is no study in {url}; {URL_VARIABLE} can name another database")
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"{URL_VARIABLE}: must be a URL such as postgresql://user:password@host/name") from None
    backend = {"postgres": "postgresql"}.get(parsed.get_backend_name(), parsed.get_backend_name())
    if backend == "postgresql" and parsed.host and parsed.database:
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed
    raise ConfigError(
        f"{URL_VARIABLE}: must be postgresql://user:password@host/name, or sqlite:///file on one machine"
    )


def _engine_options(is_file: bool) -> dict[str, object]:
    if is_file:
        return {"connect_args": {"timeout": _LOCK_SECONDS}}
    network = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10, **network}}


def _is_retryable(error: BaseException) -> bool:
    """Return whether a retry may help: after a lost connection or a lock, but not after a wrong password."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, filelock.Timeout):
        return True
    return isinstance(cause, OperationalError | InterfaceError) and not _is_refusal(cause)


def _is_refusal(error: Exception) -> bool:
    text = str(error)
    return any(words in text for words in _REFUSALS)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    origin = getattr(cause, "orig", None) or cause or error
    return " ".join(str(origin).split()) or type(origin).__name__
