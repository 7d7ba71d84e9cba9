"""The fuzz tests of what a checkpoint and a champion hold: it is used, or it is refused with one line.

Each case has a fixed seed. `make test` runs a few hundred of them, `make test-long` 10,000.
"""

import json
import random
from dataclasses import replace

import pytest
import torch

from mappo.cli.champion_actions import champion_history, export_champion, list_champions, show_champion
from mappo.config import from_dict, override
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.simulation_state import SimulationState
from mappo.errors import CheckpointError, MappoError, SimulationStateError, StageFailed
from mappo.learning.networks import make_networks
from mappo.promotion.champions import CARD, POLICY, Champions
from mappo.promotion.promotion import _decision_of
from mappo.reporting.run_page import build
from mappo.reporting.run_record import RunRecord
from mappo.runs.checkpoint import PARTS, manifest_bytes, pack, parse_manifest, restore_networks, unpack
from mappo.strict_json import to_dict
from mappo.training import forked_trial
from mappo.training.history import Progress, parse_history, require_history
from mappo.training.local_collector import LocalCollector
from tests.conftest import CPU, TINY
from tests.promotion.test_champions import crown
from tests.support.fuzzing import mutated_bytes, mutated_json, mutated_text


def seeds(num_quick, num_long):
    """Return the parameters of a test: the seeds of its cases in `make test`, and those in `make test-long`."""
    quick, long = range(num_quick), range(num_quick, num_quick + num_long)
    return pytest.mark.parametrize(
        "seeds",
        [pytest.param(quick, id=f"{num_quick}"), pytest.param(long, id=f"{num_long}", marks=pytest.mark.long)],
    )


def refusal(function, kinds=MappoError):
    """Call a function; return the one line that refuses the input, or an empty text if the function takes it."""
    reason = ""
    try:
        function()
    except kinds as error:
        reason = str(error)
    assert len(reason.splitlines()) <= 1, reason
    return reason


@pytest.fixture(scope="module")
def packed(checkpoint):
    manifest, contents = pack(checkpoint)
    return manifest, {name: contents[manifest.file_name(name)] for name in PARTS}


@seeds(100, 2_500)
def test_manifest(seeds, packed):
    text = manifest_bytes(packed[0]).decode()
    refusals = []
    for seed in seeds:
        generator = random.Random(seed)
        changed = (
            mutated_text(text, generator) if seed % 2 else json.dumps(mutated_json(json.loads(text), generator))
        )

        def read(content=changed):
            unpack(parse_manifest(content.encode(errors="replace"), "here"), None, "here", parts=())

        refusals.append(refusal(read, CheckpointError))
    assert sum(map(bool, refusals)) > len(seeds) / 4


@seeds(80, 1_500)
def test_tensors(seeds, packed, checkpoint):
    manifest, contents = packed
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = LocalCollector(checkpoint.config, CPU).environment
        networks = make_networks(checkpoint.config.networks, environment)
    refusals = []
    for seed in seeds:
        generator = random.Random(seed)
        part = ("networks", "optimiser", "simulation")[seed % 3]
        changed = {**contents, part: mutated_bytes(contents[part], generator)}
        files = {manifest.file_name(name): content for name, content in changed.items()}

        def read(files=files):
            restore_networks(unpack(manifest, lambda file, *_: files[file], "here"), networks)

        refusals.append(refusal(read, CheckpointError))
    assert sum(map(bool, refusals)) > len(seeds) / 8


@seeds(200, 3_000)
def test_history(seeds, checkpoint):
    progress = Progress(checkpoint.iteration, checkpoint.frames)
    require_history(checkpoint.history, Progress(), progress)
    num_refused = 0
    for seed in seeds:
        changed = mutated_text(checkpoint.history, random.Random(seed))
        reason = refusal(lambda text=changed: require_history(text, Progress(), progress), CheckpointError)
        num_refused += bool(reason)
        if not reason:
            assert len(parse_history(changed)) == checkpoint.iteration
        if seed % 20:
            refusal(lambda text=changed: parse_history(text), CheckpointError)
        else:
            record = RunRecord("run", to_dict(checkpoint.config), changed)
            refusal(lambda record=record: build([record]), CheckpointError)
    assert num_refused > len(seeds) / 2


@pytest.fixture(scope="module", params=["navigation", "tests.support.scenarios:ManyKindsOfState"])
def collected(request):
    """Return a configuration, and the state of its collector after a batch."""
    environment = {"scenario": request.param, "max_episode_frames": 10}
    small = {"collection": {"rollout_frames": 3}, "learner": {"minibatch_frames": 18}}
    config = override(from_dict({**TINY, "environment": environment}), small)
    with private_random_streams(0, Stream.TRAINING, CPU):
        collector, policy = begun(config)
        collector.collect(policy)
        return config, collector.capture()


def begun(config):
    collector = LocalCollector(config, CPU)
    policy = make_networks(config.networks, collector.environment).policy
    collector.begin(policy)
    return collector, policy


def restore_all(config, states):
    """Restore each state in a collector; return the reason of each that is refused, or an empty text."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        refusals = []
        collector, _ = begun(config)
        for state in states:
            refusals.append(refusal(lambda c=collector, s=state: c.restore(s), SimulationStateError))
            if not refusals[-1]:
                assert collector.capture()
                collector, _ = begun(config)
    return refusals


@seeds(25, 1_000)
def test_structure(seeds, collected, monkeypatch):
    monkeypatch.setattr(forked_trial, "SECONDS", 2.0)
    config, state = collected
    structures = (mutated_json(state.structure, random.Random(seed)) for seed in seeds)
    refusals = restore_all(config, (SimulationState(structure, state.tensors) for structure in structures))
    assert sum(map(bool, refusals)) > len(seeds) / 4


@seeds(15, 300)
def test_random_states(seeds, collected, monkeypatch):
    monkeypatch.setattr(forked_trial, "SECONDS", 2.0)
    config, state = collected

    def changed(seed):
        generator, structure = random.Random(seed), json.loads(json.dumps(state.structure))
        path = structure["others"]["random_states"]["object"]
        objects = {name: content for name, content in structure["objects"].items() if name.startswith(path)}
        mutated = mutated_json(objects, generator, changes=1)
        structure["objects"].update(mutated if isinstance(mutated, dict) else {path: mutated})
        return SimulationState(structure, state.tensors)

    refusals = restore_all(config, map(changed, seeds))
    assert sum(map(bool, refusals)) > len(seeds) / 5


@seeds(60, 1_500)
def test_champion(seeds, checkpoint, tmp_path, capsys):
    champions = Champions(tmp_path, "navigation-12345678")
    crown(champions, checkpoint)
    file = tmp_path / champions.task / "decisions" / "00000001.json"
    decision = json.loads(file.read_text())
    decision["evidence"] = EVIDENCE
    text, refusals = json.dumps(decision), []
    location = str(tmp_path)
    for seed in seeds:
        generator = random.Random(seed)
        changed = mutated_text(text, generator) if seed % 2 else json.dumps(mutated_json(decision, generator))
        file.write_text(changed, errors="replace")
        refusals.append(refusal(champions.current))
        for action in (
            lambda place: list_champions(place, "table"),
            lambda place: show_champion(place, "", "table"),
            lambda place: champion_history(place, "", "table"),
        ):
            refusal(lambda action=action: action(location))
        refusal(lambda: _decision_of(champions.current(), champions))
    capsys.readouterr()
    assert sum(map(bool, refusals)) > len(seeds) / 4


EVIDENCE = {"difference": 1.5, "opponent": "random", "gate": {"margin": 0.0}, "candidate_returns": [1.0, 2.0]}


@seeds(20, 200)
def test_files_of_a_policy(seeds, checkpoint, tmp_path, capsys):
    champions = Champions(tmp_path, "navigation-12345678")
    (key,) = crown(champions, checkpoint)
    for seed in seeds:
        name = (POLICY, CARD)[seed % 2]
        file = tmp_path / champions.task / key / name
        content = file.read_bytes()
        file.write_bytes(mutated_bytes(content, random.Random(seed)) + b"more")
        reason = refusal(lambda: export_champion(str(tmp_path), "", tmp_path / "out"), StageFailed)
        assert "damaged or replaced" in reason
        file.write_bytes(content)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_trial_leaves_no_trace(collected):
    """Two collectors continue alike from one state, although one of them refused other states first."""
    config, state = collected
    broken = replace(
        state, tensors={**state.tensors, "0.float32": torch.full_like(state.tensors["0.float32"], torch.nan)}
    )
    batches = []
    for states in ([broken, state], [state]):
        with private_random_streams(1, Stream.TRAINING, CPU):
            collector, policy = begun(config)
            for each in states[:-1]:
                with pytest.raises(SimulationStateError):
                    collector.restore(each)
            collector.restore(states[-1])
            batches.append(collector.collect(policy))
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0].keys(True, True))
