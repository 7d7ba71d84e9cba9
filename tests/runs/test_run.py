import json
import logging
import os
import time
from dataclasses import replace

import pytest

from mappo.errors import CheckpointError, StoreError, Superseded
from mappo.runs import tidying
from mappo.runs.attempt import claim
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import Run, load_checkpoint


@pytest.fixture
def run(tmp_path):
    return Run.at(tmp_path / "run")


def at(checkpoint, iteration, selection_return=None):
    return replace(checkpoint, iteration=iteration, selection_return=selection_return)


def iterations(run):
    return [ref.iteration for ref in run.refs()]


def age(run, hours):
    """Set the modification time of all files to this many hours ago."""
    for entry in run.store.entries():
        modified = time.time() - hours * 3600
        os.utime(run.store.location + "/" + entry.key, (modified, modified))


def test_saved_checkpoint_is_the_newest_and_loads_unchanged(run, checkpoint):
    ref = claim(run).save(checkpoint)
    assert run.refs() == [ref]
    loaded = run.load(ref)
    assert loaded.tensors.keys() == checkpoint.tensors.keys()
    assert loaded.state.structure == checkpoint.state.structure
    assert (loaded.history, loaded.platform) == (checkpoint.history, checkpoint.platform)


def test_only_the_last_three_and_the_best_are_kept_with_their_parts(run, checkpoint):
    attempt = claim(run)
    for iteration, value in enumerate([0.1, 0.9, 0.2, 0.3, 0.9, 0.4], start=1):
        attempt.save(at(checkpoint, iteration, value))
        attempt.tidy()
    assert iterations(run) == [6, 5, 4, 2]  # 2 is the earliest of the best
    assert run.choose("best").iteration == 2
    assert run.choose("last").iteration == 6
    assert run.choose("5").iteration == 5
    assert run.garbage(grace_seconds=-1) == []
    for ref in run.refs():
        run.load(ref)


def test_best_is_the_last_when_no_checkpoint_was_evaluated(run, checkpoint):
    attempt = claim(run)
    attempt.save(at(checkpoint, 1))
    attempt.save(at(checkpoint, 2))
    assert run.choose("best").iteration == 2


def test_unknown_checkpoint_is_refused_naming_the_available_ones(run, checkpoint):
    with pytest.raises(CheckpointError, match="there is no checkpoint of a run here"):
        run.choose()
    claim(run).save(at(checkpoint, 7))
    with pytest.raises(CheckpointError, match=r"no checkpoint 'first'.*iterations 7"):
        run.choose("first")


def test_checkpoint_of_format_2_is_refused_naming_the_formats(tmp_path):
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="format 2, this version reads 3"):
        load_checkpoint(tmp_path)


def test_superseded_attempt_can_no_longer_save(run, checkpoint):
    first = claim(run)
    first.save(at(checkpoint, 1))
    second = claim(run)
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(Superseded, match=r"attempt 2 of this run has begun on .*; this one, attempt 1, stops"):
        first.save(at(checkpoint, 2))
    assert iterations(run) == [1]
    second.save(at(checkpoint, 2))
    assert iterations(run) == [2, 1]


def test_checkpoint_of_a_later_attempt_is_newer_whatever_its_iteration(run, checkpoint):
    first = claim(run)
    for iteration in (1, 2, 3):
        first.save(at(checkpoint, iteration))
    claim(run).save(at(checkpoint, 2))
    assert [(ref.attempt, ref.iteration) for ref in run.refs()] == [(2, 2), (1, 3), (1, 2), (1, 1)]


def test_saving_the_same_checkpoint_again_is_harmless(run, checkpoint):
    attempt = claim(run)
    assert attempt.save(checkpoint) == attempt.save(checkpoint)
    assert len(run.refs()) == 1


def test_attempts_of_processes_that_start_together_have_different_numbers(run):
    assert [claim(run).number for _ in range(5)] == [1, 2, 3, 4, 5]


def test_hint_finds_a_checkpoint_that_a_listing_does_not_show(run, checkpoint, tmp_path):
    attempt = claim(run)
    ref = attempt.save(checkpoint)
    attempt.tidy()
    assert json.loads((tmp_path / "run" / "latest.json").read_text()) == {"checkpoint": ref.key}
    run.listed_refs = list  # a listing that does not show the checkpoint yet
    assert run.refs() == [ref]


GARBLED = [
    *(b"", b"{}", b"[1]", b"null", b"[" * 995, b'{"checkpoint": "../../etc/passwd"}', b'{"checkpoint": 1}'),
    *(b'{"checkpoint": "' + b"x" * 20_000 + b'"}', b'{"checkpoint": 1' + b"0" * 900 + b"}", b"\xff\xfe"),
    *(b'{"token": "\xd9\xa3", "host": "", "process": 1, "started": 1}', b'{"token": [], "started": NaN}'),
]


@pytest.mark.parametrize("hint", GARBLED, ids=range(len(GARBLED)))
def test_damaged_hint_is_ignored(run, checkpoint, hint):
    ref = claim(run).save(checkpoint)
    run.store.write("latest.json", hint)
    assert run.refs() == [ref]


@pytest.mark.parametrize("note", GARBLED, ids=range(len(GARBLED)))
def test_damaged_note_of_an_attempt_is_ignored(run, checkpoint, note):
    first = claim(run)
    run.store.write("attempts/0002.json", note)
    run.store.write("attempts/0007.json", note)
    first.save(at(checkpoint, 1))
    second = claim(run)
    assert second.number == 3
    second.save(at(checkpoint, 2))
    with pytest.raises(Superseded):
        first.save(at(checkpoint, 3))
    assert iterations(run) == [2, 1]


def test_hint_and_notes_that_are_no_files_are_ignored(run, checkpoint, tmp_path):
    first = claim(run)
    for name in ("latest.json", "attempts/0002.json"):
        (tmp_path / "run" / name).mkdir(parents=True)
    ref = first.save(checkpoint)
    first.tidy()
    assert run.refs() == [ref]
    assert claim(run).number == 3


@pytest.mark.parametrize(
    "name",
    [
        "\u0660\u0660\u0660\u0669",
        "00009",
        "0009x",
        "999999999",
        "9999999999",
        "-001",
        "1e9",
        " 009",
        "\u00b2\u00b2\u00b2\u00b2",
    ],
)
def test_names_that_are_no_attempts_are_ignored(run, checkpoint, tmp_path, name):
    first = claim(run)
    (tmp_path / "run" / "attempts" / f"{name}.json").write_text("{}")
    folder = tmp_path / "run" / "checkpoints" / f"{name}-{'a' * 8}"
    folder.mkdir(parents=True)
    (folder / f"0000000009-{'a' * 64}.json").write_text("{}")
    ref = first.save(checkpoint)
    second = claim(run)
    assert second.number == 2
    assert [found for found in run.refs() if found.attempt < 999_999_999] == [ref]
    second.save(at(checkpoint, 9))
    second.tidy()


def test_attempt_has_a_higher_number_than_all_checkpoints(run, checkpoint):
    """The checkpoints of `unsaved/` may come from a store whose notes were not copied."""
    later = claim(run)
    later.number = 12
    ref = replace(later).save(checkpoint)
    for entry in run.store.entries("attempts/"):
        run.store.delete(entry.key)
    second = claim(run)
    assert second.number == 13
    assert run.refs() == [ref]


class FaultyStore(DirectoryStore):
    """A directory whose listings lack the keys that `hides` names, and that refuses deletions on request."""

    hides = staticmethod(lambda key: False)
    refuses = False

    def entries(self, prefix=""):
        self.num_listings = getattr(self, "num_listings", 0) + 1
        return [entry for entry in super().entries(prefix) if not self.hides(entry.key)]

    def delete(self, key):
        if self.refuses:
            raise StoreError(f"{key}: AccessDenied")
        super().delete(key)


@pytest.fixture
def faulty(tmp_path):
    return Run(FaultyStore(tmp_path / "run"))


@pytest.mark.parametrize("hidden", ["attempts/0002", "attempts/", ""])
def test_attempt_that_the_listing_does_not_show_yet_saves(faulty, checkpoint, hidden):
    claim(faulty)
    faulty.store.hides = lambda key: key.startswith(hidden)
    second = claim(faulty)
    assert second.number == 2
    second.save(checkpoint)
    second.tidy()
    faulty.store.hides = lambda key: False
    assert [ref.attempt for ref in faulty.refs()] == [2]
    second.save(at(checkpoint, 9))


def test_claim_tries_a_bounded_number_of_times_when_the_listing_is_empty(faulty, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    faulty.store.hides = lambda key: True
    assert [claim(faulty).number for _ in range(12)] == list(range(1, 13))
    assert len(pauses) == sum(range(12))
    assert max(pauses) <= 2
    faulty.store.num_listings = 0
    for number in range(1, 50):
        faulty.store.write(f"attempts/{number:04d}.json", b"{}")
    with pytest.raises(StoreError, match="no free number for this attempt"):
        claim(faulty)
    assert faulty.store.num_listings < 70


def test_refused_deletions_are_logged_once_and_tried_later(faulty, checkpoint, caplog, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    faulty.store.refuses = True
    attempt = claim(faulty)
    for iteration in range(1, 9):
        attempt.save(at(checkpoint, iteration, 0.5))
        attempt.tidy()
    assert iterations(faulty) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert caplog.text.count("old checkpoints are not deleted; training and saving continue") == 1
    faulty.store.refuses = False
    clock[0] += 3600
    attempt.tidy()
    assert iterations(faulty) == [8, 7, 6, 1]
    assert faulty.garbage(grace_seconds=-1) == [f"attempts/{name}" for name in probes(faulty)]
    assert "deleting works again" in caplog.text


def probes(run):
    return [entry.key.partition("/")[2] for entry in run.store.entries("attempts/") if "probe-" in entry.key]


def test_checkpoints_that_wait_too_long_for_their_deletion_are_forgotten(faulty, checkpoint, monkeypatch):
    monkeypatch.setattr(tidying, "_MAX_WAITING", 2)
    monkeypatch.setattr(tidying, "_PAUSE_SECONDS", 0.0)
    faulty.store.refuses = True
    attempt = claim(faulty, keep=1)
    for iteration in range(1, 9):
        attempt.save(at(checkpoint, iteration))
        attempt.tidy()
    faulty.store.refuses = False
    attempt.tidy()
    assert iterations(faulty) == [8, 5, 4, 3, 2, 1]
    for ref in faulty.refs():
        faulty.load(ref)


def test_leftovers_of_earlier_attempts_are_deleted_after_a_day(run, checkpoint):
    first = claim(run)
    first.save(at(checkpoint, 1))
    run.store.write(f"blobs/{first.id}/{'a' * 64}.json", b"of a save that was killed")
    age(run, hours=25)
    second = claim(run, keep=1)
    second.save(at(checkpoint, 2))
    second.tidy()
    assert iterations(run) == [2]
    assert {entry.key.split("/")[1] for entry in run.store.entries("blobs/")} == {second.id}


def test_garbage_is_old_and_needed_by_no_checkpoint(run, checkpoint):
    attempt = claim(run)
    attempt.save(checkpoint)
    needed = {entry.key for entry in run.store.entries()}
    orphan = f"blobs/{attempt.id}/{'a' * 64}.safetensors"
    run.store.write(orphan, b"a save that a crash cut short")
    partial = f"checkpoints/{attempt.id}/x.json.partial-1234"
    run.store.write(partial, b"{")
    run.store.write("notes.txt", b"somebody else's")
    assert run.garbage(grace_seconds=3600) == []
    age(run, hours=2)
    assert set(run.garbage(grace_seconds=3600)) == {orphan, partial}
    assert needed.isdisjoint(run.garbage(grace_seconds=-1))


def test_parts_of_an_unreadable_checkpoint_are_not_garbage(run, checkpoint, caplog):
    ref = claim(run).save(checkpoint)
    run.store.write(ref.key, b"{}")
    assert run.garbage(grace_seconds=-1) == []
    assert "damaged or replaced" in caplog.text


def test_prunable_are_all_but_the_last_and_the_best(run, checkpoint):
    attempt = claim(run, keep=10)
    for iteration, value in enumerate([0.9, 0.1, 0.2, 0.3], start=1):
        attempt.save(at(checkpoint, iteration, value))
    assert [ref.iteration for ref in run.prunable(keep=2)] == [2]
    assert [ref.iteration for ref in run.prunable(keep=1)] == [3, 2]


def test_export_is_a_run_with_that_checkpoint_alone(run, checkpoint, tmp_path):
    attempt = claim(run)
    attempt.save(at(checkpoint, 1, 0.5))
    attempt.save(at(checkpoint, 2, 0.4))
    for _ in range(2):  # the second export replaces the first
        run.export(run.choose("best"), tmp_path / "best")
    assert iterations(Run.at(tmp_path / "best")) == [1]
    assert load_checkpoint(tmp_path / "best").selection_return == 0.5


def test_damaged_part_is_detected_and_named(run, checkpoint):
    ref = claim(run).save(checkpoint)
    name = run.manifest(ref).file_name("optimiser")
    run.store.write(ref.blob(name), b"something else")
    with pytest.raises(CheckpointError, match=f"{name}: (damaged|.* bytes)"):
        run.load(ref)


def test_missing_part_is_detected(run, checkpoint):
    ref = claim(run).save(checkpoint)
    run.store.delete(ref.blob(run.manifest(ref).file_name("networks")))
    with pytest.raises(CheckpointError, match="No such file"):
        run.load(ref)


def test_pruning_keeps_unreadable_checkpoints(run, checkpoint, caplog):
    first = claim(run)
    damaged = first.save(at(checkpoint, 1))
    run.store.write(damaged.key, b"{}")
    second = claim(run)
    with caplog.at_level(logging.WARNING):
        for iteration in range(2, 8):
            second.save(at(checkpoint, iteration))
            second.tidy()
    assert iterations(run) == [7, 6, 5, 1]
    assert caplog.text.count("damaged or replaced") == 1
