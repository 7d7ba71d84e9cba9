"""The overview of a store's runs: what it reads, what it leaves out, and what damage does to it."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mappo.config import from_dict, override
from mappo.errors import ConfigError
from mappo.evaluation.evaluation import evaluate
from mappo.reporting.run_record import EVALUATION
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import manifest_bytes, sha256_of
from mappo.runs.locations import joined
from mappo.runs.overview import overview
from mappo.runs.run import Run
from mappo.runs.tags import Tags, read_tags, write_tags
from mappo.strict_json import to_dict
from tests.support.services import use_s3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mappo" / "runs"


@pytest.fixture(params=["directory", "moto"])
def store(request, tmp_path, monkeypatch) -> str:
    """The location of an empty store."""
    if request.param == "directory":
        (tmp_path / "runs").mkdir()
        return str(tmp_path / "runs")
    return f"s3://{use_s3(monkeypatch, request.getfixturevalue('moto_endpoint'))}/team/runs"


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def evaluated(checkpoint):
    """A real evaluation as JSON."""
    return json.dumps(asdict(evaluate(checkpoint.config, checkpoint))).encode()


def save(store: str | Path, name: str, checkpoint, **changes) -> Run:
    """Save a run with one checkpoint, as training does."""
    run = Run.at(joined(str(store), name))
    config = override(checkpoint.config, changes)
    claim(run).save(replace(checkpoint, config=config))
    return run


def summaries(store: str | Path) -> dict:
    return {summary.name: summary for summary in overview(str(store), page="report.html")}


def test_overview_has_what_manifests_evaluations_and_tags_say(store, checkpoint, evaluated):
    first = save(store, "first", checkpoint)
    first.store.write(EVALUATION, evaluated)
    write_tags(first.store, Tags().changed(["good", "base"], [], "a <b>comment</b>"))
    save(store, "study-1/trial-0/seed-7", checkpoint, seed=7, collection={"total_frames": 720})
    listed = summaries(store)
    assert listed.keys() == {"first", "study-1/trial-0/seed-7"}
    first, second = listed.values()
    config = checkpoint.config
    assert first.location == joined(store, "first")
    assert (first.training.task, first.training.frames, first.training.final_frames) == ("navigation", 360, 360)
    assert (first.training.is_finished, second.training.is_finished) == (True, False)
    assert (second.training.final_frames, second.training.seed) == (720, 7)
    assert from_dict(first.training.config) == config
    assert first.training.highest_return == checkpoint.highest_return
    report = json.loads(evaluated)
    assert asdict(first.evaluation) == report["trained"]["mean"]
    assert first.evaluated_frames == 360
    assert (
        first.measurements["agent_collisions"].value
        == (report["trained"]["measurements"]["agent_collisions"]["mean"]["value"])
    )
    assert (first.tags, first.comment) == (("base", "good"), "a <b>comment</b>")
    assert (second.evaluation, second.tags) == (None, ())
    assert first.training.recipe == "navigation"
    assert first.training.changes["learner.epochs"] == 2
    assert "environment.scenario" not in first.training.changes


def test_a_second_look_reads_what_has_changed_and_nothing_else(directory, checkpoint, evaluated, cache):
    """The content of a manifest is destroyed after the first look: only the cache still has it."""
    first, other = save(directory, "first", checkpoint), save(directory, "other", checkpoint, seed=1)
    other.store.write(EVALUATION, evaluated)
    looked = summaries(directory)
    (manifest,) = (directory / "first" / "checkpoints").rglob("*.json")
    manifest.write_text("{}")
    changed = evaluated.replace(b'"training_frames": 360', b'"training_frames": 361')
    other.store.write(EVALUATION, changed)  # as large as before
    again = summaries(directory)
    assert again["first"].training == looked["first"].training
    assert again["other"].evaluated_frames == 361
    for damage in (lambda path: path.write_text('{"maker": 1}'), lambda path: path.unlink()):
        (file,) = cache.iterdir()
        damage(file)
        assert "SHA-256" in summaries(directory)["first"].problem
    assert first.store.location


def test_copies_and_runs_inside_of_runs_are_left_out(directory, checkpoint, tmp_path):
    run = save(directory, "first", checkpoint)
    run.export(run.choose("best"), directory / "copy")
    save(directory, "first/pipeline/train/inner", checkpoint)
    assert summaries(directory).keys() == {"first"}
    assert [summary.name for summary in overview(str(directory / "first"))] == ["first"]
    assert overview(str(directory / "copy")) == []
    with pytest.raises(ConfigError, match="no such directory"):
        overview(str(tmp_path / "nowhere"))


def test_hostile_and_damaged_runs_are_listed_with_the_reason_and_hide_no_other(directory, checkpoint, evaluated):
    save(directory, "good", checkpoint)
    damaged = save(directory, "damaged", checkpoint, seed=1)
    (manifest,) = (directory / "damaged" / "checkpoints").rglob("*.json")
    manifest.write_bytes(b"\0" * 100)
    assert damaged.store

    forged = save(directory, "forged", checkpoint)
    whole = forged.manifest(forged.choose("last"))
    config = to_dict(checkpoint.config) | {"seed": "<script>"}
    for content in (
        b"[" * 100_000,
        manifest_bytes(replace(whole, config=config, config_hash="0" * 64)),
    ):
        folder = next((directory / "forged" / "checkpoints").iterdir())
        (folder / f"{9:010d}-{sha256_of(content)}.json").write_bytes(content)
        assert "forged/checkpoints" in summaries(directory)["forged"].problem

    save(directory, "evil", checkpoint, seed=2)
    (directory / "evil").rename(directory / "e\x1b[31mvil\n<b>")
    pipe = save(directory, "pipe", checkpoint)
    os.mkfifo(Path(pipe.store.location, EVALUATION))
    lying = save(directory, "lying", checkpoint)
    lying.store.write(EVALUATION, b'{"trained": {"mean": {"value": 1e999}}}')
    tagged = save(directory, "tagged", checkpoint)
    tagged.store.write("tags.json", b'{"tags": ["<img>"]}')
    huge = save(directory, "huge", checkpoint)
    huge.store.write("tags.json", b" " * 30_000)
    (directory / "loop").symlink_to(directory)
    (directory / "empty" / "attempts").mkdir(parents=True)
    shutil.copy(next((directory / "good" / "attempts").iterdir()), directory / "empty" / "attempts")
    (directory / "old").mkdir()
    (directory / "old" / "checkpoint.json").write_text("{}")

    listed = summaries(directory)
    assert listed["good"].problem == ""
    assert listed["good"].training
    for name, words in {
        "damaged": "SHA-256",
        "lying": "not an evaluation report",
        "tagged": "not the tags of a run",
        "huge": "at most 20000 are read",
        "old": "format 2",
        "e?[31mvil <b>": "not a valid key",
    }.items():
        assert words in listed[name].problem, name
        assert listed[name].problem.isprintable()
    assert (listed["empty"].problem, listed["empty"].training) == ("", None)  # no checkpoint has been saved yet
    assert listed["pipe"].evaluation is None  # a listing shows regular files only
    assert len(listed) == 11 - 1
    assert listed["tagged"].training  # what can be read is shown beside the problem


def test_tags_are_added_removed_and_checked(directory, checkpoint):
    run = save(directory, "first", checkpoint)
    assert read_tags(run.store) == Tags()
    write_tags(run.store, Tags().changed(["b", "a", "b"], [], "text"))
    assert read_tags(run.store) == Tags(("a", "b"), "text")
    assert read_tags(run.store).changed([], ["a", "never"], None) == Tags(("b",), "text")
    with pytest.raises(ConfigError, match="tags"):
        Tags().changed(["Bad tag"], [], None)
    assert [ref.iteration for ref in run.refs()] == [3]  # tags are no part of a run's protocol
    assert run.garbage(0) == []
