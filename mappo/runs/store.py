"""Where checkpoints live: a directory, or a prefix in a bucket of any S3-compatible store. One small interface.

Every failure is a `StoreError` that names the place and the cause. What may pass by itself (refused connections,
time-outs, throttling, answers cut short) is tried again until `patience_seconds` are over. Credentials come from
where boto3 looks for them (environment, mounted files, instance), or for minio:// from Kubeflow's own secret; see
`s3_access`. They are never part of a location or a message.
"""

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, TooLarge

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


OnRequest = Callable[[str, str], object]
"""Hears of every request: read, write, create, list or delete; and ok or the `outcome` of its error."""


def ignore_request(operation: str, outcome: str) -> None:
    """Hear of a request, and do nothing."""


@contextmanager
def reported(on_request: OnRequest, operation: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        on_request(operation, error.outcome)
        raise
    on_request(operation, "ok")


@dataclass(frozen=True)
class Entry:
    """Something in a store; modified is in seconds since 1970."""

    key: str
    size_bytes: int
    modified: float


class Store(Protocol):
    """Bytes by key. Keys are relative paths such as `blobs/1a2b.safetensors`.

    What is written is there for every reader as soon as the call returns, and never in part.
    """

    location: str

    def read(self, key: str, max_bytes: int) -> bytes:
        """All bytes of an entry.

        Raises:
            KeyMissing: there is none.
            TooLarge: it is larger than `max_bytes`.
            StoreError: it cannot be read.
        """

    def write(self, key: str, content: bytes) -> None:
        """Put bytes under a key, in the place of what may be there."""

    def create(self, key: str, content: bytes) -> None:
        """Put bytes under a key that is free. A store may ignore that condition: see `honours_conditions`.

        Raises:
            KeyTaken: the key holds other bytes.
        """

    def entries(self, prefix: str = "") -> list[Entry]:
        """What is below a prefix such as `blobs/`, by key."""

    def delete(self, key: str) -> None:
        """Remove an entry; one that is not there is fine."""


def honours_conditions(store: Store, prefix: str) -> bool:
    """Whether a store refuses to create what is there already; tried out below a prefix, and deleted again.

    Raises:
        StoreError: it cannot be written to, or does not give back what was written.
    """
    key = f"{prefix}probe-{secrets.token_hex(8)}"
    store.create(key, b"first")
    try:
        if store.read(key, 100) != b"first":
            raise StoreError(f"{store.location}: what was written is not what is read")
        try:
            store.create(key, b"second")
        except KeyTaken:
            return True
        return False
    finally:
        store.delete(key)


def require_same(store: Store, key: str, content: bytes) -> None:
    """Read back what holds a key that was to be created: it may be this very content."""
    found: bytes | None = None
    try:
        found = store.read(key, len(content))
    except KeyMissing:
        raise StoreUnavailable(f"{store.location}/{key}: refused as taken, and then not there") from None
    except TooLarge:
        pass
    if found != content:
        raise KeyTaken(f"{store.location}/{key}: there is something else already")


def checked_key(key: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key:
        raise StoreError(f"{key!r}: not a key")
    return key
