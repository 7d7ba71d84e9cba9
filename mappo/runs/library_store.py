"""The compiled libraries that several machines share, in a store."""

import logging
import os
from pathlib import PurePosixPath

from mappo.errors import CheckpointError, ConfigError, StoreError
from mappo.runs.checkpoint import sha256_of, verify
from mappo.runs.locations import open_store
from mappo.runs.store import Store

COMPILED_VARIABLE = "MAPPO_COMPILED"
_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 10.0  # of one request; without the store, compilation takes a minute


class LibraryStore:
    """A store of compiled libraries under `NAME/SHA256.zip`. After the first failure, it is not used any more."""

    def __init__(self, store: Store):
        self._store, self.location = store, store.location
        self._has_failed = False

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Return the archive of a library, or None if the store has none whose hash is right.

        Raises:
            StoreError: the store failed.
        """
        if self._has_failed:
            return None
        try:
            for entry in self._store.entries(f"{name}/"):
                content = self._store.read(entry.key, max_bytes)
                try:
                    return verify(content, PurePosixPath(entry.key).stem, f"{self.location}/{entry.key}")
                except CheckpointError as error:
                    _log.warning("compiled code is not taken: %s", error)
        except StoreError:
            self._has_failed = True
            raise
        return None

    def publish(self, name: str, content: bytes) -> None:
        """Add the archive of a library.

        Raises:
            StoreError: the store failed.
        """
        if self._has_failed:
            return
        try:
            self._store.write(f"{name}/{sha256_of(content)}.zip", content)
        except StoreError:
            self._has_failed = True
            raise


def library_store_from_environment() -> LibraryStore | None:
    """Return the store that `MAPPO_COMPILED` names, or None without this variable.

    Whoever can write to this store can run code in every process that names it.

    Raises:
        ConfigError: the variable holds no location.
    """
    location = os.environ.get(COMPILED_VARIABLE, "")
    if not location:
        return None
    try:
        return LibraryStore(open_store(location, _PATIENCE_SECONDS))
    except StoreError as error:
        raise ConfigError(f"{COMPILED_VARIABLE}: {error}") from None
