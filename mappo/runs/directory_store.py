"""A store in a directory of a file system."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mappo.errors import KeyMissing, StoreError, TooLarge
from mappo.runs.store import Entry, OnRequest, checked_key, ignore_request, report_outcome, require_same

_PARTIAL = ".partial-"  # marks the name of a file that is still being written


class DirectoryStore:
    """A `Store` in a directory of a file system with hard links."""

    def __init__(self, directory: Path, on_request: OnRequest = ignore_request):
        self.location = str(directory)
        self._directory, self._on_request = directory, on_request

    def read(self, key: str, max_bytes: int) -> bytes:
        path = self._path(key)
        with self._request("read", key):
            if (size := path.stat().st_size) > max_bytes:
                raise TooLarge(f"{path}: {size} bytes, at most {max_bytes} are read")
            return path.read_bytes()

    def write(self, key: str, content: bytes) -> None:
        with self._request("write", key), self._partial(key, content) as partial_file:
            partial_file.replace(self._path(key))

    def create(self, key: str, content: bytes) -> None:
        with self._request("create", key), self._partial(key, content) as partial_file:
            try:
                os.link(partial_file, self._path(key))
            except FileExistsError:
                require_same(self, key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        entries = []
        with self._request("list", prefix):
            for path in sorted((self._directory / prefix).rglob("*")):
                try:
                    status = path.lstat()
                except FileNotFoundError:  # another process has deleted it during the listing
                    continue
                if path.is_file() and not path.is_symlink():
                    key = path.relative_to(self._directory).as_posix()
                    entries.append(Entry(key, status.st_size, status.st_mtime))
        return entries

    def delete(self, key: str) -> None:
        with self._request("delete", key):
            self._path(key).unlink(missing_ok=True)

    def impatient(self) -> "DirectoryStore":
        return self

    def _path(self, key: str) -> Path:
        return self._directory / checked_key(key)

    @contextmanager
    def _partial(self, key: str, content: bytes) -> Iterator[Path]:
        """Write the content to a temporary file in the key's directory, and yield the path of that file.

        The content is on the disk (fsync) before the block starts. After the block, the file is deleted unless
        the block has renamed it. So a crash leaves the file of the key either complete or unchanged.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f"{path.name}{_PARTIAL}{secrets.token_hex(4)}")
        try:
            with partial_file.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield partial_file
            _sync_directory(path.parent)  # makes the new name durable, too
        finally:
            partial_file.unlink(missing_ok=True)

    @contextmanager
    def _request(self, operation: str, key: str) -> Iterator[None]:
        with report_outcome(self._on_request, operation):
            try:
                yield
            except FileNotFoundError as error:
                raise KeyMissing(f"{self._directory / key}: {error.strerror}") from error
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                hint = "; free some space, and saving continues" if is_full else ""
                raise StoreError(f"{self._directory / key}: {error.strerror}{hint}") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
