"""Where studies are kept: Optuna's storage in PostgreSQL, or in a file of SQLite on one machine."""

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
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from mappo.errors import ConfigError, DatabaseError
from mappo.tuning.database_url import FILE, RUNS, URL_VARIABLE, database_url

T = TypeVar("T")
_OPENING_SECONDS = 30.0  # within which a database must answer for the first time
_PATIENCE_SECONDS = 300.0
_LOCK_SECONDS = 60.0
_REFUSALS = ("authentication failed", "does not exist", "no password supplied", "pg_hba.conf", "permission denied")
_log = logging.getLogger(__name__)


class Database:
    """Optuna's storage, with what it leaves to its users: waiting for a database that is away, and one at a time.

    Within `exclusively` no other process decides about the same thing, wherever it runs. What is called through
    `patiently` is called again while the database does not answer, so it must be harmless twice.
    """

    def __init__(self, url: str, patience_seconds: float = _PATIENCE_SECONDS):
        """Connect, and make the tables if they are not there.

        Raises:
            ConfigError: the URL is not one of PostgreSQL or of a file of SQLite.
            DatabaseError: it does not answer.
        """
        parsed = _parsed(url)
        self.place = parsed.set(query={}).render_as_string(hide_password=True)  # a password may be in the query
        self._file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        options = _engine_options(self._file is not None)
        self._engine = sqlalchemy.create_engine(parsed, **options)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._patience_seconds = _OPENING_SECONDS
        self.storage = self.patiently(lambda: self._open(parsed, options))
        self._patience_seconds = patience_seconds

    @property
    def is_file(self) -> bool:
        """Whether it is a file of this machine."""
        return self._file is not None

    def patiently(self, call: Callable[[], T]) -> T:
        """What a call returns, tried again while the database is away.

        Raises:
            DatabaseError: it stayed away, or refuses.
        """
        waiting = Retrying(
            retry=retry_if_exception(_is_passing),
            stop=stop_after_delay(self._patience_seconds),
            wait=wait_exponential(multiplier=0.2, max=5),  # without jitter, which would draw training's numbers
            before_sleep=self._say_waiting,
            reraise=True,
        )
        try:
            return waiting(call)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, filelock.Timeout) as error:
            raise DatabaseError(f"{self.place}: {_reason(error)}") from error

    @contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """One process at a time for each name; it must not take long."""
        if self._file:
            with filelock.FileLock(f"{self._file}.{name}.lock", timeout=_LOCK_SECONDS):
                yield
            return
        key = int.from_bytes(hashlib.sha256(f"mappo {name}".encode()).digest()[:8], signed=True)
        with self._engine.begin() as connection:
            for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):  # a frozen holder loses it
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{_LOCK_SECONDS:.0f}s'")
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    def now(self) -> float:
        """Seconds since 1970 by the one clock that all workers share: the database's."""
        if self._file:
            return time.time()
        with self._engine.connect() as connection:
            query = "SELECT extract(epoch from clock_timestamp())::float8"
            return float(connection.execute(sqlalchemy.text(query)).scalar_one())

    def close(self) -> None:
        """Give the connections back."""
        self.storage.remove_session()
        self.storage.engine.dispose()
        self._engine.dispose()

    def _open(self, url: URL, options: dict[str, object]) -> RDBStorage:
        with self.exclusively("tables"):
            return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=dict(options))

    def _say_waiting(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _log.warning("%s: %s; trying again", self.place, _reason(error) if error else "no answer")


@contextmanager
def open_database(is_new: bool = False) -> Iterator[Database]:
    """The database of studies; `is_new` makes the file that it is without one.

    Raises:
        ConfigError: there is none.
        DatabaseError: it does not answer.
    """
    if os.environ.get("MAPPO_PIPELINE_RUN") and not os.environ.get(URL_VARIABLE):
        raise ConfigError(
            f"{URL_VARIABLE} is not set in this pod: studies need a database that outlives it; the site's "
            "database_secret holds its URL under the key `url`"
        )
    url = database_url(RUNS)
    if not is_new and not (os.environ.get(URL_VARIABLE) or (RUNS / FILE).exists()):
        raise ConfigError(f"there is no study in {url}; {URL_VARIABLE} can name another database")
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def _parsed(url: str) -> URL:
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
        f"{URL_VARIABLE}: must be postgresql://user:password@host/name, or sqlite:///file for one machine"
    )


def _engine_options(is_file: bool) -> dict[str, object]:
    if is_file:
        return {"connect_args": {"timeout": _LOCK_SECONDS}}
    network = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10, **network}}


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help: connections lost or refused, locks; not a wrong password."""
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
