import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mappo.cli.champion_actions import export_champion, show_champion
from mappo.config import EnvironmentConfig
from mappo.errors import ConfigError, KeyTaken, StoreError
from mappo.promotion.champions import CARD, POLICY, Champions, policy_key, task_name, tasks
from mappo.runs.directory_store import DirectoryStore


@pytest.fixture
def champions(tmp_path) -> Champions:
    return Champions(tmp_path, "navigation-12345678")


def other(checkpoint, by: float):
    """A checkpoint with other networks."""
    return replace(checkpoint, tensors={name: value + by for name, value in checkpoint.tensors.items()})


def crown(champions: Champions, *checkpoints) -> list[str]:
    """Make each the champion in turn; the keys of their policies."""
    keys = []
    for checkpoint in checkpoints:
        keys.append(champions.keep(checkpoint, {POLICY: b"exported", CARD: b"# card"}))
        champions.decide(champions.current(), "promoted", keys[-1], {"difference": 1.0, "opponent": "random"})
    return keys


def test_the_last_decision_is_in_force_and_all_are_in_the_history(champions, checkpoint):
    first, second = crown(champions, checkpoint, other(checkpoint, 0.5))
    assert [(each.number, each.action, each.policy) for each in champions.history()] == [
        (1, "promoted", first),
        (2, "promoted", second),
    ]
    assert champions.current() == champions.history()[-1]
    assert policy_key(champions.policy(champions.current())) == second
    assert tasks(champions.location.rpartition("/")[0]) == [champions.task]


def test_a_rollback_is_a_decision_of_its_own(champions, checkpoint):
    first, second = crown(champions, checkpoint, other(checkpoint, 0.5))
    entry = champions.roll_back(reason="it rams walls")
    assert (entry.number, entry.action, entry.policy, entry.reason) == (3, "rolled back", first, "it rams walls")
    assert champions.roll_back(to=2).policy == second
    with pytest.raises(ConfigError, match="no way back to decision 7: decisions for another policy: 1, 3"):
        champions.roll_back(to=7)


def test_there_is_no_way_back_from_the_first_champion(champions, checkpoint):
    with pytest.raises(ConfigError, match="there is no champion"):
        champions.roll_back()
    crown(champions, checkpoint)
    with pytest.raises(ConfigError, match="no way back to an earlier champion"):
        champions.roll_back()


@pytest.mark.parametrize("place", ["directory", "moto_endpoint", "rgw_endpoint"])
def test_of_many_decisions_at_once_one_counts(request, monkeypatch, tmp_path, checkpoint, place):
    from tests.support.services import use_s3

    location = str(tmp_path)
    if place != "directory":
        location = f"s3://{use_s3(monkeypatch, request.getfixturevalue(place))}/champions"
    champions = Champions(location, "task")
    (policy,) = crown(champions, checkpoint)
    before = champions.current()

    def decide(number: int) -> bool:
        try:
            Champions(location, "task").decide(before, "promoted", policy, {"from": number})
        except KeyTaken:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(decide, range(8)))
    assert won.count(True) == 1
    history = champions.history()
    assert len(history) == 2
    assert history[-1].evidence == {"from": won.index(True)}


def test_a_store_that_cannot_tell_who_was_first_is_refused(monkeypatch, champions, checkpoint):
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
def test_a_damaged_or_forged_decision_is_named(champions, checkpoint, change, reason, tmp_path):
    crown(champions, checkpoint)
    file = tmp_path / champions.task / "decisions" / "00000001.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=rf"decisions/00000001\.json: not a decision: {reason}"):
        champions.current()


def test_a_task_is_all_that_makes_it_another_task():
    base = EnvironmentConfig(scenario_kwargs={"n_agents": 2})
    names = {
        task_name(each)
        for each in (
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


def test_a_champion_is_shown_and_exported(champions, checkpoint, tmp_path, capsys):
    (key,) = crown(champions, checkpoint)
    show_champion(str(tmp_path), "")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["task"], shown["policy"]) == (champions.task, key)
    export_champion(str(tmp_path), champions.task, tmp_path / "out")
    assert (tmp_path / "out" / POLICY).read_bytes() == b"exported"
    assert (tmp_path / "out" / CARD).read_text() == "# card"
