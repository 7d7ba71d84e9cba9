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
    return [saved.iteration for saved in run.saved()]


def age(run, hours):
    """Make everything look that old."""
    for entry in run.store.entries():
        then = time.time() - hours * 3600
        os.utime(run.store.location + "/" + entry.key, (then, then))


def test_saved_checkpoint_is_the_newest_and_loads_as_it_was(run, checkpoint):
    saved = claim(run).save(checkpoint)
    assert run.saved() == [saved]
    loaded = run.load(saved)
    assert loaded.tensors.keys() == checkpoint.tensors.keys()
    assert loaded.state.structure == checkpoint.state.structure
    assert (loaded.history, loaded.platform) == (checkpoint.history, checkpoint.platform)


def test_the_last_three_and_the_best_are_kept_with_their_parts_alone(run, checkpoint):
    attempt = claim(run)
    for iteration, value in enumerate([0.1, 0.9, 0.2, 0.3, 0.9, 0.4], start=1):
        attempt.save(at(checkpoint, iteration, value))
    assert iterations(run) == [6, 5, 4, 2]  # 2 is the earliest of the best
    assert run.choose("best").iteration == 2
    assert run.choose("last").iteration == 6
    assert run.choose("5").iteration == 5
    assert run.garbage(grace_seconds=-1) == []
    for saved in run.saved():
        run.load(saved)


def test_best_is_the_last_when_nothing_was_evaluated(run, checkpoint):
    attempt = claim(run)
    attempt.save(at(checkpoint, 1))
    attempt.save(at(checkpoint, 2))
    assert run.choose("best").iteration == 2


def test_unknown_checkpoint_is_refused_naming_those_there_are(run, checkpoint):
    with pytest.raises(CheckpointError, match="there is no checkpoint of a run here"):
        run.choose()
    claim(run).save(at(checkpoint, 7))
    with pytest.raises(CheckpointError, match=r"no checkpoint 'first'.*iterations 7"):
        run.choose("first")


def test_checkpoint_of_the_format_before_is_refused_saying_so(tmp_path):
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="format 2, this version reads 3"):
        load_checkpoint(tmp_path)


def test_attempt_that_was_superseded_can_save_no_more(run, checkpoint):
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
    assert [(saved.attempt, saved.iteration) for saved in run.saved()] == [(2, 2), (1, 3), (1, 2)]


def test_saving_the_same_again_is_harmless(run, checkpoint):
    attempt = claim(run)
    assert attempt.save(checkpoint) == attempt.save(checkpoint)
    assert len(run.saved()) == 1


def test_attempts_of_processes_that_start_together_have_different_numbers(run):
    assert [claim(run).number for _ in range(5)] == [1, 2, 3, 4, 5]


def test_hint_finds_a_checkpoint_that_a_listing_does_not_show(run, checkpoint, tmp_path):
    saved = claim(run).save(checkpoint)
    assert json.loads((tmp_path / "run" / "latest.json").read_text()) == {"checkpoint": saved.key}
    run._listed = list  # a listing that lags behind
    assert run.saved() == [saved]


@pytest.mark.parametrize("hint", [b"", b"{}", b"[1]", b'{"checkpoint": "../../etc/passwd"}', b'{"checkpoint": 1}'])
def test_bad_hint_is_nothing_more_than_no_hint(run, checkpoint, hint):
    saved = claim(run).save(checkpoint)
    run.store.write("latest.json", hint)
    assert run.saved() == [saved]


def test_garbage_is_what_no_checkpoint_needs_and_old_enough(run, checkpoint):
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


def test_parts_of_a_checkpoint_that_cannot_be_read_are_no_garbage(run, checkpoint, caplog):
    saved = claim(run).save(checkpoint)
    run.store.write(saved.key, b"{}")
    assert run.garbage(grace_seconds=-1) == []
    assert "damaged or replaced" in caplog.text


def test_prunable_are_all_but_the_last_and_the_best(run, checkpoint):
    attempt = claim(run, keep=10)
    for iteration, value in enumerate([0.9, 0.1, 0.2, 0.3], start=1):
        attempt.save(at(checkpoint, iteration, value))
    assert [saved.iteration for saved in run.prunable(keep=2)] == [2]
    assert [saved.iteration for saved in run.prunable(keep=1)] == [3, 2]


def test_export_is_a_run_with_that_checkpoint_alone(run, checkpoint, tmp_path):
    attempt = claim(run)
    attempt.save(at(checkpoint, 1, 0.5))
    attempt.save(at(checkpoint, 2, 0.4))
    for _ in range(2):  # again, over what is there
        run.export(run.choose("best"), tmp_path / "best")
    assert iterations(Run.at(tmp_path / "best")) == [1]
    assert load_checkpoint(tmp_path / "best").selection_return == 0.5


def test_damaged_part_is_noticed_and_named(run, checkpoint):
    saved = claim(run).save(checkpoint)
    name = run.manifest(saved).file_name("optimiser")
    run.store.write(saved.blob(name), b"something else")
    with pytest.raises(CheckpointError, match=f"{name}: (damaged|.* bytes)"):
        run.load(saved)


def test_missing_part_is_noticed(run, checkpoint):
    saved = claim(run).save(checkpoint)
    run.store.delete(saved.blob(run.manifest(saved).file_name("networks")))
    with pytest.raises(CheckpointError, match="No such file"):
        run.load(saved)


def test_unreadable_checkpoints_are_left_alone_when_tidying_up(run, checkpoint, caplog):
    attempt = claim(run)
    broken = attempt.save(at(checkpoint, 1))
    run.store.write(broken.key, b"{}")
    again = claim(run)
    with caplog.at_level(logging.WARNING):
        for iteration in range(2, 8):
            again.save(at(checkpoint, iteration))
    assert iterations(run) == [7, 6, 5, 1]
    assert caplog.text.count("damaged or replaced") == 1
