import json
import logging
import os
import time
from dataclasses import replace

import pytest

from mappo.errors import CheckpointError, Superseded
from mappo.runs.attempt import claim
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
    assert [(ref.attempt, ref.iteration) for ref in run.refs()] == [(2, 2), (1, 3), (1, 2)]


def test_saving_the_same_checkpoint_again_is_harmless(run, checkpoint):
    attempt = claim(run)
    assert attempt.save(checkpoint) == attempt.save(checkpoint)
    assert len(run.refs()) == 1


def test_attempts_of_processes_that_start_together_have_different_numbers(run):
    assert [claim(run).number for _ in range(5)] == [1, 2, 3, 4, 5]


def test_hint_finds_a_checkpoint_that_a_listing_does_not_show(run, checkpoint, tmp_path):
    ref = claim(run).save(checkpoint)
    assert json.loads((tmp_path / "run" / "latest.json").read_text()) == {"checkpoint": ref.key}
    run.listed_refs = list  # a listing that does not show the checkpoint yet
    assert run.refs() == [ref]


@pytest.mark.parametrize("hint", [b"", b"{}", b"[1]", b'{"checkpoint": "../../etc/passwd"}', b'{"checkpoint": 1}'])
def test_damaged_hint_is_ignored(run, checkpoint, hint):
    ref = claim(run).save(checkpoint)
    run.store.write("latest.json", hint)
    assert run.refs() == [ref]


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
    assert iterations(run) == [7, 6, 5, 1]
    assert caplog.text.count("damaged or replaced") == 1
