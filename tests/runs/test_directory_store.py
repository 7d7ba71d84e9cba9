"""The store in a directory: nothing but files and directories is opened, and new names survive a power loss."""

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from mappo.errors import KeyMissing, StoreError
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import Run
from tests.support.services import file_system_of


def make_socket(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)  # a whole path may be too long


KINDS = {
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),  # /dev/zero
    "a directory": os.mkdir,
}


@pytest.fixture(params=KINDS)
def strange(request, tmp_path):
    """A path that is no file, and its kind."""
    (tmp_path / "blobs").mkdir()
    path = tmp_path / "blobs" / "strange"
    try:
        KINDS[request.param](path)
    except PermissionError:
        pytest.skip("making a device takes root")
    return path, " ".join(request.param.split()[:2])


def keys(store, prefix=""):
    return [entry.key for entry in store.entries(prefix)]


def test_what_is_no_file_is_refused_at_once_and_never_listed(tmp_path, strange):
    path, kind = strange
    store = DirectoryStore(tmp_path)
    store.write("blobs/good", b"1")
    start = time.monotonic()
    for call in (lambda: store.read("blobs/strange", 100), lambda: store.create("blobs/strange", b"1")):
        with pytest.raises(StoreError, match=rf"^{path}: {kind}, and not a file; remove it$") as raised:
            call()
        assert not isinstance(raised.value, KeyMissing)
    assert keys(store) == keys(store, "blobs/") == ["blobs/good"]
    assert time.monotonic() - start < 2
    if kind == "a directory":
        with pytest.raises(StoreError, match="Is a directory"):
            store.write("blobs/strange", b"1")
    else:  # the name is replaced, and what it led to stays
        store.write("blobs/strange", b"1")
        assert store.read("blobs/strange", 1) == b"1"
        store.delete("blobs/strange")
    assert keys(store) == ["blobs/good"]


@pytest.mark.parametrize("target", ["outside", "nowhere", "/dev/null", "file"])
def test_link_in_the_place_of_a_directory_is_never_followed(tmp_path, target):
    outside, store = tmp_path / "outside", DirectoryStore(tmp_path / "run")
    outside.mkdir()
    (outside / "key").write_bytes(b"secret")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_bytes(b"")
    (tmp_path / "run" / "blobs").symlink_to(tmp_path / "run" / "file" if target == "file" else tmp_path / target)
    calls = [
        *(lambda: store.read("blobs/key", 100), lambda: store.write("blobs/key", b"1")),
        *(lambda: store.create("blobs/new", b"1"), lambda: store.delete("blobs/key")),
        *(lambda: store.entries("blobs/"), lambda: store.write("blobs/0001/key", b"1")),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=rf"^{tmp_path}/run/blobs: a link, and not a directory; remove it$"):
            call()
    assert keys(store) == ["file"]
    assert (outside / "key").read_bytes() == b"secret"
    assert [path.name for path in tmp_path.iterdir() if path.name == "nowhere"] == []


def test_store_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    store = DirectoryStore(tmp_path / "runs" / "a")
    store.write("blobs/k", b"1")
    assert (tmp_path / "disk" / "a" / "blobs" / "k").read_bytes() == b"1"
    assert keys(store) == ["blobs/k"]


def test_link_to_nothing_in_the_place_of_the_store_is_an_error(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    store = DirectoryStore(tmp_path / "runs")
    with pytest.raises(StoreError, match=f"^{tmp_path}/runs/k: No such file or directory") as raised:
        store.write("k", b"1")
    assert not isinstance(raised.value, KeyMissing)


@pytest.mark.parametrize("call", ["write", "create"])
def test_every_new_name_is_synced_into_its_directory(tmp_path, monkeypatch, call):
    synced, sync = [], os.fsync

    def record(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).partition(".partial-")[0])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    store = DirectoryStore(tmp_path / "runs" / "first")
    getattr(store, call)("blobs/0001/k", b"1")
    folders = [
        "",
        "/runs",
        "/runs/first",
        "/runs/first/blobs",
        "/runs/first/blobs/0001/k",
        "/runs/first/blobs/0001",
    ]
    assert synced == [f"{tmp_path}{folder}" for folder in folders]
    synced.clear()
    getattr(store, call)("blobs/0001/k2", b"1")
    assert synced == [f"{tmp_path}/runs/first/blobs/0001{name}" for name in ("/k2", "")]


def test_file_without_a_size_is_not_read_on():
    assert DirectoryStore(Path("/proc/self")).read("maps", 10) == b""


@pytest.fixture
def nobodys_run():
    """A run of root in a directory that the user `nobody` can list; the test runs as `nobody`."""
    if os.geteuid() != 0:
        pytest.skip("root alone can become another user")
    directory = Path(tempfile.mkdtemp(prefix="mappo-run-"))
    directory.chmod(0o755)
    store = DirectoryStore(directory / "run")
    store.write("checkpoints/0001/k", b"1")
    os.seteuid(65534)
    try:
        yield store
    finally:
        os.seteuid(0)
        shutil.rmtree(directory)


def test_directory_that_cannot_be_written_or_listed_is_an_error_that_says_so(nobodys_run):
    with pytest.raises(StoreError, match="Permission denied; make it writable, and saving continues"):
        nobodys_run.write("checkpoints/0001/k", b"2")
    assert nobodys_run.read("checkpoints/0001/k", 1) == b"1"
    os.seteuid(0)
    Path(nobodys_run.location, "checkpoints").chmod(0o700)
    os.seteuid(65534)
    with pytest.raises(StoreError, match="Permission denied"):  # and not a run without checkpoints
        Run(nobodys_run).refs()


def test_read_only_disk_says_that_saving_continues(tmp_path):
    with file_system_of(256, tmp_path / "disk") as disk:
        store = DirectoryStore(disk / "run")
        store.write("k", b"1")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for call in (
            lambda: store.write("k", b"2"),
            lambda: store.create("blobs/k", b"2"),
            lambda: store.delete("k"),
        ):
            with pytest.raises(StoreError, match="Read-only file system; make it writable, and saving continues"):
                call()
        assert store.read("k", 1) == b"1"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        store.write("k", b"2")
        assert store.read("k", 1) == b"2"
