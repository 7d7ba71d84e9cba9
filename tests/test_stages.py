import csv

import pytest
import torch

from mappo import stages
from mappo.config import config_hash, override, to_json
from mappo.stages import StageFailed
from tests.conftest import endless, read_json


def outputs(directory):
    return directory / "last", directory / "best", directory / "history"


def test_stages_in_a_row_leave_labelled_artifacts(tiny, tmp_path):
    config = to_json(tiny)
    validated = stages.validate(config, tmp_path / "validation" / "report")
    trained = stages.train(config, *outputs(tmp_path))
    evaluated = stages.evaluate(config, tmp_path / "best", tmp_path / "report")
    for outcome in (validated, trained, evaluated):
        assert outcome.metadata["config_hash"] == config_hash(tiny)
        assert outcome.metadata["seed"] == "0"
        assert set(outcome.metadata) == {"config", "config_hash", "mappo_version", "seed"}
    assert read_json(tmp_path / "validation" / "report")["config_hash"] == config_hash(tiny)
    assert trained.metrics["frames"] == 360
    with (tmp_path / "history").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    report = read_json(tmp_path / "report")
    assert evaluated.metrics["trained_return_mean"] == report["trained"]["mean"]["value"]
    assert evaluated.metrics["random_return_mean_low"] == report["random"]["mean"]["low"]


def test_threads_of_the_configuration_are_used(tiny, tmp_path):
    try:
        stages.train(to_json(override(tiny, {"threads": 2})), *outputs(tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_numbers_that_kubeflow_rejects_are_named_and_left_out(tmp_path, capsys):
    config = override(
        endless(max_episode_frames=500), {"collection": {"total_frames": 400}, "learner": {"epochs": 1}}
    )
    outcome = stages.train(to_json(config), *outputs(tmp_path))
    assert "episode_return_mean" not in outcome.metrics
    assert "left out of the metrics: episode_return_max, episode_return_mean" in capsys.readouterr().out


def test_bad_configuration_fails_the_stage_with_every_problem_named(tmp_path, capsys):
    with pytest.raises(StageFailed):
        stages.validate('{"seed": -1, "learner": {"epochs": 0}}', tmp_path / "report")
    shown = capsys.readouterr().out
    assert "[validate] failed: seed = -1" in shown
    assert "[validate] failed: learner.epochs = 0" in shown


def test_unwritable_report_fails_the_stage_with_the_reason(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageFailed):
        stages.train(to_json(tiny), *outputs(tmp_path)[:2], tmp_path / "file" / "history")
    assert "[train] failed:" in capsys.readouterr().out


def test_evaluation_with_one_episode_has_no_interval(tiny, tmp_path):
    config = override(tiny, {"evaluation": {"seeds": [1], "episodes_per_seed": 1}})
    stages.train(to_json(config), *outputs(tmp_path))
    outcome = stages.evaluate(to_json(config), tmp_path / "best", tmp_path / "report")
    assert "trained_return_mean" in outcome.metrics
    assert "trained_return_mean_low" not in outcome.metrics
