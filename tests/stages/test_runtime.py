import csv
import json

import jsonschema
import pytest
import torch

import mappo
from mappo.__main__ import main
from mappo.config import config_hash, override, to_json
from mappo.errors import StageFailed
from mappo.stages import runtime
from mappo.stages.compare import compare
from mappo.stages.evaluate import evaluate
from mappo.stages.promote import promote
from mappo.stages.runtime import run_label
from mappo.stages.train import train
from mappo.stages.validate import validate
from tests.conftest import endless, read_json


def outputs(directory):
    return directory / "run", directory / "history", directory / "best"


def test_stages_in_a_row_leave_labelled_artifacts(tiny, tmp_path):
    config = to_json(tiny)
    validated = validate(config, tmp_path / "validation" / "report")
    trained = train(config, *outputs(tmp_path))
    evaluated = evaluate(config, tmp_path / "best", tmp_path / "report")
    for outcome in (validated, trained, evaluated):
        assert outcome.metadata["config_hash"] == config_hash(tiny)
        assert outcome.metadata["seed"] == "0"
        assert set(outcome.metadata) == {"config_hash", "mappo_version", "seed"}
    assert read_json(tmp_path / "validation" / "report")["config_hash"] == config_hash(tiny)
    assert trained.metrics["frames"] == 360
    with (tmp_path / "history").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    report = read_json(tmp_path / "report")
    assert evaluated.metrics["trained_return_mean"] == report["trained"]["mean"]["value"]
    assert evaluated.metrics["random_return_mean_low"] == report["random"]["mean"]["low"]


def test_what_stages_write_is_as_its_schema_says(tiny, tmp_path, capsys):
    """Validated by the library jsonschema, strictly enough to miss a field that is left out."""
    config, run = to_json(tiny), str(tmp_path / "run")
    validate(config, tmp_path / "validation")
    train(config, run, tmp_path / "history.csv")
    evaluate(config, run, tmp_path / "evaluation")
    compare([tmp_path / "evaluation"], tmp_path / "comparison")
    gate = {"num_seeds": 4, "episodes_per_seed": 5}
    promote(config, run, str(tmp_path / "champions"), tmp_path / "decision", gate=gate)
    for name in ("validation", "evaluation", "comparison", "decision"):
        capsys.readouterr()
        assert main(["schema", name]) == 0
        schema = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator.check_schema(schema)
        written = read_json(tmp_path / name)
        jsonschema.validate(written, schema)
        for field in written:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({key: value for key, value in written.items() if key != field}, schema)


def test_numbers_that_kubeflow_rejects_are_named_and_left_out(tmp_path, capsys):
    config = override(
        endless(max_episode_frames=500), {"collection": {"total_frames": 400}, "learner": {"epochs": 1}}
    )
    outcome = train(to_json(config), *outputs(tmp_path))
    assert "episode_return_mean" not in outcome.metrics
    assert "left out of the metrics: episode_return_max, episode_return_mean" in capsys.readouterr().out


def test_bad_configuration_fails_the_stage_with_every_problem_named(tmp_path, capsys):
    with pytest.raises(StageFailed):
        validate('{"seed": -1, "learner": {"epochs": 0}}', tmp_path / "report")
    shown = capsys.readouterr().out
    assert "[validate] failed: seed = -1" in shown
    assert "[validate] failed: learner.epochs = 0" in shown


def test_unwritable_report_fails_the_stage_with_the_reason(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageFailed):
        train(to_json(tiny), tmp_path / "run", tmp_path / "file" / "history")
    assert "[train] failed:" in capsys.readouterr().out


def test_evaluation_with_one_episode_has_no_interval(tiny, tmp_path):
    config = override(tiny, {"evaluation": {"seeds": [1], "episodes_per_seed": 1}})
    train(to_json(config), *outputs(tmp_path))
    outcome = evaluate(to_json(config), tmp_path / "best", tmp_path / "report")
    assert "trained_return_mean" in outcome.metrics
    assert "trained_return_mean_low" not in outcome.metrics


def test_version_skew_between_pipeline_and_image_is_said(tiny, tmp_path, capsys):
    validate(to_json(tiny), compiled_by="0.0.1")
    shown = capsys.readouterr().out
    assert f"warning: mappo 0.0.1 compiled this pipeline, its image has mappo {mappo.__version__}" in shown
    validate(to_json(tiny), compiled_by=mappo.__version__)
    assert "warning: mappo" not in capsys.readouterr().out


def test_version_skew_is_said_before_an_option_that_this_version_lacks(tmp_path, capsys):
    with pytest.raises(StageFailed, match="unknown key"):
        train('{"learner": {"from_the_future": 1}}', tmp_path, tmp_path / "history", compiled_by="9.0")
    assert "mappo 9.0 compiled this pipeline" in capsys.readouterr().out


def test_seed_of_a_stage_replaces_that_of_the_configuration(tiny, tmp_path):
    outcome = train(to_json(tiny), *outputs(tmp_path), seed="7")
    assert outcome.metadata["seed"] == "7"
    assert outcome.metadata["config_hash"] == config_hash(override(tiny, {"seed": 7}))


def test_threads_never_exceed_the_cpu_limit_and_zero_follows_it(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "cpu_limit", lambda: 3)
    try:
        for asked, used in ((1, 1), (2, 2), (0, 3), (64, 3)):
            train(to_json(override(tiny, {"threads": asked})), *outputs(tmp_path / str(asked)))
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(1)
    assert "threads = 64: the CPU limit of this process allows 3" in capsys.readouterr().out


def test_comparison_of_something_else_fails_naming_file_and_field(tmp_path, capsys):
    (tmp_path / "report").write_text('{"config": 3}')
    with pytest.raises(StageFailed, match="report: not an evaluation report: config"):
        compare([tmp_path / "report"])


def test_metrics_call_a_run_by_its_name_its_pipeline_run_or_its_place(monkeypatch):
    assert run_label("first", "3", "s3://bucket/artifacts/checkpoints") == "first-3"
    assert run_label("", "", "runs/first") == "first"
    assert run_label("") == "none"
    monkeypatch.setenv("MAPPO_PIPELINE_RUN", "1234-abcd")
    assert run_label("", "3", "s3://bucket/artifacts/checkpoints") == "1234-abcd-3"
    assert run_label("first", "", "anywhere") == "first"


def test_a_number_that_is_not_finite_is_counted_where_it_was_met(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runtime.Monitor, "met_non_finite", lambda _, source: seen.append(source))
    for scenario in ("NanReward", "NanObservation"):
        environment = {
            "scenario": f"tests.support.scenarios:{scenario}",
            "scenario_kwargs": {},
            "max_episode_frames": 20,
        }
        with pytest.raises(StageFailed):
            train(to_json(override(tiny, {"environment": environment})), *outputs(tmp_path / scenario))
    assert seen == ["loss", "observation"]
