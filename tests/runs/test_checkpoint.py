import json
import logging
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mappo.config import from_dict, override, to_json
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream
from mappo.environment.simulation_state import SimulationState
from mappo.errors import CheckpointError, ConfigError
from mappo.learning.networks import make_networks
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import manifest_bytes, pack, parse_manifest, restore_networks, sha256_of
from mappo.runs.run import Run
from mappo.stages.train import train
from mappo.strict_json import json_hash
from mappo.training.training_state import StartingPoint
from tests.conftest import CPU, TINY
from tests.runs.test_saver import wait_until
from tests.support.runs import assert_same_training, iterations, last, train_here

PARTS = ["networks", "optimiser", "simulation", "structure", "history"]


@pytest.fixture
def run(checkpoint, tmp_path):
    run = Run.at(tmp_path / "run")
    claim(run).save(checkpoint)
    return run


@pytest.fixture
def networks(tiny):
    return networks_for(tiny)


def networks_for(config):
    return make_networks(config.networks, make_environment(config.environment, 1, 0, Stream.TRAINING, CPU))


def part_path(run, part):
    (ref,) = run.refs()
    return Path(run.store.location) / ref.blob(run.manifest(ref).file_name(part))


def load(run):
    return run.load(run.refs()[0])


def put_manifest(run, content, replaced_ref=None):
    """Replace the newest manifest, or that of `replaced_ref`, by other content under the hash of this content."""
    ref = replaced_ref or run.refs()[0]
    run.store.delete(ref.key)
    key = f"checkpoints/{ref.attempt_id}/{ref.iteration:010d}-{sha256_of(content)}.json"
    run.store.write(key, content)


def edited_manifest(run, ref=None, **changes):
    manifest = json.loads(manifest_bytes(run.manifest(ref or run.refs()[0])))
    return json.dumps(manifest | changes).encode()


def put_part(run, part, content):
    """Replace a part by any content, and its hash and size in the manifest accordingly."""
    (ref,) = run.refs()
    manifest = json.loads(manifest_bytes(run.manifest(ref)))
    manifest["parts"][part] = {"sha256": sha256_of(content), "size_bytes": len(content)}
    suffix = {"structure": "json", "history": "csv"}.get(part, "safetensors")
    run.store.write(ref.blob(f"{sha256_of(content)}.{suffix}"), content)
    put_manifest(run, json.dumps(manifest).encode())


def replace_checkpoint(run, ref, checkpoint):
    """Replace a saved checkpoint by another one, with correct hashes."""
    manifest, parts = pack(checkpoint)
    for name, content in parts.items():
        run.store.write(ref.blob(name), content)
    put_manifest(run, manifest_bytes(manifest), ref)


def test_round_trip_restores_every_bit(checkpoint, run, networks):
    loaded = load(run)
    assert_same_training(checkpoint, loaded)
    restore_networks(loaded, networks)
    for name, value in networks.modules().state_dict().items():
        assert torch.equal(checkpoint.tensors[name], value)
    assert (loaded.platform, loaded.started_from) == (checkpoint.platform, "")


def test_same_checkpoint_gives_the_same_bytes(checkpoint):
    assert pack(checkpoint) == pack(checkpoint)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["flip", "truncate", "pickle", "empty"])
def test_damaged_part_is_refused_before_it_is_parsed(run, damage, part):
    path = part_path(run, part)
    content = bytearray(path.read_bytes())
    content[-1] ^= damage == "flip"
    path.write_bytes(
        {"flip": content, "truncate": content[:-10], "pickle": pickle.dumps({"a": 1}), "empty": b""}[damage]
    )
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged or replaced: its SHA-256 is"):
        load(run)


def test_part_that_grew_is_not_read(run):
    path = part_path(run, "networks")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(CheckpointError, match=f"{2 * size} bytes, at most {size} are read"):
        load(run)


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("networks", pickle.dumps({"a": 1}), "SafetensorError"),
        ("optimiser", b"\xff" * 8 + b"{}", "SafetensorError"),
        ("simulation", (10).to_bytes(8, "little") + b"[" * 10, "SafetensorError"),
        ("structure", b"{", "JSONDecodeError"),
        ("structure", b"[" * 200_000, "RecursionError"),
        ("history", b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_part_with_content_of_another_type_is_refused_even_with_the_right_hash(run, part, content, reason):
    put_part(run, part, content)
    with pytest.raises(CheckpointError, match=reason):
        load(run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 99}, "format 99, this version reads 3"),
        ({"format": 2}, "format 2, this version reads 3"),
        ({"config": {"sed": 1}, "config_hash": json_hash({"sed": 1})}, "unknown key"),
        ({"config": None}, "config: "),
        ({"config": {"seed": 1}}, "the configuration does not match its hash"),
        ({"frames": "many"}, "frames: "),
        ({"frames": -5}, "frames: "),
        ({"frames": float("inf")}, "frames: "),
        ({"selection_return": float("nan")}, "selection_return: "),
        ({"more": 1}, "more: "),
        ({"parts": {}}, "parts are missing: history, networks, optimiser, simulation, structure"),
        ({"parts": {"networks": {"sha256": "../../etc/passwd", "size_bytes": 1}}}, "sha256: "),
        ({"parts": {"../x": {"sha256": "a" * 64, "size_bytes": 1}}}, "parts.../x"),
        (
            {"parts": {part: {"sha256": "a" * 64, "size_bytes": 2**40} for part in PARTS}},
            "at most 4294967296 are read",
        ),
        ({"platform": {}}, "platform.device: "),
    ],
)
def test_manifest_of_another_version_or_content_is_refused(run, changes, reason):
    put_manifest(run, edited_manifest(run, **changes))
    with pytest.raises(CheckpointError, match=reason):
        load(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000])
def test_manifest_that_is_no_json_object_is_refused(text):
    with pytest.raises(CheckpointError, match="location: not the manifest"):
        parse_manifest(text.encode(), "location")


def test_manifest_that_was_edited_is_refused_before_it_is_parsed(run):
    ref = run.refs()[0]
    run.store.write(ref.key, edited_manifest(run, iteration=5))
    with pytest.raises(CheckpointError, match="damaged or replaced"):
        run.manifest(ref)


def test_huge_manifest_is_not_read(run):
    put_manifest(run, b" " * (2 << 20))
    with pytest.raises(CheckpointError, match="at most"):
        load(run)


def test_checkpoint_of_another_task_is_refused_naming_the_tensors(tiny, run):
    other = networks_for(override(tiny, {"environment": {"scenario": "balance"}}))
    originals = {name: value.clone() for name, value in other.modules().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"policy.*weight is \[16, 18\].*not \[16, 16\]"):
        restore_networks(load(run), other)
    assert all(torch.equal(originals[name], value) for name, value in other.modules().state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: {**tensors, "extra": torch.zeros(1)}, "extra is unknown"),
        (lambda tensors: dict(list(tensors.items())[1:]), "is missing"),
        (lambda tensors: {name: value.double() for name, value in tensors.items()}, "float64"),
        (lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, "float8"),
        (lambda tensors: {name: value * float("nan") for name, value in tensors.items()}, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, networks, change, reason):
    tensors = change({name: value.clone() for name, value in networks.modules().state_dict().items()})
    with pytest.raises(CheckpointError, match=reason):
        restore_networks(replace(checkpoint, tensors=tensors), networks)


def test_checkpoint_is_safetensors_and_json_and_csv_only(run):
    (ref,) = run.refs()
    manifest = json.loads((Path(run.store.location) / ref.key).read_text())
    assert {
        "format",
        "config",
        "config_hash",
        "frames",
        "iteration",
        "seed",
        "platform",
        "parts",
    } <= manifest.keys()
    for part in ("networks", "optimiser", "simulation"):
        assert safetensors.torch.load_file(part_path(run, part))
    assert json.loads(part_path(run, "structure").read_text())
    assert part_path(run, "history").read_text().startswith("iteration,frames,")
    keys = {entry.key for entry in run.store.entries()}
    assert keys == {"attempts/0001.json", ref.key} | ref.blobs(run.manifest(ref))
    assert {Path(key).suffix for key in keys} == {".json", ".csv", ".safetensors"}


def test_field_that_an_older_checkpoint_lacks_gets_its_default(tiny, run):
    old_config = json.loads(edited_manifest(run))["config"]
    del old_config["learner"]["learning_rate_schedule"]
    del old_config["networks"]["critic"]
    put_manifest(run, edited_manifest(run, config=old_config, config_hash=json_hash(old_config)))
    assert load(run).config == tiny
    assert str(StartingPoint("warm-start", load(run))) == (
        f"warm start from configuration {json_hash(old_config)[:12]} after 360 frames"
    ), "a run that an older version began from this checkpoint resumes"


def test_pickle_is_used_only_between_processes_of_one_training_and_for_compiled_code():
    root = Path(__file__).parents[2]
    sources = [path for folder in ("mappo", "components", "pipelines") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 25
    forbidden = re.compile(
        r"(?<!no )pickle\b|\bdill\b|(?<!safetensors\.)torch\.(load|save)\b|from torch import .*\b(load|save)\b"
        r"|\bjoblib\b|\bmarshal\b|\bshelve\b"
    )
    matches = [path for path in sources if forbidden.search(path.read_text())]
    allowed = "compute/compiler", "fast_simulation/kept_steps", "training/process_collector"
    assert sorted(matches) == [root / f"mappo/{name}.py" for name in allowed]


class StopTraining(Exception):
    pass


def stopped_run(config, directory):
    """Train a run that saves each of four iterations and stops in the fifth; return its directory."""

    def stop(report):
        previous = report.progress.iteration - 1
        wait_until(lambda: previous in (0, *iterations(directory)))
        if previous == 4:
            raise StopTraining

    with pytest.raises(StopTraining):
        train_here(config, directory, stop)
    return directory


OTHER_TENSORS = {
    "not finite": lambda tensors: {name: value / 0 for name, value in tensors.items()},
    "name": lambda tensors: {f"x{name}": value for name, value in tensors.items()},
    "shape": lambda tensors: {name: value[None] for name, value in tensors.items()},
    "dtype": lambda tensors: {name: value.double() for name, value in tensors.items()},
}
LONGER = override(from_dict(TINY), {"collection": {"num_envs": 24, "rollout_frames": 5, "total_frames": 120 * 6}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_here(LONGER, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a stopped run. Tests must not change it, and use `stopped_here` instead."""
    return stopped_run(LONGER, tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def stopped_here(stopped, tmp_path):
    """A copy of the stopped run in the test's own directory."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return Run.at(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flip", "damaged or replaced"),
        ("truncate", "damaged or replaced"),
        ("grow", "are read"),
        ("missing", "No such file"),
        ("manifest", "damaged or replaced"),
        ("future", "format 4, this version reads 3"),
        ("path", "sha256: "),
        ("unknown key", "unknown key"),
        ("not finite", "is not finite"),
        ("name", "is missing"),
        ("shape", r"is \[1, "),
        ("dtype", "float64"),
        ("structure", "not a captured simulation"),
    ],
)
def test_resume_falls_back_to_the_newest_good_checkpoint_and_logs_a_warning(
    damage, reason, whole, stopped_here, tmp_path, caplog
):
    run = stopped_here
    newest = run.refs()[0]
    blob = newest.blob(run.manifest(newest).file_name("simulation"))
    content = run.store.read(blob, 2**30)
    if damage == "flip":
        run.store.write(blob, content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "truncate":
        run.store.write(blob, content[:-10])
    if damage == "grow":
        run.store.write(blob, content * 2)
    if damage == "missing":
        run.store.delete(blob)
    if damage == "manifest":
        run.store.write(newest.key, b"{}")
    if damage == "future":
        put_manifest(run, edited_manifest(run, format=4))
    if damage == "path":
        put_manifest(run, edited_manifest(run, parts={"networks": {"sha256": "../../x", "size_bytes": 1}}))
    if damage == "unknown key":
        put_manifest(run, edited_manifest(run, config={"sed": 1}, config_hash=json_hash({"sed": 1})))
    if damage == "structure":
        bad = SimulationState({"objects": {}, "views": []})
        replace_checkpoint(run, newest, replace(run.load(newest), state=bad))
    if damage in OTHER_TENSORS:
        good = run.load(newest)
        replace_checkpoint(run, newest, replace(good, tensors=OTHER_TENSORS[damage](good.tensors)))
    reports = []
    with caplog.at_level(logging.WARNING):
        assert_same_training(train_here(LONGER, tmp_path, reports.append), whole)
    assert [report.progress.iteration for report in reports] == [4, 5, 6]  # 4 was the newest
    assert_same_training(last(tmp_path), whole)
    (warning,) = [line for line in caplog.messages if "trying the previous checkpoint" in line]
    assert "iteration 4 of attempt 1 cannot be used" in warning
    assert re.search(reason, warning)


def test_damaged_checkpoint_is_neither_chosen_as_best_nor_stops_training(stopped_here, tmp_path, capsys):
    run = stopped_here
    run.store.write(run.refs()[0].key, b"{}")
    for _ in range(2):  # the second training finds a run that has finished
        train(to_json(LONGER), tmp_path, tmp_path / "history.csv", tmp_path / "best")
    assert "damaged or replaced" in capsys.readouterr().out
    assert Run.at(tmp_path / "best").load(run.choose("best")).selection_return is not None
    for ref in run.refs():
        run.store.write(ref.key, b"{}")
    with pytest.raises(CheckpointError, match="damaged or replaced"):
        run.load(run.choose("best"))


def test_run_with_only_damaged_checkpoints_is_refused_and_not_changed(stopped_here, tmp_path):
    run = stopped_here
    for ref in run.refs():
        run.store.write(ref.key, b"{}")
    entries = run.store.entries()
    with pytest.raises(
        CheckpointError, match="none of the 3 checkpoints of .* can be used; to train from scratch"
    ):
        train_here(LONGER, tmp_path)
    assert run.store.entries() == entries


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"seed": 1}, "seed = 0 -> 1"), ({"networks": {"critic": "own"}}, 'networks.critic = "central" -> "own"')],
)
def test_checkpoint_of_another_configuration_in_the_run_is_refused_naming_the_field(
    stopped_here, tmp_path, change, reason
):
    saved_iterations = iterations(tmp_path)
    with pytest.raises(ConfigError, match=f"started with another configuration: {reason};"):
        train_here(override(LONGER, change), tmp_path)
    assert iterations(tmp_path) == saved_iterations
    assert len(list((tmp_path / "attempts").iterdir())) == 1  # no new attempt stops the process that trains
