"""A file in a fixed place that exactly one process writes, although several may believe that it is theirs."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mappo.errors import StoreError
from mappo.runs.directory_store import partial_path

_log = logging.getLogger(__name__)
_SPELLS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a disk that may pass


class OwnedFile:
    """A text file that grows, such as history.csv.

    The process writes through a descriptor of its own to a new file, which replaces the file at the path as a
    whole. If another process replaces it in turn, this process continues to write to its own file, which has
    no name any more, and so never adds a line to the other's file. It puts its own file back only once it is
    certain that it is still the owner.

    A full or broken disk delays writes and never fails. The text that is missing is written as soon as possible.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None
        self._size_bytes = 0  # of the text on the disk
        self._pending: Callable[[], Iterable[str]] | None = None  # the content of a file that is still to be made
        self._unwritten = bytearray()  # the text that the disk has not accepted yet
        self._owned_since: Callable[[], float] = time.monotonic
        self._displaced_at: float | None = None  # when another file was first found in this one's place
        self._has_warned = False

    def begin(
        self, content: Callable[[], Iterable[str]], owned_since: Callable[[], float] = time.monotonic
    ) -> None:
        """Replace the file at the path by a new one with this content.

        content: called again if the disk is full, so that the content need not stay in memory. owned_since:
        returns the latest time, by `time.monotonic`, at which this process was certainly the owner.

        Raises:
            OSError: the path cannot be written, for another reason than a full or read-only disk.
        """
        self.close()
        self._pending, self._owned_since = content, owned_since
        self._unwritten.clear()
        try:
            self._write_or_raise()
        except OSError as error:
            if error.errno not in _SPELLS:
                raise
            self._warn(error)

    def append(self, text: str) -> None:
        """Add text at the end."""
        self._unwritten += text.encode()
        self._write()

    def settle(self, is_owner: Callable[[], bool]) -> None:
        """Write what is missing, and replace another file in its place if this process is the owner."""
        self._write()
        if self._displaced_at is not None and is_owner():
            self._owned_since = time.monotonic
            self._write()

    def close(self) -> None:
        """Close the file, which gets no more text."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._size_bytes, self._displaced_at = None, 0, None

    def _write(self) -> None:
        try:
            self._write_or_raise()
        except (OSError, StoreError) as error:
            self._warn(error)
        else:
            if self._has_warned:
                _log.warning("%s is complete again", self._path)
            self._has_warned = False

    def _write_or_raise(self) -> None:
        if self._descriptor is None:
            self._replace(self._pending() if self._pending else ())
            self._pending = None
        self._flush()
        self._return_to_place()

    def _warn(self, error: OSError | StoreError) -> None:
        """Log why the file is behind; once, until it is complete again."""
        if not self._has_warned:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = ", but free disk space" if is_full else ""
            reason = getattr(error, "strerror", None) or error
            _log.warning("%s: %s; training continues%s", self._path, reason, hint)
        self._has_warned = True

    def _flush(self) -> None:
        """Write the text that the disk has not accepted yet, over the part of it that a full disk has accepted."""
        assert self._descriptor is not None
        while self._unwritten:
            count = os.pwrite(self._descriptor, self._unwritten, self._size_bytes)
            self._size_bytes += count
            del self._unwritten[:count]

    def _return_to_place(self) -> None:
        if self._is_in_place():
            self._displaced_at = None
        elif self._displaced_at is None:
            self._displaced_at = time.monotonic()
        elif self._owned_since() > self._displaced_at:
            assert self._descriptor is not None
            with os.fdopen(os.dup(self._descriptor), encoding="utf-8", newline="") as own:
                own.seek(0)
                self._replace(iter(lambda: own.read(1 << 20), ""))

    def _is_in_place(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _replace(self, chunks: Iterable[str]) -> None:
        """Write a new file beside the path, and rename it to the path."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(self._path)
        descriptor, size_bytes = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), 0
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                for chunk in chunks:
                    size_bytes += file.write(chunk.encode())
            partial.replace(self._path)
        except BaseException:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor, self._size_bytes = descriptor, size_bytes


def write_whole(path: Path, text: str) -> None:
    """Write a file that a command has finished, such as a page: readers find the old text or the new one.

    A path that names something else than a file, such as /dev/stdout or a pipe, is written as it is.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    partial = partial_path(path)
    try:
        partial.write_text(text)
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
