"""The database of studies: Optuna's storage in PostgreSQL, or in a SQLite file on one machine.

This file is long because PostgreSQL and SQLite lock and fail in different ways.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import filelock
import optuna
import psycopg
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from tenacity import RetryCallState

from mappo.errors import ConfigError, DatabaseError, MappoError, StudyUnreadable, one_line
from mappo.runs.retries import make_retrying
from mappo.tuning.database_url import FILE, RUNS, URL_VARIABLE, configured_url, database_url

T = TypeVar("T")
_CONNECT_SECONDS = 30.0  # deadline of the first answer; short, because a wrong URL should fail soon
_PATIENCE_SECONDS = 300.0
_LOCK_SECONDS = 60.0
_ANSWER_SECONDS = 90.0  # more than the wait for a lock
_POLL_SECONDS = 2.0
MAX_REASON = 300  # characters of what was wrong
_PLAIN = re.compile(r"[\w.+-]*(@[\w.-]+)?")  # a user name may be an e-mail address
_PLAIN_HOST = re.compile(r"[\w.:%-]+")
_REFUSALS = ("authentication failed", "does not exist", "no password supplied", "pg_hba.conf", "permission denied")
_log = logging.getLogger(__name__)


class Database:
    """The storage of Optuna, with two things that Optuna leaves to its users: retries and locks.

    `retry` repeats a call while the database does not answer, so the call must be harmless when it runs twice.
    `lock` lets one process at a time decide about a study, wherever the processes run.
    """

    def __init__(self, url: str, patience_seconds: float | None = None):
        """Connect, and create missing tables. Later calls of `retry` end after `patience_seconds` (default: 300).

        Raises:
            ConfigError: the URL names neither PostgreSQL nor a SQLite file.
            DatabaseError: the database does not answer within 30 seconds, or refuses.
        """
        parsed = _parse_url(url)
        self._secrets = _secrets(parsed)
        self.location = _shown(parsed)
        self._file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        options = _engine_options(parsed)
        self._engine = sqlalchemy.create_engine(parsed, **options)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._patience_seconds = _CONNECT_SECONDS
        self.storage = self.retry(lambda: self._open(parsed, options))
        self._patience_seconds = _PATIENCE_SECONDS if patience_seconds is None else patience_seconds

    @property
    def is_file(self) -> bool:
        """Return whether the database is a file on this machine."""
        return self._file is not None

    def retry(self, call: Callable[[], T], is_patient: bool = True) -> T:
        """Return what `call` returns; retry while the database does not answer, if `is_patient`.

        Raises:
            DatabaseError: the database did not answer before the retries ended, or refuses.
            StudyUnreadable: the database holds something that mappo did not write, or no longer holds the study.
        """
        patience_seconds = self._patience_seconds if is_patient else 0.0
        retrying = make_retrying(_is_retryable, patience_seconds, 5.0, self._log_retry)
        try:
            return retrying(call)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, filelock.Timeout) as error:
            raise DatabaseError(f"{self.location}: {self._reason(error)}") from error
        except (MappoError, OSError, MemoryError):
            raise
        except Exception as error:  # Optuna's readers raise anything on what they did not write
            reason = f"{type(error).__name__}: {self._reason(error)}"
            raise StudyUnreadable(
                f"{self.location}: holds something that mappo did not write: {reason}"
            ) from error

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, which one process at a time can hold. Keep the block short.

        Others wait up to 60 seconds for the lock. PostgreSQL takes it from a process that is idle for so long.
        """
        if self._file:
            with filelock.FileLock(f"{self._file}.{name}.lock", timeout=_LOCK_SECONDS):
                yield
            return
        key = _lock_key(name)
        with self._engine.begin() as connection:
            # The second limit takes the lock from a process that is frozen while it holds the lock.
            for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{_LOCK_SECONDS:.0f}s'")
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    @contextmanager
    def long_lock(self, name: str, on_wait: Callable[[], object]) -> Iterator[None]:
        """Hold a lock of this name for a block that may take hours; it ends with the process, also by SIGKILL.

        Others wait without limit; `on_wait` is called once if the lock is not free. A restart of PostgreSQL
        releases the lock, so the block must bear that another process enters it.

        Raises:
            DatabaseError: the database does not answer.
        """
        file = f"{self._file}.{name}.long-lock"
        release = self.retry(partial(self._try_lock, name, file))
        if release is None:
            on_wait()
        while release is None:
            time.sleep(_POLL_SECONDS)
            release = self.retry(partial(self._try_lock, name, file))
        try:
            yield
        finally:
            with suppress(sqlalchemy.exc.SQLAlchemyError):  # the connection is lost, and the lock with it
                release()

    @contextmanager
    def free_lock(self, name: str) -> Iterator[bool]:
        """Hold a lock of this name if it is free; the context is whether it was. Nobody waits.

        It may be held for hours and ends with the process, as `long_lock`, whose names are others.

        Raises:
            DatabaseError: the database does not answer.
        """
        folder = f"{self._file}.locks"  # of files that stay, one for each name
        if self._file:
            Path(folder).mkdir(exist_ok=True)
        release = self.retry(partial(self._try_lock, f"free {name}", f"{folder}/{name}"))
        try:
            yield release is not None
        finally:
            if release is not None:
                with suppress(sqlalchemy.exc.SQLAlchemyError):  # the connection is lost, and the lock with it
                    release()

    def _try_lock(self, name: str, file: str) -> Callable[[], object] | None:
        """Take a long lock and return the function that releases it; return None if another process holds it.

        It is the lock of a `file`, if the database is one.
        """
        if self._file:
            file_lock = filelock.FileLock(file, timeout=0)
            try:
                file_lock.acquire()
            except filelock.Timeout:
                return None
            return file_lock.release
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("SET tcp_keepalives_idle = 20")  # notice a holder whose machine is gone
        query = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if not connection.execute(query, {"key": _lock_key(f"{name} long")}).scalar_one():
            connection.close()
            return None
        connection.detach()  # closing the connection then releases the lock, which a pool would keep
        return connection.close

    def now(self) -> float:
        """Return the seconds since 1970 by the database's clock, the one clock that all workers share."""
        if self._file:
            return time.time()
        with self._engine.connect() as connection:
            query = "SELECT extract(epoch from clock_timestamp())::float8"
            return float(connection.execute(sqlalchemy.text(query)).scalar_one())

    def names(self, query: sqlalchemy.TextClause, **parameters: str) -> list[str]:
        """Return the first column of a query's result."""

        def read() -> list[str]:
            with self._engine.connect() as connection:
                return [str(row[0]) for row in connection.execute(query, parameters)]

        return self.retry(read)

    def close(self) -> None:
        """Close all connections."""
        self.storage.remove_session()
        self.storage.engine.dispose()
        self._engine.dispose()

    def _open(self, url: URL, options: dict[str, object]) -> RDBStorage:
        with self.lock("tables"):
            return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=dict(options))

    def _log_retry(self, state: RetryCallState) -> None:
        """Log the first failure of a call; the last one becomes the error."""
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and error:
            message = "%s: %s; trying again for %.0f s"
            _log.warning(message, self.location, self._reason(error), self._patience_seconds)

    def _reason(self, error: BaseException) -> str:
        """Return an error as one short line, without what is secret in the URL."""
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        origin = getattr(cause, "orig", None) or cause or error
        text = str(origin) or type(origin).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text, MAX_REASON)


@contextmanager
def open_database(is_new: bool = False) -> Iterator[Database]:
    """Open the database of studies for the block; `is_new` allows creating the SQLite file.

    Raises:
        ConfigError: no database is configured and the file does not exist, or a pipeline pod has no database.
        DatabaseError: the database does not answer.
    """
    if os.environ.get("MAPPO_PIPELINE_RUN") and not configured_url():
        raise ConfigError(
            f"{URL_VARIABLE} is not set in this pod: a study needs a database that outlives the pod; the site's "
            "database_secret must hold its URL under the key `url`"
        )
    url = database_url(RUNS)
    if not is_new and not (configured_url() or (RUNS / FILE).exists()):
        raise ConfigError(f"there is no study in {url}; {URL_VARIABLE} can name another database")
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def _parse_url(url: str) -> URL:
    """Parse the URL of a database.

    Raises:
        ConfigError: the URL names neither PostgreSQL nor a SQLite file. The message shows nothing of the URL: in
            a malformed one, a piece of the password may stand anywhere.
    """
    if not url.isprintable():
        raise ConfigError(f"{URL_VARIABLE}: holds a control character, such as a newline; remove it")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{URL_VARIABLE}: must be a URL such as postgresql://user:password@host/name") from None
    backend = parsed.drivername.partition("+")[0]
    if backend in ("postgres", "postgresql"):
        return _postgres_url(url, parsed)
    if backend == "sqlite" and _is_file(parsed):
        return parsed.set(drivername="sqlite")
    raise ConfigError(
        f"{URL_VARIABLE}: must be postgresql://user:password@host/name, or sqlite:///file on one machine"
    )


def _postgres_url(url: str, parsed: URL) -> URL:
    if url.count("@") > 1:
        raise ConfigError(f"{URL_VARIABLE}: has more than one @; write an @ in the user or the password as %40")
    if not (parsed.host and parsed.database):
        raise ConfigError(f"{URL_VARIABLE}: must be postgresql://user:password@host/name; host or name is missing")
    is_plain = _PLAIN.fullmatch(parsed.username or "") and re.fullmatch(r"[\w.+-]+", parsed.database)
    if not (is_plain and _PLAIN_HOST.fullmatch(parsed.host)):
        raise ConfigError(
            f"{URL_VARIABLE}: user, host and name of the database may hold letters, digits and . _ + - only; the "
            "form is postgresql://user:password@host/name"
        )
    return parsed.set(drivername="postgresql+psycopg")


def _is_file(parsed: URL) -> bool:
    if parsed.host or parsed.username or parsed.password or parsed.query or not parsed.database:
        return False
    return parsed.database != ":memory:" and "://" not in parsed.database


def _lock_key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"mappo {name}".encode()).digest()[:8], signed=True)


def _shown(parsed: URL) -> str:
    """Return the URL without what may be secret: the password, the query, and a user name without a password."""
    user = parsed.username if parsed.password else None
    parts = (user, parsed.password, parsed.host, parsed.port, parsed.database)
    return URL.create(parsed.drivername, *parts).render_as_string(hide_password=True)


def _secrets(parsed: URL) -> list[str]:
    """Return what no message may show: the password, and the values of the query."""
    values = [value for entry in parsed.query.values() for value in ([entry] if isinstance(entry, str) else entry)]
    secrets = {str(text) for text in (parsed.password, *values) if text}
    # Shorter ones would blacken half of a message, and show by that what they are.
    return sorted((secret for secret in secrets if len(secret) > 3), key=len, reverse=True)


def _engine_options(parsed: URL) -> dict[str, object]:
    if parsed.drivername == "sqlite":
        return {"connect_args": {"timeout": _LOCK_SECONDS}}
    _, options = parsed.get_dialect()().create_connect_args(parsed)
    network = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
    connect = partial(_Connection.connect, **{"connect_timeout": 10, **network, **options})
    return {"pool_pre_ping": True, "creator": connect}


class _Connection(psycopg.Connection[Any]):
    """A connection whose every answer has a deadline, also if the server is frozen while its machine lives."""

    def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
        """Wait for an answer.

        Raises:
            psycopg.OperationalError: no answer came in time.
        """
        try:
            return super().wait(_limited(gen), *arguments, **options)
        except _NoAnswer:
            self.close()  # the answer to this query could be taken for that to the next
            raise psycopg.OperationalError(f"no answer within {_ANSWER_SECONDS:g} s") from None


class _NoAnswer(Exception):
    """The deadline of an answer has passed."""


def _limited(gen: Any) -> Any:
    """Return one of psycopg's generators with a deadline, checked whenever nothing has arrived for 0.1 s."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    try:
        state = next(gen)
        while True:
            ready = yield state
            if not ready and time.monotonic() > deadline:
                raise _NoAnswer
            state = gen.send(ready)
    except StopIteration as result:
        return result.value


def _is_retryable(error: BaseException) -> bool:
    """Return whether a retry may help: after a lost connection or a lock, but not after a wrong password."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, filelock.Timeout):
        return True
    return isinstance(cause, OperationalError | InterfaceError) and not _is_refusal(cause)


def _is_refusal(error: Exception) -> bool:
    text = str(error)
    return any(words in text for words in _REFUSALS)
