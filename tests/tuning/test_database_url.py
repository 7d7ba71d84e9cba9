"""The URL of the database: what is refused before connecting, and that no message shows what is secret in it."""

import json
import re
import time

import pytest

from mappo.__main__ import main
from mappo.config import to_json
from mappo.errors import ConfigError, DatabaseError
from mappo.recipes import recipe
from mappo.tuning.database import Database
from mappo.tuning.database_url import configured_url, database_url
from tests.support.services import free_ports

SECRET = "canary-Zq7"
MALFORMED = [
    "mysql://host/name",
    "sqlite://",
    "sqlite:///:memory:",
    "postgresql:///name",
    "nonsense",
    "file.db",
    f"{SECRET}",
    f"user:{SECRET}@host/name",
    f"mysql://user:{SECRET}@host/name",
    f"postgresql:/user:{SECRET}@host/name",
    f"postgresql://user:{SECRET}",
    f"postgresql://user:pass@{SECRET}@host/name",
    f"postgresql://user:p@x/{SECRET}@host/name",
    f"postgresql://us@er:{SECRET}@host/name",
    f"postgresql://user:{SECRET}@host:port/name",
    f"postgresql://user:{SECRET}@host",
    f"postgresql://user%3A{SECRET}@host/name",
    f"postgresql://host/user:{SECRET}@name",
    f"postgresql://host/name&password={SECRET}",
    f"postgresql://user:{SECRET}@host na/me",
    f"postgresql://user:{SECRET}\n@host/name",
    f"postgresql://user:{SECRET}@host/na\x00me",
    f"postgresql://user:{SECRET}\udcff@host/name",
    f"sqlite://user:{SECRET}@host/file.db",
    f"sqlite:///file.db?password={SECRET}",
    f"sqlite:///postgresql://user:{SECRET}@host/name",
    f"sqlite+nothing://:{SECRET}@/file.db",
]
COMMANDS = [
    ["tune", "--study=s"],
    ["study", "list"],
    ["study", "show", "s"],
    ["study", "export", "s"],
    ["study", "work", "s"],
    ["study", "resume", "s"],
    ["study", "delete", "s", "--delete"],
]


@pytest.mark.parametrize("url", MALFORMED)
def test_an_invalid_url_is_refused_before_connecting_and_nothing_of_it_is_shown(url):
    started = time.monotonic()
    with pytest.raises(ConfigError, match="^MAPPO_DATABASE: ") as error:
        Database(url)
    assert time.monotonic() - started < 1
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["postgresql://us@er:canary-Zq7@host/name", "postgresql://user:can@ry-Zq7@host/name"]
)
def test_an_at_sign_in_the_user_or_the_password_is_named_as_the_cause(url):
    with pytest.raises(ConfigError, match="more than one @; write an @ in the user or the password as %40"):
        Database(url)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_study_command_shows_a_secret_of_the_url(tmp_path, monkeypatch, capfd, command):
    """The port of the second URL is closed; the third names a file that is no database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mappo.tuning.database._CONNECT_SECONDS", 0.3)
    (tmp_path / "text.db").write_text("no database" * 1000)
    closed = f"127.0.0.1:{free_ports(1)[0]}"
    (tmp_path / "tiny.json").write_text(to_json(recipe("navigation")))
    urls = [
        f"postgresql://user:p@x/{SECRET}@host/name",
        f"postgresql://user:{SECRET}@{closed}/name?application_name={SECRET}-2&sslpassword={SECRET}-3",
        "sqlite:///text.db",
        f"postgresql://user:{SECRET}@{closed}/name?connect_timeout={SECRET}",
        f"postgresql://user:{SECRET}@{closed}/name?no_such_option={SECRET}",
    ]
    for url in urls:
        monkeypatch.setenv("MAPPO_DATABASE", url)
        status = main([*command, "--config=tiny.json"] if command[0] == "tune" else command)
        shown = "".join(capfd.readouterr())
        assert status in (1, 2), (url, shown)  # 2: the URL itself is wrong
        assert SECRET not in shown, url
        assert "Traceback" not in shown, url
        assert len(re.findall(r"(\] failed|: error): ", shown)) == 1, shown


def test_white_space_around_the_url_is_stripped(tmp_path):
    assert configured_url({"MAPPO_DATABASE": " postgresql://host/name\r\n"}) == "postgresql://host/name"
    assert database_url(tmp_path, {"MAPPO_DATABASE": "\n"}) == f"sqlite:///{tmp_path}/studies.db"
    assert database_url(tmp_path, {}) == f"sqlite:///{tmp_path}/studies.db"
    assert database_url(tmp_path, {"MAPPO_DATABASE": "postgresql://host/name"}) == "postgresql://host/name"


def test_a_pod_whose_secret_is_empty_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAPPO_PIPELINE_RUN", "1234")
    monkeypatch.setenv("MAPPO_DATABASE", "\n")
    assert main(["study", "list"]) == 2
    assert "MAPPO_DATABASE is not set in this pod" in capsys.readouterr().err


def test_a_file_that_is_no_database_is_an_error_without_retries(tmp_path):
    (tmp_path / "text.db").write_text(json.dumps({}) * 1000)
    started = time.monotonic()
    with pytest.raises(DatabaseError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path}/text.db")
    assert time.monotonic() - started < 5
