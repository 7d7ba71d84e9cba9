"""The cache of compiled libraries: a private directory of this user, and perhaps a store that machines share.

A library is machine code, or a pickled step (see `kept_steps`): whoever can write it runs anything as this user.
So the directory must belong to this user, and nobody else may write to it. A store is used only if the operator
names it in `MAPPO_COMPILED`. docs/security.md says what that trust means.
"""

import atexit
import io
import logging
import os
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from typing import Protocol

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mappo.errors import MappoError

_log = logging.getLogger(__name__)
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_BUILDING = "building-"  # begins the names of directories in which a compiler works
_LEFTOVER_SECONDS = 3600.0  # age at which such a directory was left by a process that was killed
_MAX_BYTES = 1 << 28


class SharedLibraries(Protocol):
    """The store of libraries by name, which several machines share."""

    location: str

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Return a library's archive, whose SHA-256 was verified, or None if the store does not have it."""

    def publish(self, name: str, content: bytes) -> None:
        """Add a library's archive."""


_shared: SharedLibraries | None = None


def share_libraries(libraries: SharedLibraries | None) -> None:
    """Search this store for libraries from now on, and add new ones to it."""
    global _shared
    _shared = libraries


@cache
def cache_directory() -> Path:
    """Return the directory of compiled code: `TORCHINDUCTOR_CACHE_DIR`, or else mappo's in the user's cache.

    If somebody else may write to it, or it cannot be made, it is replaced by a directory of this process. Then
    other processes compile again.
    """
    try:
        directory = _wanted_directory()
        directory.mkdir(parents=True, exist_ok=True)
        libraries = directory / "libraries"
        libraries.mkdir(mode=0o700, exist_ok=True)
        if problem := _problem(libraries):
            raise PermissionError(problem)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home directory
        temporary = Path(tempfile.mkdtemp(prefix="mappo-compiled-"))
        _log.warning("compiled code is kept in %s, for this process only: %s", temporary, error)
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        (temporary / "libraries").mkdir(mode=0o700)
        return temporary
    _remove_leftovers(libraries)
    return directory


def _wanted_directory() -> Path:
    named = os.environ.get(_VARIABLE, "")
    if named and named != default_cache_dir():  # PyTorch itself sets the variable to its default
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mappo"


def find_library(name: str) -> Path | None:
    """Return the directory of a library of this name, if the cache or the shared store has it."""
    path = _path(name)
    if path.exists():
        return path
    if _shared is None:
        return None
    try:
        content = _shared.fetch(name, _MAX_BYTES)
        return None if content is None else _unpack(content, path)
    except (MappoError, zipfile.BadZipFile) as error:
        _log.warning("compiled code is not taken from %s: %s", _shared.location, error)
        return None


@contextmanager
def building(name: str) -> Iterator[Path]:
    """Keep other processes from building this library; yield an empty directory, in which a compiler may work."""
    lock_path = _path(f"{name}.lock")
    with lock_path.open("w") as lock:
        flock(lock, LOCK_EX)
        try:
            with tempfile.TemporaryDirectory(dir=lock_path.parent, prefix=_BUILDING) as directory:
                yield Path(directory)
        finally:
            lock_path.unlink(missing_ok=True)


def add_library(name: str, files: Iterable[Path]) -> Path:
    """Copy the files of a new library to the cache and to the shared store; return their cached directory."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    path = _unpack(content.getvalue(), _path(name))
    if _shared is not None:
        try:
            _shared.publish(name, content.getvalue())
        except MappoError as error:
            _log.warning("compiled code is not added to %s: %s", _shared.location, error)
    return path


def remove_library(name: str) -> None:
    """Remove a damaged library from the directory."""
    shutil.rmtree(_path(name), ignore_errors=True)


def _unpack(content: bytes, path: Path) -> Path:
    """Write a library's files into a new directory, which appears with all of them or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_BUILDING) as temporary:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                raise zipfile.BadZipFile(f"the files of {path.name} have more than {_MAX_BYTES} bytes")
            archive.extractall(Path(temporary, "files"))  # leaves out `..` and absolute paths
        try:
            Path(temporary, "files").rename(path)
        except OSError:
            if not path.exists():  # another process may have been faster
                raise
    return path


def _path(name: str) -> Path:
    return cache_directory() / "libraries" / name


def _problem(directory: Path) -> str:
    """Return why the libraries in a directory may not be run, or an empty text."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is not a directory"
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to another user; remove it or set TORCHINDUCTOR_CACHE_DIR"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {directory}; run chmod go-w, or set TORCHINDUCTOR_CACHE_DIR"
    return ""


def _remove_leftovers(libraries: Path) -> None:
    for directory in libraries.glob(f"{_BUILDING}*"):
        try:
            if time.time() - directory.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)
        except FileNotFoundError:  # another process removed it
            continue
