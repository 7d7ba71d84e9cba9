import json
import pickle

import pytest
import safetensors.torch
import torch

from mappo.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    load,
    restore_networks,
    save,
)
from mappo.config import NetworksConfig, json_hash, override
from mappo.environment import Stream, make_environment
from mappo.networks import make_networks
from tests.conftest import CPU, read_json


@pytest.fixture
def networks(tiny):
    environment = make_environment(tiny.environment, 1, 0, Stream.TRAINING, CPU)
    return make_networks(tiny.networks, environment)


@pytest.fixture
def directory(tiny, networks, tmp_path):
    tensors = dict(networks.modules().state_dict())
    save(Checkpoint(tiny, 3, 360, tensors, {"a.exp_avg": torch.ones(2)}, selection_return=0.5), tmp_path)
    return tmp_path


def tensors_file(directory, kind="networks"):
    (path,) = directory.glob(f"{kind}-*.safetensors")
    return path


def edit_manifest(directory, **changes):
    manifest = read_json(directory / MANIFEST)
    (directory / MANIFEST).write_text(json.dumps(manifest | changes))


def test_round_trip_restores_every_bit(tiny, networks, directory):
    before = {name: value.clone() for name, value in networks.modules().state_dict().items()}
    with torch.no_grad():
        for parameter in networks.modules().parameters():
            parameter.zero_()
    loaded = load(directory)
    restore_networks(loaded, networks)
    assert all(torch.equal(before[name], value) for name, value in networks.modules().state_dict().items())
    assert (loaded.config, loaded.iteration, loaded.frames, loaded.selection_return) == (tiny, 3, 360, 0.5)
    assert torch.equal(loaded.optimiser["a.exp_avg"], torch.ones(2))


@pytest.mark.parametrize("kind", ["networks", "optimiser"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "pickle", "empty"])
def test_damaged_tensors_are_refused_before_they_are_parsed(directory, damage, kind):
    path = tensors_file(directory, kind)
    blob = bytearray(path.read_bytes())
    if damage == "flip":
        blob[-1] ^= 1
    path.write_bytes(
        {"flip": bytes(blob), "truncate": bytes(blob[:-10]), "pickle": pickle.dumps({"a": 1}), "empty": b""}[
            damage
        ]
    )
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(directory)


def test_file_that_is_no_safetensors_is_refused_even_with_the_right_hash(directory):
    import hashlib

    hostile = pickle.dumps({"a": 1})
    digest = hashlib.sha256(hostile).hexdigest()
    (directory / f"networks-{digest[:16]}.safetensors").write_bytes(hostile)
    edit_manifest(directory, networks_sha256=digest)
    with pytest.raises(CheckpointError, match="SafetensorError"):
        load(directory)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 99}, "format 99"),
        ({"config": {"sed": 1}, "config_hash": json_hash({"sed": 1})}, "unknown key"),
        ({"config": None}, "config: "),
        ({"config": {"seed": 1}}, "not the one that its hash names"),
        ({"frames": "many"}, "frames: "),
        ({"frames": -5}, "frames: "),
        ({"frames": float("inf")}, "frames: "),
        ({"more": 1}, "more: "),
        ({"networks_sha256": "../../etc/passwd"}, "networks_sha256: "),
    ],
)
def test_manifest_of_another_version_or_content_is_refused(directory, changes, reason):
    edit_manifest(directory, **changes)
    with pytest.raises(CheckpointError, match=reason):
        load(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000])
def test_manifest_that_is_no_json_object_is_refused(directory, text):
    (directory / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="not the manifest"):
        load(directory)


def test_missing_checkpoint_is_refused_naming_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: No such file"):
        load(tmp_path)


def test_huge_manifest_is_not_read(directory):
    (directory / MANIFEST).write_text(" " * (2 << 20))
    with pytest.raises(CheckpointError, match="at most"):
        load(directory)


def test_checkpoint_of_another_task_is_refused_naming_the_tensors(tiny, directory):
    other = override(tiny, {"environment": {"scenario": "balance"}})
    environment = make_environment(other.environment, 1, 0, Stream.TRAINING, CPU)
    networks = make_networks(NetworksConfig(hidden_sizes=(16,)), environment)
    before = {name: value.clone() for name, value in networks.modules().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"policy.*weight is \[16, 18\].*not \[16, 16\]"):
        restore_networks(load(directory), networks)
    assert all(torch.equal(before[name], value) for name, value in networks.modules().state_dict().items())


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
def test_tensors_that_do_not_fit_are_refused(tiny, networks, change, reason):
    tensors = change({name: value.clone() for name, value in networks.modules().state_dict().items()})
    with pytest.raises(CheckpointError, match=reason):
        restore_networks(Checkpoint(tiny, 0, 0, tensors), networks)


def test_checkpoint_is_safetensors_and_json_only(directory):
    files = {tensors_file(directory, kind).name for kind in ("networks", "optimiser")}
    assert {path.name for path in directory.iterdir()} == {MANIFEST, *files}
    manifest = read_json(directory / MANIFEST)
    assert {"format", "config", "config_hash", "frames", "seed", "versions"} <= manifest.keys()
    assert safetensors.torch.load_file(tensors_file(directory))


def test_saving_again_replaces_the_checkpoint_as_a_whole(tiny, networks, directory):
    old = tensors_file(directory).name
    tensors = {name: value + 1 for name, value in networks.modules().state_dict().items()}
    save(Checkpoint(tiny, 4, 480, tensors), directory)
    assert tensors_file(directory).name != old
    assert load(directory).iteration == 4


def test_crash_before_the_manifest_is_replaced_leaves_the_old_checkpoint(tiny, networks, directory, monkeypatch):
    import mappo.checkpoint

    replace = mappo.checkpoint._replace

    def crash_at_manifest(path, content):
        if path.name == MANIFEST:
            raise OSError("no space left")
        replace(path, content)

    monkeypatch.setattr(mappo.checkpoint, "_replace", crash_at_manifest)
    tensors = {name: value + 1 for name, value in networks.modules().state_dict().items()}
    with pytest.raises(OSError, match="no space left"):
        save(Checkpoint(tiny, 4, 480, tensors), directory)
    assert load(directory).iteration == 3


def test_checkpoint_from_before_a_field_was_added_is_read_with_its_default(tiny, directory):
    older = read_json(directory / MANIFEST)["config"]
    del older["learner"]["learning_rate_schedule"]
    edit_manifest(directory, config=older, config_hash=json_hash(older))
    assert load(directory).config == tiny
