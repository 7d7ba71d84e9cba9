import os
import threading

import pytest

from mappo.runs.owned_file import OwnedFile, write_whole


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "history.csv"


def begun(path, *chunks, **more):
    file = OwnedFile(path)
    file.begin(lambda: chunks, **more)
    return file


def test_file_has_its_first_content_and_what_is_appended(path):
    path.parent.mkdir()
    path.write_text("of an earlier run\n")
    file = begun(path, "header\n", "1\n")
    file.append("2\n")
    assert path.read_text() == "header\n1\n2\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["history.csv"]


def test_process_that_was_overtaken_adds_nothing_to_the_file_of_the_next(path):
    first = begun(path, "1\n", owned_since=lambda: 0.0)
    first.append("2\n")
    second = begun(path, "1\n2\n")
    for row in ("3\n", "4\n", "5\n"):
        first.append(row)
        second.append(row)
    assert path.read_text() == "1\n2\n3\n4\n5\n"
    first.settle(lambda: False)
    assert path.read_text() == "1\n2\n3\n4\n5\n"


def test_owner_puts_its_file_back_when_a_process_that_was_overtaken_replaced_it(path):
    owner = begun(path, "1\n")
    late = begun(path, "0\n", owned_since=lambda: 0.0)
    owner.append("2\n")  # finds that the file is another one
    late.append("9\n")
    owner.append("3\n")  # is the owner still
    late.append("9\n")
    assert path.read_text() == "1\n2\n3\n"


def test_owner_puts_its_file_back_at_the_end(path):
    owner = begun(path, "1\n", owned_since=lambda: 0.0)
    path.unlink()
    owner.append("2\n")
    assert not path.exists()
    owner.settle(lambda: True)
    assert path.read_text() == "1\n2\n"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_link_or_pipe_in_its_place_is_replaced_and_not_followed(path, tmp_path, kind):
    path.parent.mkdir()
    target = tmp_path / "target"
    target.write_text("mine")
    path.symlink_to(target) if kind == "link" else os.mkfifo(path)
    file = begun(path, "1\n")
    file.append("2\n")
    assert path.read_text() == "1\n2\n"
    assert path.is_file()
    assert not path.is_symlink()
    assert target.read_text() == "mine"


def test_directory_in_its_place_is_an_error_at_the_start(path):
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"history\.csv"):
        begun(path, "1\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["history.csv"]


def test_content_is_asked_for_again_when_the_disk_is_full_at_first(path, caplog):
    path.parent.mkdir()
    contents = iter([OSError(28, "No space left on device"), ["1\n", "2\n"]])

    def content():
        answer = next(contents)
        if isinstance(answer, OSError):
            raise answer
        return answer

    file = OwnedFile(path)
    file.begin(content)
    file.append("3\n")
    assert path.read_text() == "1\n2\n3\n"
    assert "No space left on device; training continues, but free disk space" in caplog.text
    assert "history.csv is complete again" in caplog.text


def test_whole_file_is_replaced_at_once(path):
    write_whole(path, "one")
    inode = path.stat().st_ino
    path.chmod(0o600)
    write_whole(path, "other")
    assert path.read_text() == "other"
    assert path.stat().st_ino != inode
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["history.csv"]


def test_whole_file_goes_through_a_link_and_into_a_pipe(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("target")
    write_whole(link, "text")
    assert (tmp_path / "target").read_text() == "text"
    assert link.is_symlink()
    os.mkfifo(pipe)
    texts = []
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(10)
    assert texts == ["through"]
