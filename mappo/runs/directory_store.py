"""A store in a directory of a file system.

The directory itself may be a link. Below it, nothing but directories and regular files is ever opened: a link
could lead out of the store, and reading a FIFO or a device could wait for ever or never end.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mappo.errors import KeyMissing, StoreError, TooLarge
from mappo.runs.store import Entry, OnRequest, checked_key, ignore_request, report_outcome, require_same

_NOTHING_ELSE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a file may become a link or a FIFO meanwhile
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space, and saving continues"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "; make it writable, and saving continues"),
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DirectoryStore:
    """A `Store` in a directory of a file system with hard links."""

    def __init__(self, directory: Path, on_request: OnRequest = ignore_request):
        self.location = str(directory)
        self._directory, self._on_request = directory, on_request

    def read(self, key: str, max_bytes: int) -> bytes:
        with self._request("read", key):
            path = self._path(key)
            _require_file(path)
            with os.fdopen(os.open(path, _NOTHING_ELSE), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise TooLarge(f"{path}: {size} bytes, at most {max_bytes} are read")
                return file.read(size)

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
        with self._request("list", prefix):
            return self._listed(os.walk(self._folder(prefix.rstrip("/")), onerror=_raise_unless_missing))

    def entries_outside(self, folder: str) -> list[Entry]:
        def walk() -> Iterator[tuple[str, list[str], list[str]]]:
            for path, folders, names in os.walk(self._directory):
                folders[:] = [name for name in folders if name != folder]  # os.walk does not enter the others
                yield path, folders, names

        with self._request("list", ""):
            return self._listed(walk())

    def delete(self, key: str) -> None:
        with self._request("delete", key):
            self._path(key).unlink(missing_ok=True)

    def impatient(self) -> "DirectoryStore":
        return self

    def _listed(self, folders: Iterable[tuple[str, list[str], list[str]]]) -> list[Entry]:
        """Return the regular files of folders, which `os.walk` yields, sorted by key."""
        entries = []
        for folder, _, names in folders:
            for path in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):  # another process has deleted it during the listing
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        key = path.relative_to(self._directory).as_posix()
                        entries.append(Entry(key, status.st_size, status.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    def _path(self, key: str) -> Path:
        folder, _, name = checked_key(key).rpartition("/")
        return self._folder(folder) / name

    def _folder(self, name: str) -> Path:
        """Return a directory of the store, which need not exist. Refuse links on the way to it."""
        folder = self._directory
        for part in filter(None, name.split("/")):
            folder /= part
            if folder.is_symlink():
                raise StoreError(f"{folder}: a link, and not a directory; remove it")
        return folder

    @contextmanager
    def _partial(self, key: str, content: bytes) -> Iterator[Path]:
        """Write the content to a temporary file in the key's directory, and yield the path of that file.

        The content is on the disk (fsync) before the block starts. After the block, the file is deleted unless
        the block has renamed it. So a crash leaves the file of the key either complete or unchanged.
        """
        path = self._path(key)
        _make_directory(path.parent)
        partial_file = partial_path(path)
        try:
            with partial_file.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield partial_file
            _sync_directory(path.parent)  # makes the new name durable, too
        finally:
            with suppress(OSError):  # the cause is another error already; `Run.garbage` finds what remains
                partial_file.unlink(missing_ok=True)

    @contextmanager
    def _request(self, operation: str, key: str) -> Iterator[None]:
        with report_outcome(self._on_request, operation):
            try:
                yield
            except OSError as error:
                message = f"{self._directory / key}: {error.strerror}"
                if operation == "read":
                    raise (KeyMissing if error.errno == errno.ENOENT else StoreError)(message) from error
                raise StoreError(f"{message}{_HINTS.get(error.errno or 0, '')}") from error


def partial_path(path: Path) -> Path:
    """Return a new path beside a file, for what is still being written to it; `Run.garbage` knows such names."""
    return path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")


def _require_file(path: Path) -> None:
    """Refuse links, FIFOs, devices and the like.

    Raises:
        StoreError: the path is no regular file.
        FileNotFoundError: there is nothing.
    """
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != stat.S_IFREG:
        raise StoreError(f"{path}: {_KINDS.get(kind, 'something')}, and not a file; remove it")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_directory(directory: Path) -> None:
    """Create a directory and its parents, each of which survives a power loss."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    with suppress(FileExistsError):
        directory.mkdir()
    _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
