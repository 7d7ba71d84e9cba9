"""The cache of compiled libraries: who may write to it, what it shares, and what killed compilers leave."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mappo.compute.compiler import compile_graph, trace_graph
from mappo.compute.library_cache import add_library, building, cache_directory, find_library, share_libraries


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Yield an empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cache_directory.cache_clear()
    yield tmp_path / "cache" / "libraries"
    cache_directory.cache_clear()
    share_libraries(None)


def test_library_is_found_after_it_was_added(directory):
    assert find_library("one") is None
    with building("one") as place:
        (place / "made.so").write_bytes(b"code")
        assert add_library("one", [place / "made.so"]) == directory / "one"
    assert (find_library("one") / "made.so").read_bytes() == b"code"
    assert [path.name for path in directory.iterdir()] == ["one"], "no leftovers"


@pytest.mark.parametrize("named", ["", default_cache_dir()])
def test_cache_of_the_user_is_the_default(tmp_path, monkeypatch, named):
    """PyTorch sets the variable when it is imported."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine" / "mappo"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_to_which_others_may_write_is_not_used(directory, mode, caplog):
    directory.mkdir(parents=True)
    directory.chmod(mode)
    (directory / "one").mkdir()
    assert find_library("one") is None
    assert f"others may write to {directory}; run chmod go-w, or set TORCHINDUCTOR_CACHE_DIR" in caplog.text


def test_directory_of_somebody_else_is_not_used(directory, monkeypatch, caplog):
    directory.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert find_library("one") is None
    assert "belongs to another user" in caplog.text


def test_link_is_not_followed(directory, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directory.parent.mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    assert cache_directory() != directory.parent
    assert "is not a directory" in caplog.text


def test_leftovers_of_killed_compilers_are_removed_after_an_hour(directory):
    directory.mkdir(parents=True, mode=0o700)
    old, new = directory / "building-old", directory / "building-new"
    for place in (old, new):
        (place / "deep").mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    cache_directory()
    assert not old.exists()
    assert new.exists()


class Shelf:
    """A store of libraries in a dictionary."""

    location = "shelf"

    def __init__(self):
        self.content = {}

    def fetch(self, name, max_bytes):
        return self.content.get(name)

    def publish(self, name, content):
        self.content[name] = content


def test_shared_store_gets_new_libraries_and_gives_them_to_others(directory):
    shelf = Shelf()
    share_libraries(shelf)
    with building("one") as place:
        (place / "made.so").write_bytes(b"code")
        add_library("one", [place / "made.so"])
    assert list(shelf.content) == ["one"]
    shutil.rmtree(directory / "one")
    assert (find_library("one") / "made.so").read_bytes() == b"code"


def test_damaged_archive_of_the_shared_store_is_not_used(caplog):
    shelf = Shelf()
    shelf.publish("one", b"no archive")
    share_libraries(shelf)
    assert find_library("one") is None
    assert "compiled code is not taken from shelf: File is not a zip file" in caplog.text


@pytest.mark.long
def test_damaged_library_is_compiled_again(directory):
    values = torch.ones(3)
    graph = trace_graph(lambda values: [values + 1], [values])
    compile_graph(graph, [values])(values)
    [library] = Path(directory).glob("*/*.so")
    library.unlink()  # and not overwritten: this process runs it
    library.write_bytes(b"damaged")
    assert torch.equal(compile_graph(graph, [values])(values)[0], values + 1)
