import subprocess

import pytest

from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.runs.source_commit import source_commit


@pytest.fixture(autouse=True)
def _forget():
    source_commit.cache_clear()
    yield
    source_commit.cache_clear()


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_note_of_an_attempt_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_commit() == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    source_commit.cache_clear()
    commit = git("rev-parse", "HEAD")
    assert source_commit() == commit
    (tmp_path / "file").write_text("2")
    source_commit.cache_clear()
    run = Run.at(tmp_path / "run")
    claim(run)
    ((_, note),) = run.attempts.from_number(1)
    assert note.commit == f"{commit}-changed"


def test_there_is_no_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit() == ""
