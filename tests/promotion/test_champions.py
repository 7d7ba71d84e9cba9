import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mappo.cli.champion_actions import export_champion, show_champion
from mappo.config import EnvironmentConfig, override
from mappo.errors import CheckpointError, ConfigError, KeyTaken, StageFailed, StoreError
from mappo.promotion.champions import CARD, CONTRACT, ONNX, POLICY, Champions, policy_key, task_name, tasks
from mappo.runs.checkpoint import sha256_of
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.run import load_checkpoint


@pytest.fixture
def champions(tmp_path) -> Champions:
    return Champions(tmp_path, "navigation-12345678")


def shifted(checkpoint, shift: float):
    """Return a checkpoint whose network parameters are all larger by `shift`."""
    return replace(checkpoint, tensors={name: value + shift for name, value in checkpoint.tensors.items()})


def crown(champions: Champions, *checkpoints) -> list[str]:
    """Make each checkpoint the champion in turn; return the keys of their policies."""
    keys = []
    for checkpoint in checkpoints:
        files = champions.save_policy(checkpoint, {POLICY: b"exported", CARD: b"# card"})
        keys.append(policy_key(checkpoint))
        evidence = {"difference": 1.0, "opponent": "random"}
        champions.decide(champions.current(), "promoted", keys[-1], evidence, files=files)
    return keys


def test_last_decision_is_in_force_and_all_decisions_are_in_the_history(champions, checkpoint):
    first, second = crown(champions, checkpoint, shifted(checkpoint, 0.5))
    assert [(decision.number, decision.action, decision.policy) for decision in champions.history()] == [
        (1, "promoted", first),
        (2, "promoted", second),
    ]
    assert champions.current() == champions.history()[-1]
    assert policy_key(champions.policy(champions.current())) == second
    assert tasks(champions.location.rpartition("/")[0]) == [champions.task]


def test_rollback_is_a_new_decision(champions, checkpoint):
    first, second = crown(champions, checkpoint, shifted(checkpoint, 0.5))
    rollback = champions.roll_back(reason="it rams walls")
    assert (rollback.number, rollback.action) == (3, "rolled back")
    assert (rollback.policy, rollback.reason) == (first, "it rams walls")
    assert champions.roll_back(to=2).policy == second
    with pytest.raises(ConfigError, match="cannot roll back to decision 7: decisions for another policy: 1, 3"):
        champions.roll_back(to=7)


def test_rollback_is_refused_when_there_is_no_earlier_champion(champions, checkpoint):
    with pytest.raises(ConfigError, match="there is no champion"):
        champions.roll_back()
    crown(champions, checkpoint)
    with pytest.raises(ConfigError, match="cannot roll back to an earlier champion"):
        champions.roll_back()


@pytest.mark.parametrize(
    "store", ["directory", "moto_endpoint", pytest.param("rgw_endpoint", marks=pytest.mark.long)]
)
def test_only_one_of_many_simultaneous_decisions_succeeds(request, monkeypatch, tmp_path, checkpoint, store):
    from tests.support.services import use_s3

    location = str(tmp_path)
    if store != "directory":
        location = f"s3://{use_s3(monkeypatch, request.getfixturevalue(store))}/champions"
    champions = Champions(location, "task")
    (policy,) = crown(champions, checkpoint)
    current = champions.current()

    def decide(number: int) -> bool:
        try:
            Champions(location, "task").decide(current, "promoted", policy, {"from": number})
        except KeyTaken:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        successes = list(pool.map(decide, range(8)))
    assert successes.count(True) == 1
    history = champions.history()
    assert len(history) == 2
    assert history[-1].evidence == {"from": successes.index(True)}


def test_store_that_ignores_conditional_writes_is_refused(monkeypatch, champions, checkpoint):
    monkeypatch.setattr(DirectoryStore, "create", DirectoryStore.write)
    with pytest.raises(StoreError, match="ignores conditional writes"):
        crown(champions, checkpoint)
    assert champions.current() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"policy": "../../elsewhere"}, "policy"),
        ({"number": 5}, "number"),
        ({"format": 2}, "format"),
        ({"more": 1}, "more"),
    ],
)
def test_damaged_or_forged_decision_is_refused_and_named(champions, checkpoint, change, reason, tmp_path):
    crown(champions, checkpoint)
    file = tmp_path / champions.task / "decisions" / "00000001.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=rf"decisions/00000001\.json: not a decision: {reason}"):
        champions.current()


def test_task_name_depends_on_every_field_of_the_environment():
    base = EnvironmentConfig(scenario_kwargs={"n_agents": 2})
    names = {
        task_name(config)
        for config in (
            base,
            replace(base, scenario="swarm"),
            replace(base, scenario_kwargs={"n_agents": 3}),
            replace(base, max_episode_frames=7),
            replace(base, actions="discrete"),
        )
    }
    assert len(names) == 5
    assert task_name(base).startswith("navigation-")
    assert task_name(replace(base, scenario="my.own:Task")).startswith("my.own.Task-")


def test_champion_is_shown_and_exported(champions, checkpoint, tmp_path, capsys):
    (key,) = crown(champions, checkpoint)
    show_champion(str(tmp_path), "", "json")
    champion = json.loads(capsys.readouterr().out)
    assert (champion["task"], champion["policy"]) == (champions.task, key)
    export_champion(str(tmp_path), champions.task, tmp_path / "out")
    assert (tmp_path / "out" / POLICY).read_bytes() == b"exported"
    assert (tmp_path / "out" / CARD).read_text() == "# card"


def replace_by_link(file):
    target = file.with_name("elsewhere")
    target.write_bytes(b"other")
    file.unlink()
    file.symlink_to(target)


@pytest.mark.parametrize("name", [POLICY, CARD])
@pytest.mark.parametrize("replace_file", [lambda file: file.write_bytes(b"other"), replace_by_link])
def test_replaced_file_of_a_champion_is_not_exported(champions, checkpoint, tmp_path, capsys, name, replace_file):
    (key,) = crown(champions, checkpoint)
    replace_file(tmp_path / champions.task / key / name)
    with pytest.raises(StageFailed, match=rf"{name}: "):
        export_champion(str(tmp_path), "", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    champions.save_policy(checkpoint, {POLICY: b"exported", CARD: b"# card"})  # promoted again: the file is mended
    export_champion(str(tmp_path), "", tmp_path / "out")
    assert (tmp_path / "out" / POLICY).read_bytes() == b"exported"


def test_exported_file_replaces_a_link_and_does_not_follow_it(champions, checkpoint, tmp_path, capsys):
    crown(champions, checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / POLICY).symlink_to(tmp_path / "precious")
    export_champion(str(tmp_path), "", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "out" / POLICY).read_bytes() == b"exported"
    assert f"{POLICY} (replaced another file)" in capsys.readouterr().out
    export_champion(str(tmp_path), "", tmp_path / "out")
    assert f"{POLICY} (unchanged)" in capsys.readouterr().out


def test_policy_that_is_promoted_again_keeps_the_files_of_its_first_decision(champions, checkpoint, tmp_path):
    """Another version of PyTorch may export the same policy as other bytes."""
    crown(champions, checkpoint, shifted(checkpoint, 0.5))
    files = champions.save_policy(checkpoint, {POLICY: b"exported by another version", CARD: b"# card"})
    assert files == champions.history()[0].files
    assert champions.file(champions.history()[0], POLICY) == b"exported"


def test_policy_that_is_promoted_again_with_more_files_keeps_those_of_its_first_decision(champions, checkpoint):
    crown(champions, checkpoint, shifted(checkpoint, 0.5))
    again = champions.save_policy(
        checkpoint, {POLICY: b"exported by another version", CARD: b"# another"}, {ONNX: b"graph", CONTRACT: b"{}"}
    )
    assert again.items() > champions.history()[0].files.items()
    third = champions.decide(champions.current(), "promoted", policy_key(checkpoint), {}, files=again)
    contents = {POLICY: b"exported", CARD: b"# card", ONNX: b"graph", CONTRACT: b"{}"}
    assert {name: champions.file(third, name) for name in third.files} == contents


def test_onnx_file_and_its_contract_are_replaced_together(champions, checkpoint, tmp_path):
    files = champions.save_policy(checkpoint, {ONNX: b"graph", CONTRACT: b"its contract"})
    decision = champions.decide(None, "promoted", policy_key(checkpoint), {}, files=files)
    (tmp_path / champions.task / decision.policy / CONTRACT).write_bytes(b"damaged")
    champions.save_policy(checkpoint, {ONNX: b"another graph", CONTRACT: b"another contract"})
    policy = tmp_path / champions.task / decision.policy
    assert (policy / ONNX).read_bytes() == b"another graph"
    assert (policy / CONTRACT).read_bytes() == b"another contract"


def test_champion_without_an_onnx_file_gets_one_when_it_is_exported(champions, checkpoint, tmp_path, capsys):
    (key,) = crown(champions, checkpoint)
    export_champion(str(tmp_path), "", tmp_path / "out", "onnx")
    assert f"decision 1 has no {ONNX}: exporting the champion's networks here" in capsys.readouterr().out
    contract = json.loads((tmp_path / "out" / CONTRACT).read_text())
    assert (contract["policy"], contract["sha256"]) == (key, sha256_of((tmp_path / "out" / ONNX).read_bytes()))
    assert not (tmp_path / champions.task / key / ONNX).exists(), "only decisions change what champions hold"


def test_code_that_only_a_champion_names_does_not_run_to_make_an_onnx_file(champions, checkpoint, tmp_path):
    """The networks do not fit this task, which shows that its scenario was imported after it was named."""
    scenario = "tests.support.scenarios:PushRight"
    config = override(checkpoint.config, {"environment": {"scenario": scenario, "scenario_kwargs": {}}})
    crown(champions, replace(checkpoint, config=config))
    for named, reason in (
        ("", f"'{scenario}' is code outside VMAS, which runs only if you name it"),
        ("navigation", f"--environment.scenario navigation: the champion's scenario is '{scenario}'"),
        (scenario, "the checkpoint does not fit these networks"),
    ):
        with pytest.raises(StageFailed, match=reason):
            export_champion(str(tmp_path), "", tmp_path / "out", "onnx", named)
    assert not (tmp_path / "out").exists()


def test_decision_of_an_earlier_version_has_no_hashes_and_is_exported_with_a_warning(
    champions, checkpoint, tmp_path, capsys
):
    crown(champions, checkpoint)
    file = tmp_path / champions.task / "decisions" / "00000001.json"
    old = json.loads(file.read_text())
    del old["files"]
    file.write_text(json.dumps(old))
    export_champion(str(tmp_path), "", tmp_path / "out")
    assert "policy.pt2 is not verified: decision 1 holds no hash of it" in capsys.readouterr().out


def test_networks_that_replace_those_of_a_champion_are_refused(champions, checkpoint, tmp_path):
    first, second = crown(champions, checkpoint, shifted(checkpoint, 0.5))
    policies = tmp_path / champions.task
    shutil.rmtree(policies / second)
    shutil.copytree(policies / first, policies / second)
    with pytest.raises(CheckpointError, match=f"replaced: it holds {first}, not {second}"):
        champions.policy(champions.current())


def test_champion_keeps_only_what_acts(champions, checkpoint):
    crown(champions, checkpoint)
    stored = load_checkpoint(champions.policy_location(champions.current()))
    assert stored.tensors.keys() == checkpoint.tensors.keys()
    assert (stored.optimiser, stored.state.tensors, stored.history) == ({}, {}, "")
