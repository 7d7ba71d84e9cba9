"""The look-ups, which need no torch."""

import json
from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.config import from_dict, to_json
from mappo.promotion.champions import Champions, policy_key, task_name
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.stages.prepare import prepare
from mappo.strict_json import to_dict
from tests.cli.test_prechecks import results_of
from tests.conftest import TINY

LOOK_UPS = (
    *("recipes", "show-config", "show-config runs/first", "show-config first", "completion bash"),
    *("checkpoints list first", "checkpoints list first --output json", "checkpoints show runs/first"),
    *("champion list", "champion show", "champion history", "study list", "study show one", "study export one"),
    *("study list --output json", "study show one --output json"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """Make a directory with a run, a champion and a study."""
    directory = tmp_path_factory.mktemp("place")
    claim(Run.at(directory / "runs" / "first")).save(checkpoint)
    champions = Champions(directory / "champions", task_name(checkpoint.config.environment))
    champions.save_policy(checkpoint, {})
    champions.decide(None, "promoted", policy_key(checkpoint), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        prepare(to_json(from_dict(TINY)), "one", "runs", json.dumps({"budget": {"num_trials": 1}}))
    return directory


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, tuple[int, str, bool]]:
    return results_of(list(LOOK_UPS), place)


@pytest.mark.parametrize("command", LOOK_UPS)
def test_look_up_needs_no_torch(results, command):
    assert results[command] == (0, "", False)


def test_configuration_of_a_run_is_shown_and_read_back_as_it_is(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for run in ("first", "runs/first", str(place / "runs" / "first")):
        assert main(["show-config", run]) == 0
        shown = capsys.readouterr().out
        assert json.loads(shown) == to_dict(from_dict(TINY))
    (place / "config.json").write_text(shown)
    assert main(["show-config", "--config", "config.json"]) == 0  # the default recipe has one argument more
    assert json.loads(capsys.readouterr().out) == to_dict(from_dict(TINY))
    assert main(["show-config", "first", "--seed", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == to_dict(from_dict({**TINY, "seed": 7}))
    assert main(["show-config", "frist"]) == 2


def test_json_of_studies_has_every_field(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["study", "list", "--output", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"study": "one", "done": 0, "trials": 1, "best": None, "task": "navigation"}
    assert main(["study", "show", "one", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["config"] == to_dict(from_dict(TINY))
