"""The interface of the stores that hold checkpoints: directories, and prefixes in a bucket of any S3 store.

Every failure is a `StoreError` that names the location and the cause. A store in a bucket retries transient
errors (refused connections, time-outs, throttling, incomplete responses) until `patience_seconds` have passed.
boto3 finds the credentials in the environment, in mounted files or in the instance; for minio:// they may come
from Kubeflow's secret, see `s3_access`. Credentials are never part of a location or a message.
"""

import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, TooLarge

_log = logging.getLogger(__name__)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


OnRequest = Callable[[str, str], object]
"""The callback of requests. It is called after each request with its operation (read, write, create, list or
delete) and its outcome (ok, or the `outcome` of its error)."""


def ignore_request(operation: str, outcome: str) -> None:
    """Ignore a request: the callback of a store whose requests nobody counts."""


@contextmanager
def report_outcome(on_request: OnRequest, operation: str) -> Iterator[None]:
    """Call `on_request` with the outcome of the request that the block sends."""
    try:
        yield
    except StoreError as error:
        on_request(operation, error.outcome)
        raise
    on_request(operation, "ok")


@dataclass(frozen=True)
class Entry:
    """An entry of a store, without its bytes. `modified` is in seconds since 1970."""

    key: str
    size_bytes: int
    modified: float


class Store(Protocol):
    """A store of bytes by key. Keys are relative paths such as `blobs/1a2b.safetensors`.

    When a write returns, every reader sees all of its bytes. No reader ever sees a part of them.
    """

    location: str

    def read(self, key: str, max_bytes: int) -> bytes:
        """Return all bytes of an entry.

        Raises:
            KeyMissing: the store has no such key.
            TooLarge: the entry has more than `max_bytes`.
            StoreError: the entry cannot be read.
        """

    def write(self, key: str, content: bytes) -> None:
        """Write bytes under a key, and replace the bytes that the key already has."""

    def create(self, key: str, content: bytes) -> None:
        """Write bytes under a key that does not exist yet.

        A store may ignore this condition, or not implement it, and overwrite the key: see `honours_conditions`.

        Raises:
            KeyTaken: the key holds other bytes.
        """

    def entries(self, prefix: str = "") -> list[Entry]:
        """Return the entries below a prefix such as `blobs/`, sorted by key."""

    def entries_outside(self, folder: str) -> list[Entry]:
        """Return all entries, sorted by key, but those in folders of this name, if the store can leave these out.

        In a directory, folders that cannot be listed are left out, too.
        """

    def delete(self, key: str) -> None:
        """Delete an entry. A key that does not exist is no error."""

    def impatient(self) -> "Store":
        """Return this store with little patience, for requests that may fail without harm."""


def honours_conditions(store: Store, prefix: str) -> bool:
    """Return whether a store refuses to create a key that exists; some ignore the condition (If-None-Match).

    The test writes an object below `prefix` and deletes it again.

    Raises:
        StoreError: the store refuses writes, or returns other bytes than were written.
    """
    key = f"{prefix}probe-{secrets.token_hex(8)}"
    store.create(key, b"first")
    try:
        if store.read(key, 100) != b"first":
            raise StoreError(f"{store.location}: the store returned other bytes than were written to it")
        try:
            store.create(key, b"second")
        except KeyTaken:
            return True
        return False
    finally:
        try:
            store.impatient().delete(key)
        except StoreError as error:  # `Run.garbage` finds what remains
            _log.warning("the test of conditional writes could not be deleted; training continues: %s", error)


def require_same(store: Store, key: str, content: bytes) -> None:
    """Accept a key that could not be created because it exists, if it holds exactly this content.

    An earlier try of the same write may have created the key although its response was lost.

    Raises:
        KeyTaken: the key holds other bytes.
        StoreUnavailable: the key does not exist any more.
    """
    stored: bytes | None = None
    try:
        stored = store.read(key, len(content))
    except KeyMissing:
        raise StoreUnavailable(
            f"{store.location}/{key}: the store refused to create the key because it exists, but does not find it"
        ) from None
    except TooLarge:  # so it holds other bytes
        pass
    if stored != content:
        raise KeyTaken(f"{store.location}/{key}: the key already holds other content")


def checked_key(key: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key:
        raise StoreError(
            f"{key!r}: not a valid key: give a relative path of letters, digits, '.', '_' and '-', without '..'"
        )
    return key
