"""The compiled libraries that machines share, on a directory and on a real S3 API."""

import logging

import pytest

from mappo.compute.library_cache import add_library, building, cache_directory, find_library, share_libraries
from mappo.errors import ConfigError
from mappo.runs.library_store import LibraryStore, library_store_from_environment
from mappo.runs.locations import open_store
from tests.support.services import use_s3


@pytest.fixture(params=["directory", "s3"])
def location(request, tmp_path, monkeypatch):
    """Return the location of an empty store."""
    if request.param == "directory":
        return str(tmp_path / "shared")
    return f"s3://{use_s3(monkeypatch, request.getfixturevalue('rgw_endpoint'))}/compiled"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Return a function that begins to use an empty cache of this name, as another machine does."""

    def use(name):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        cache_directory.cache_clear()

    yield use
    cache_directory.cache_clear()
    share_libraries(None)


def build(name):
    with building(name) as place:
        (place / "made.so").write_bytes(b"code")
        add_library(name, [place / "made.so"])


def test_second_machine_takes_what_the_first_one_compiled(location, caches, monkeypatch):
    monkeypatch.setenv("MAPPO_COMPILED", location)
    share_libraries(library_store_from_environment())
    caches("first")
    build("abc")
    caches("second")
    assert (find_library("abc") / "made.so").read_bytes() == b"code"
    assert find_library("def") is None


def test_replaced_library_is_refused_and_compiled(location, caches, caplog):
    store = open_store(location)
    share_libraries(LibraryStore(store))
    caches("first")
    build("abc")
    [entry] = store.entries("abc/")
    store.write(entry.key, b"hostile")
    caches("second")
    assert find_library("abc") is None
    assert "compiled code is not taken: " in caplog.text
    assert "damaged or replaced: its SHA-256 is" in caplog.text
    build("abc")
    caches("third")
    assert (find_library("abc") / "made.so").read_bytes() == b"code"


def test_store_that_failed_is_asked_once(tmp_path, caches, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").write_text("no directory")
    share_libraries(LibraryStore(open_store(str(tmp_path / "file"))))
    caches("first")
    for name in ("abc", "def"):
        build(name)
        assert (find_library(name) / "made.so").exists()
    assert caplog.text.count("compiled code is not added to") == 1


def test_variable_must_hold_a_location(monkeypatch):
    monkeypatch.setenv("MAPPO_COMPILED", "https://user:secret@host/here")
    with pytest.raises(ConfigError, match="MAPPO_COMPILED: ") as error:
        library_store_from_environment()
    assert "secret" not in str(error.value)
    monkeypatch.setenv("MAPPO_COMPILED", "")
    assert library_store_from_environment() is None
